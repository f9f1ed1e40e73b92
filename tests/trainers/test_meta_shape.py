"""Shapes of architectures that search_spaces does not know, against the real model's parameters."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    OPTConfig,
    StableLmConfig,
)

from search_spaces.architecture import ModelShape
from tests.trainers.families import tiny_of
from trainers.adapters import inject
from trainers.meta_shape import shape_of_config
from trainers.slots import AdapterSpec


def test_shape_of_config_unknown_architecture_is_read_from_the_built_model():
    config = StableLmConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    shape = shape_of_config(config)
    # By hand, per layer and unit of rank: q 128, k and v 96 each, o 128; gate, up, down 192 each.
    assert shape.lora_params(1, ("attn", "mlp")) == 3 * (128 + 96 + 96 + 128 + 3 * 192)
    assert shape.lora_params(2, ("unembed",)) == 2 * (64 + 256)
    model = AutoModelForCausalLM.from_config(config)
    assert shape.num_params == sum(p.numel() for p in model.parameters())


def test_shape_of_config_opt_injects_every_layer_it_counts():
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=256,
        word_embed_proj_dim=64,
    )
    shape = shape_of_config(config)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    spec = AdapterSpec(lora_rank=4, lora_alpha=32, linears=shape.resolve_target(("attn", "mlp")))
    count = sum(p.numel() for p in inject(model, [spec]).slots[0].parameters.values())
    assert count == shape.lora_params(4, ("attn", "mlp")) == 4 * 2 * (4 * 128 + 2 * 192)


def test_shape_of_config_known_architecture_is_read_from_the_config():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    assert shape_of_config(config) == ModelShape.from_config(config.to_dict())


def test_shape_of_config_finds_fused_experts_and_leaves_the_routers():
    # Left out without a word, most of the model would stay frozen (field cases B01 and B02).
    config = tiny_of("qwen2-moe").config
    shape = shape_of_config(config)
    assert shape.is_from_model
    assert (shape.num_experts, shape.num_active_experts) == (4, 2)
    assert shape.components == ("attn", "mlp", "experts", "unembed")
    names = {linear.name for linear in shape.linears}
    assert {"experts.gate_up_proj", "experts.down_proj", "mlp.shared_expert.gate_proj"} <= names
    assert not [name for name in names if name.endswith((".gate", "expert_gate"))]
    # One sparse layer, 4 experts of width 64, rank 8 / 2 active: the fused scheme, 2H + 3m.
    assert shape.lora_params(8, "experts") == 4 * 4 * (2 * 64 + 3 * 64)
    assert shape.num_params == sum(p.numel() for p in tiny_of("qwen2-moe").parameters())


def test_shape_of_config_of_experts_that_cannot_be_trained_is_refused():
    config = Llama4TextConfig(
        hidden_size=64,
        intermediate_size=128,
        intermediate_size_mlp=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        num_local_experts=4,
        pad_token_id=0,
    )
    with pytest.raises(ValueError, match=r"experts of this kind cannot be trained by this version"):
        shape_of_config(config)
