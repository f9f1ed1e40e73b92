"""A random tiny model of every family that Tenfold has a reader for."""

from collections.abc import Callable

import torch
import transformers
from transformers import PreTrainedModel

from tests.trainers.tiny import TINY_LLAMA

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = TINY_LLAMA | SPECIAL
MOE = {"num_experts_per_tok": 2}
CLASSIC = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
CLASSIC |= SPECIAL | {"initializer_range": 0.2}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _config(name: str, **values: object) -> Callable[[], transformers.PretrainedConfig]:
    return lambda: getattr(transformers, f"{name}Config")(**values)


def _gemma3() -> transformers.PretrainedConfig:
    text = transformers.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=16)
    vision = transformers.SiglipVisionConfig(**VISION)
    return transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4
    )


CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": _config("Llama", **SIZES),
    "llama-tied": _config("Llama", **SIZES, tie_word_embeddings=True),
    "qwen2": _config("Qwen2", **SIZES),
    "qwen3": _config("Qwen3", **SIZES, head_dim=16, tie_word_embeddings=True),
    "mistral": _config("Mistral", **SIZES),
    "gemma2": _config("Gemma2", **SIZES, head_dim=16, sliding_window=16),
    "gemma3-text": _config("Gemma3Text", **SIZES, head_dim=16, sliding_window=16),
    "gemma3": _gemma3,
    "phi3": _config("Phi3", **SIZES),
    "gpt2": _config(
        "GPT2",
        n_embd=64,
        n_layer=2,
        n_head=4,
        vocab_size=256,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    ),
    "gpt-neox": _config("GPTNeoX", **CLASSIC, intermediate_size=128, max_position_embeddings=128),
    "falcon": _config("Falcon", **CLASSIC, new_decoder_architecture=True, num_kv_heads=2),
    "mpt": _config(
        "Mpt",
        d_model=64,
        n_layers=2,
        n_heads=4,
        vocab_size=256,
        max_seq_len=128,
        initializer_range=0.2,
    ),
    "mixtral": _config("Mixtral", **SIZES, **MOE, num_local_experts=4),
    "qwen3-moe": _config(
        "Qwen3Moe", **SIZES, **MOE, head_dim=16, num_experts=4, moe_intermediate_size=64
    ),
    "gpt-oss": _config(
        "GptOss", **SIZES, **MOE, head_dim=16, num_local_experts=4, sliding_window=16
    ),
    "stablelm": _config("StableLm", **SIZES),
    "olmoe": _config("Olmoe", **SIZES, **MOE, num_experts=4),
    "qwen2-moe": _config(
        "Qwen2Moe",
        **SIZES,
        **MOE,
        num_experts=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=2,
    ),
    "deepseek-v3": _config(
        "DeepseekV3",
        **(SIZES | {"num_hidden_layers": 3, "num_key_value_heads": 4}),
        **MOE,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
}
"""Family -> its config; every family of docs/doctrine.md, section 3, tied heads and multimodal included, and
some that have no reader, so that their layers are read from the built model."""
MOE_FAMILIES = ("mixtral", "qwen3-moe", "gpt-oss", "olmoe", "qwen2-moe", "deepseek-v3")


def tiny_of(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A frozen random model of a family; the same weights every time."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    kind = transformers.AutoModelForImageTextToText if family == "gemma3" else None
    model = (kind or transformers.AutoModelForCausalLM).from_config(config)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    return model.to(dtype).requires_grad_(False).eval()
