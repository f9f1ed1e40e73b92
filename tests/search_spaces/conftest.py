"""Shapes and reference files that the tests of search_spaces share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from search_spaces.architecture import ModelShape

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published configs and figures beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"reference data not found at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def model_shape(shared: Path) -> Callable[[str], ModelShape]:
    """Reads a shape by the name of its file in shared/models."""
    return lambda name: ModelShape.from_config(shared / "models" / f"{name}.json")


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., dict[str, object]]:
    """The TINY config of FIELD_CASES for a model type, with extra keys."""
    return lambda model_type, **more: {"model_type": model_type, **TINY, **more}


@pytest.fixture(scope="session")
def tiny_llama(tiny_config: Callable[..., dict[str, object]]) -> ModelShape:
    return ModelShape.from_config(tiny_config("llama"))


@pytest.fixture(scope="session")
def tiny_moe(tiny_config: Callable[..., dict[str, object]]) -> ModelShape:
    """TINY Qwen3-MoE: 4 experts of 32, 2 of them active."""
    return ModelShape.from_config(
        tiny_config(
            "qwen3_moe",
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
        )
    )
