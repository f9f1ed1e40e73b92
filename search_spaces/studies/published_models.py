"""Widths and families of the models in tulu3_lora_sweep.csv, and the sets that are compared."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """What the learning-rate priors ask of a model.

    Attributes:
        hidden_size: width of the residual stream.
        model_type: as in its config.json.
        vocab_size: rows of its unembedding. The published LoRA parameters of the unembedding per
            unit of rank (tinker-cookbook) are hidden_size + vocab_size: they confirm the width.
        dense: no mixture of experts.
    """

    hidden_size: int
    model_type: str
    vocab_size: int
    dense: bool


def _model(hidden_size: int, model_type: str, vocab_size: int) -> PublishedModel:
    dense = model_type in ("llama", "qwen3", "qwen3_5")
    return PublishedModel(
        hidden_size=hidden_size, model_type=model_type, vocab_size=vocab_size, dense=dense
    )


_QWEN3, _QWEN3_5 = 151_936, 248_320

MODELS: dict[str, PublishedModel] = {
    "meta-llama/Llama-3.2-1B": _model(2048, "llama", 128_256),
    "meta-llama/Llama-3.1-8B": _model(4096, "llama", 128_256),
    "meta-llama/Llama-3.1-8B-Instruct": _model(4096, "llama", 128_256),
    "meta-llama/Llama-3.3-70B-Instruct": _model(8192, "llama", 128_256),
    "Qwen/Qwen3-4B-Instruct-2507": _model(2560, "qwen3", _QWEN3),
    "Qwen/Qwen3-8B-Base": _model(4096, "qwen3", _QWEN3),
    "Qwen/Qwen3.5-4B": _model(2560, "qwen3_5", _QWEN3_5),
    "Qwen/Qwen3.5-9B": _model(4096, "qwen3_5", _QWEN3_5),
    "Qwen/Qwen3.6-27B": _model(5120, "qwen3_5", _QWEN3_5),
    "Qwen/Qwen3-30B-A3B-Base": _model(2048, "qwen3_moe", _QWEN3),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _model(2048, "qwen3_moe", _QWEN3),
    "Qwen/Qwen3-235B-A22B-Instruct-2507": _model(4096, "qwen3_moe", _QWEN3),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": _model(2048, "qwen3_vl_moe", _QWEN3),
    "Qwen/Qwen3-VL-235B-A22B-Instruct": _model(4096, "qwen3_vl_moe", _QWEN3),
    "Qwen/Qwen3.5-35B-A3B": _model(2048, "qwen3_5_moe", _QWEN3_5),
    "Qwen/Qwen3.5-35B-A3B-Base": _model(2048, "qwen3_5_moe", _QWEN3_5),
    "Qwen/Qwen3.6-35B-A3B": _model(2048, "qwen3_5_moe", _QWEN3_5),
    "Qwen/Qwen3.5-397B-A17B": _model(4096, "qwen3_5_moe", _QWEN3_5),
    "deepseek-ai/DeepSeek-V3.1": _model(7168, "deepseek_v3", 129_280),
    "moonshotai/Kimi-K2-Thinking": _model(7168, "kimi_k2", 163_840),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": _model(2688, "nemotron_h", 131_072),
    "openai/gpt-oss-20b": _model(2880, "gpt_oss", 201_088),
}
"""Source: published config.json files (Llama, Qwen3 and gpt-oss; defaults of transformers'
DeepseekV3Config and Qwen3.5 configs), THUDM/slime scripts/models (Qwen3-235B, Qwen3.5, Nemotron
Nano), a report on Kimi-K2's config; each width confirmed by the published unembedding count.
Left out, because no config was at hand: Kimi-K2.6, Nemotron-3 Super and Ultra."""


def _names(*prefixes: str, dense: bool | None = None) -> tuple[str, ...]:
    return tuple(
        name
        for name, model in MODELS.items()
        if name.startswith(prefixes) and dense in (None, model.dense)
    )


_NO_WIDTH = (
    "moonshotai/Kimi-K2.6",
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16",
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
)

MODEL_SETS: dict[str, tuple[str, ...]] = {
    "llama": _names("meta-llama/"),
    "llama from 8B": _names("meta-llama/Llama-3.1", "meta-llama/Llama-3.3"),
    "qwen3 dense": _names("Qwen/Qwen3-", dense=True),
    "qwen3 experts": _names("Qwen/Qwen3-", dense=False),
    "qwen3.5 and 3.6": _names("Qwen/Qwen3.5", "Qwen/Qwen3.6"),
    "all dense": _names("", dense=True),
    "all experts": (*_names("", dense=False), *_NO_WIDTH),
    "all": (*_names(""), *_NO_WIDTH),
}
"""Every model of the sweep is in `all`; those without a width are listed there as left out."""
