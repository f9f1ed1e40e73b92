"""Injection, coverage and what PEFT reads back."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

from search_spaces.architecture import LinearShape, ModelShape
from tests.trainers.tiny import tiny_model
from trainers.adapters import inject
from trainers.checkpoint import save_weights
from trainers.runs import RunSpec, new_run
from trainers.slots import AdapterSpec

IDS = torch.tensor([[5, 17, 200, 33, 9, 81, 3, 44]])
RUN_SPEC = RunSpec(learning_rate=1e-3, global_batch_size=1, num_examples=1, eval_every=1)


def spec_for(model, lora_rank=8, target=("attn", "mlp", "unembed"), **changes) -> AdapterSpec:
    shape = ModelShape.from_config(model.config.to_dict())
    linears = shape.resolve_target(target)
    return AdapterSpec(lora_rank=lora_rank, lora_alpha=32, linears=linears, **changes)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=64)
    return GPT2LMHeadModel(config).requires_grad_(False).eval()


def phi3() -> Phi3ForCausalLM:
    torch.manual_seed(0)
    config = Phi3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        pad_token_id=0,
    )
    return Phi3ForCausalLM(config).requires_grad_(False).eval()


def randomise(pack) -> None:
    """Gives every B values, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in pack.slots[0].parameters.items():
            if ".lora_B." in name:
                parameter.normal_(0, 0.02)


@pytest.mark.parametrize(
    ("build", "target", "expected"),
    [
        (lambda: tiny_model(torch.float32), ("attn", "mlp"), 16_384),  # FIELD E01
        (gpt2, ("attn", "mlp"), 16_384),  # FIELD B12: Conv1D
        (phi3, ("attn", "mlp"), 13_312),  # FIELD B13: fused qkv and gate_up
    ],
)
def test_inject_rank_8_all_linear_has_the_published_number_of_parameters(build, target, expected):
    model = build()
    pack = inject(model, [spec_for(model, target=target)])
    assert sum(p.numel() for p in pack.slots[0].parameters.values()) == expected


@pytest.mark.parametrize("build", [lambda: tiny_model(torch.float32), gpt2, phi3])
def test_inject_all_targets_counts_what_the_shape_says(build):
    model = build()
    shape = ModelShape.from_config(model.config.to_dict())
    pack = inject(model, [spec_for(model, lora_rank=3)])
    assert sum(p.numel() for p in pack.slots[0].parameters.values()) == shape.lora_params(3)


# PEFT warns of each GPT-2 head: fan_in_fan_out is one flag for Conv1D and Linear layers alike.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning")
@pytest.mark.parametrize(
    ("build", "reload"),
    [
        (lambda: tiny_model(torch.float32), lambda: tiny_model(torch.float32)),
        (
            lambda: tiny_model(torch.float32, tie_word_embeddings=True),
            lambda: tiny_model(torch.float32, tie_word_embeddings=True),
        ),
        (gpt2, gpt2),
        (phi3, phi3),
    ],
    ids=["untied", "tied", "gpt2", "phi3"],
)
def test_saved_adapter_loaded_by_peft_gives_the_same_logits(build, reload, tmp_path):
    model = build()
    pack = inject(model, [spec_for(model)])
    randomise(pack)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        save_weights(
            pack, new_run(pack, 0, RUN_SPEC), tmp_path, base_name="org/base", revision="v1"
        )
        base = reload()
        untouched = base(input_ids=IDS).logits
        loaded = PeftModel.from_pretrained(base, str(tmp_path))(input_ids=IDS).logits
    torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=0)
    assert (untouched - expected).abs().max() > 1e-2
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 32, False)
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v1")


def test_eject_restores_the_base():
    model = tiny_model(torch.float32)
    before = model(input_ids=IDS).logits
    pack = inject(model, [spec_for(model)])
    randomise(pack)
    assert not torch.equal(model(input_ids=IDS).logits, before)
    pack.eject()
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_inject_fresh_adapter_leaves_the_logits_as_they_are():
    model = tiny_model(torch.float32)
    before = model(input_ids=IDS).logits
    inject(model, [spec_for(model)])
    assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        (
            LinearShape(name="w1", in_features=64, out_features=8, component="mlp", count=2),
            "matched 0",
        ),
        (
            LinearShape(name="q_proj", in_features=64, out_features=64, component="attn", count=3),
            "match 3 layers",
        ),
        (
            LinearShape(name="q_proj", in_features=64, out_features=32, component="attn", count=2),
            "must be 64 -> 32",
        ),
        (
            LinearShape(
                name="experts.down_proj",
                in_features=64,
                out_features=8,
                component="experts",
                count=8,
            ),
            "match 8 experts of the model, matched 0",
        ),
    ],
)
def test_inject_target_that_is_not_there_is_refused_and_injects_nothing(linear, message):
    model = tiny_model(torch.float32)
    with pytest.raises(ValueError, match=message):
        inject(model, [AdapterSpec(lora_rank=2, lora_alpha=32, linears=(linear,))])
    assert not [n for n, m in model.named_modules() if type(m).__name__ == "AdaptedLayer"]


def test_inject_same_seed_gives_the_same_start_and_another_seed_another():
    def start(seed):
        model = tiny_model(torch.float32)
        slot = inject(model, [spec_for(model, seed=seed)]).slots[0]
        return torch.cat([p.flatten() for n, p in slot.parameters.items() if ".lora_A." in n])

    assert torch.equal(start(7), start(7))
    assert not torch.equal(start(7), start(8))


def test_inject_a_is_uniform_within_one_over_root_d_in():
    model = tiny_model(torch.float32)
    slot = inject(model, [spec_for(model, lora_rank=64)]).slots[0]
    a = slot.parameters["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"]
    bound = 128**-0.5
    assert a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)  # 8,192 draws
