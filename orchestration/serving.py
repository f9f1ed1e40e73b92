"""What servers of adapters cannot load, read from an adapter's config. Imports neither torch nor ray."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainers.paths import read_json

ADAPTER_CONFIG = "adapter_config.json"

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank (vllm.config.lora, 0.14 to 0.23); an adapter's rank may lie below."""
VLLM_HEAD_VOCABULARY = 258_048
"""Largest vocabulary with an adapter on the head (vllm.lora.layers.logits_processor)."""
SERVERS = ("vllm",)


def portable_config(folder: Path, sweep: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's config with its base as the user named it, not as this machine resolved it.

    Args:
        folder: of the adapter.
        sweep: the sweep's config as it was resolved.
    """
    base = {"base_model_name_or_path": sweep["model"], "revision": sweep.get("revision")}
    return read_json(folder / ADAPTER_CONFIG) | base


def vllm_refusals(config: Mapping[str, Any], vocab_size: int) -> Iterator[str]:
    """Why vLLM would not load an adapter, or would compute something else with it, a line each.

    Args:
        config: adapter_config.json.
        vocab_size: of the base.

    Source: vllm/lora/peft_helper.py: DoRA and modules_to_save are refused, rank_pattern and alpha_pattern
        are not read, so that one scale, lora_alpha / r, holds for every layer.
    """
    if config["r"] > VLLM_RANKS[-1]:
        yield f"lora_rank must be at most {VLLM_RANKS[-1]}, is {config['r']}"
    if config.get("use_dora"):
        yield "DoRA is not supported"
    if config.get("modules_to_save"):
        yield f"modules_to_save must be empty, is {config['modules_to_save']}"
    if config.get("bias", "none") != "none":
        yield f"bias must be none, is {config['bias']}"
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            yield (
                f"{key} is not read: {', '.join(config[key])} would be scaled as the other layers are, "
                "which is not what was trained"
            )
    if _has_head(config) and vocab_size > VLLM_HEAD_VOCABULARY:
        yield (
            f"an adapter on the head needs a vocabulary of at most {VLLM_HEAD_VOCABULARY:,}, this has "
            f"{vocab_size:,}"
        )


def vllm_remarks(config: Mapping[str, Any]) -> Iterator[str]:
    """What a user of vLLM must know of an adapter that it loads."""
    flag = next(rank for rank in VLLM_RANKS if rank >= config["r"])
    yield f"serve it with --enable-lora --max-lora-rank {flag}"
    if _has_head(config):
        yield (
            "it adapts the head, which vLLM takes for some architectures alone (Llama's; not Qwen's in 0.23): "
            "where it says 'is unsupported LoRA weight', serve merged weights (--merge)"
        )


def _has_head(config: Mapping[str, Any]) -> bool:
    targets = config.get("target_modules") or ()
    names = [targets] if isinstance(targets, str) else targets
    return any(name.rpartition(".")[2] in ("lm_head", "embed_out") for name in names)
