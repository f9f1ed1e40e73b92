"""Shapes against the models that transformers builds on the meta device."""

import json
import re
import warnings
from collections import Counter

import pytest

from search_spaces.architecture import ModelShape
from search_spaces.families import known_model_types

NOT_LANGUAGE = ("vision_tower", "multi_modal_projector")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
SMALL_GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 128, "n_positions": 32}
SMALL_MPT = {"d_model": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 128, "expansion_ratio": 3}
VARIANTS = [
    *(
        {"model_type": name, **SMALL}
        for name in known_model_types()
        if name not in ("gpt2", "mpt", "gemma3")
    ),
    {"model_type": "gemma3", "text_config": SMALL},
    {"model_type": "gemma3", "text_config": SMALL, "tie_word_embeddings": False},
    {"model_type": "gpt2", **SMALL_GPT2},
    {"model_type": "gpt2", **SMALL_GPT2, "n_inner": 80, "tie_word_embeddings": False},
    {"model_type": "mpt", **SMALL_MPT},
    {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True},
    {"model_type": "llama", **SMALL, "head_dim": 32, "num_key_value_heads": None},
    {"model_type": "qwen3", **SMALL, "attention_bias": True, "head_dim": 16},
    {"model_type": "qwen3_moe", **SMALL, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    {"model_type": "gpt_oss", **SMALL, "attention_bias": False, "head_dim": 16},
    {"model_type": "gpt_neox", **SMALL, "attention_bias": False, "tie_word_embeddings": True},
    {"model_type": "falcon", **SMALL, "bias": True, "parallel_attn": False},
    {"model_type": "falcon", **SMALL, "multi_query": False, "ffn_hidden_size": 80},
    {"model_type": "falcon", **SMALL, "new_decoder_architecture": True, "num_kv_heads": 2},
    {
        "model_type": "falcon",
        **SMALL,
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1,
    },
]


def _without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


# Keys left out take the config class's default; widths must stay divisible by the heads.
DEFAULTS = [
    _without({"model_type": name, **SMALL}, key)
    for name in ("llama", "mistral", "qwen2", "gemma2", "phi3", "mixtral", "qwen3_moe", "gpt_oss")
    for key in ("num_key_value_heads", "intermediate_size", "vocab_size", "num_experts_per_tok")
    if not (name in ("gpt_oss", "mistral", "mixtral") and key == "num_key_value_heads")
]


def _built(config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            parsed = transformers.AutoConfig.for_model(**config)
            parsed.pad_token_id = None  # phi3's default lies outside a small vocabulary
            return transformers.AutoModelForCausalLM.from_config(parsed)


def _matrices(model):
    """(path without numbers, in, out) of all that LoRA can adapt, counted."""
    import torch
    from transformers.pytorch_utils import Conv1D

    counts = Counter()
    for name, module in model.named_modules():
        path = re.sub(r"\.\d+\b", "", name)
        if isinstance(module, torch.nn.Linear):
            counts[path, module.in_features, module.out_features] += 1
        elif isinstance(module, Conv1D):
            counts[path, module.nx, module.nf] += 1
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            experts, first, second = parameter.shape
            # Mixtral and Qwen3 store (experts, out, in), gpt-oss (experts, in, out).
            sizes = (first, second) if model.config.model_type == "gpt_oss" else (second, first)
            counts[re.sub(r"\.\d+\b", "", name), *sizes] += experts
    return {key: n for key, n in counts.items() if not any(part in key[0] for part in NOT_LANGUAGE)}


def _assert_same(config):
    model, shape = _built(config), ModelShape.from_config(config)
    matrices = _matrices(model)
    for linear in shape.linears:
        sizes = (linear.in_features, linear.out_features)
        matching = [
            key
            for key in matrices
            if (key[0] == linear.name or key[0].endswith(f".{linear.name}")) and key[1:] == sizes
        ]
        assert sum(matrices[key] for key in matching) == linear.count, linear
    total = sum(n * (inputs + outputs) for (_, inputs, outputs), n in matrices.items())
    assert sum(x.count * (x.in_features + x.out_features) for x in shape.linears) == total
    assert shape.num_params == sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not any(part in name for part in NOT_LANGUAGE)
    )


def _label(config):
    return "-".join([config["model_type"], *(k for k in config if k not in SMALL)][:4])


@pytest.mark.parametrize("config", VARIANTS, ids=_label)
def test_shape_small_variant_equals_built_model(config):
    _assert_same(config)


@pytest.mark.parametrize("config", DEFAULTS, ids=lambda c: f"{c['model_type']}-{len(c)}")
def test_shape_left_out_key_takes_the_config_class_default(config):
    _assert_same(config)


def test_shape_every_shared_model_equals_built_model(shared):
    files = sorted((shared / "models").glob("*.json"))
    assert len(files) >= 19
    for file in files:
        _assert_same(json.loads(file.read_text()))
