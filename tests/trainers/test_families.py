"""Every family, every adapter kind: counted as its shape says, all of it trained, alone as in a pack, and read
back by PEFT."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.trainers.families import CONFIGS, MOE_FAMILIES, tiny_of
from tests.trainers.tiny import random_rows
from trainers.adapters import Pack, inject
from trainers.base_model import load_base, nf4_layer_names
from trainers.base_spec import BaseSpec
from trainers.batches import RowSource
from trainers.checkpoint import (
    ADAPTER_FILE,
    load_checkpoint,
    lora_config,
    save_checkpoint,
    save_weights,
)
from trainers.composer import ForwardLimits
from trainers.experts import from_peft, peft_shape, to_peft
from trainers.gate import require_expressible
from trainers.head import check_head
from trainers.loop import Trainer
from trainers.meta_shape import shape_of_config
from trainers.runs import Run, RunSpec, new_run
from trainers.slots import AdapterSpec

# PEFT warns of each Linear head beside Conv1D layers, and that experts have a rank of their own.
pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to True:UserWarning",
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning",
    "ignore:.*tie_word_embeddings.*:UserWarning",
)
CPU = torch.device("cpu")
IDS = torch.arange(5, 69).view(2, 32) * 3 % 256
RUN = RunSpec(learning_rate=1e-2, global_batch_size=6, num_examples=18, eval_every=18)


def spec_of(model, lora_rank: int = 4, target=None, **changes) -> AdapterSpec:
    shape = shape_of_config(model.config)
    linears = shape.resolve_target(target or shape.components)
    return AdapterSpec(lora_rank=lora_rank, lora_alpha=32, linears=linears, **changes)


def trainer_of(pack: Pack) -> Trainer:
    rows, held_out = random_rows(40), random_rows(3, seed=1)
    return Trainer(
        pack,
        RowSource(rows, 0, CPU),
        RowSource(held_out, 0, CPU),
        limits=ForwardLimits(max_tokens=1 << 20),
    )


def expressible(family: str) -> tuple[str, ...] | None:
    """The target that PEFT can be told of, where it is not everything."""
    return ("attn", "experts", "unembed") if family == "deepseek-v3" else None


def randomise(pack: Pack, slot: int = 0) -> None:
    """Gives every B values, as training would."""
    generator = torch.Generator().manual_seed(1)
    for name, view in pack.slots[slot].parameters.items():
        if ".lora_B." in name:
            view.copy_(torch.empty(view.shape).normal_(0, 0.05, generator=generator))


@pytest.mark.parametrize("family", CONFIGS)
def test_family_count_is_the_shapes_and_every_matrix_gets_a_gradient(family):
    model = tiny_of(family)
    shape = shape_of_config(model.config)
    pack = inject(model, [spec_of(model)])
    check_head(pack)
    slot = pack.slots[0]
    assert sum(view.numel() for view in slot.parameters.values()) == shape.lora_params(4)
    randomise(pack)
    trainer = trainer_of(pack)
    batch = RowSource(random_rows(40), 0, CPU).batch([np.arange(40)], 1 << 16)
    trainer.head.train_nats(batch, (0,), [1.0])
    idle = [name for name, grad in slot.gradients.items() if not bool(grad.any())]
    assert idle == []
    if family in MOE_FAMILIES:  # every expert, not some of them
        (expert,) = {g.shape[0] for g in slot.gradients.values() if g.ndim == 3}
        assert expert == shape.num_experts
        for grad in (g for g in slot.gradients.values() if g.ndim == 3):
            assert bool(grad.flatten(1).any(1).all())


@pytest.mark.parametrize("family", CONFIGS)
def test_family_adapter_in_a_pack_follows_what_it_loses_alone(family):
    def specs(model) -> list[AdapterSpec]:
        return [
            spec_of(model, 4, seed=0),
            spec_of(model, 2, ["attn"], seed=1),
            spec_of(model, 8, [c for c in spec_components(model) if c != "attn"], seed=2),
        ]

    def losses(chosen: list[int]) -> dict[int, list[float]]:
        model = tiny_of(family, torch.float64)
        pack = Pack(model)
        trainer = trainer_of(pack)
        runs = {k: new_run(pack, pack.enter(specs(model)[k]), RUN) for k in chosen}
        seen: dict[int, list[float]] = {k: [] for k in chosen}
        while any(run.status == "running" for run in runs.values()):
            active = [run for run in runs.values() if run.status == "running"]
            for run in trainer.advance(active):
                key = next(k for k, one in runs.items() if one is run)
                trainer.evaluate(
                    run, lambda _, row, key=key: seen[key].append(row.eval_loss) is None
                )
        return seen

    together = losses([0, 1, 2])
    for key in range(3):
        (expected,) = losses([key]).values()
        assert len(expected) == 1
        assert together[key] == pytest.approx(expected, rel=1e-6)


def spec_components(model) -> tuple[str, ...]:
    return shape_of_config(model.config).components


@pytest.mark.parametrize("family", CONFIGS)
def test_family_adapter_is_loaded_by_peft_and_gives_the_same_logits(family, tmp_path):
    model = tiny_of(family)
    pack = inject(model, [spec_of(model, target=expressible(family))])
    randomise(pack)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        save_weights(pack, new_run(pack, 0, RUN), tmp_path, base_name="org/base", revision="v1")
        base = tiny_of(family)
        untouched = base(input_ids=IDS).logits
        loaded = PeftModel.from_pretrained(base, str(tmp_path))
        got = loaded(input_ids=IDS).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert (untouched - expected).abs().max() > 1e-2
    shape = shape_of_config(model.config)
    saved = load_file(tmp_path / ADAPTER_FILE)
    target = expressible(family) or shape.components
    assert sum(tensor.numel() for tensor in saved.values()) == shape.lora_params(4, target)


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize(
    "target", [("experts",), ("experts.down_proj",), ("attn", "experts.gate_up_proj")]
)
def test_family_experts_by_name_are_loaded_by_peft(family, target, tmp_path):
    model = tiny_of(family)
    pack = inject(model, [spec_of(model, target=target)])
    randomise(pack)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        save_weights(pack, new_run(pack, 0, RUN), tmp_path, base_name="org/base", revision=None)
        loaded = PeftModel.from_pretrained(tiny_of(family), str(tmp_path))
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_family_with_experts_goes_on_from_its_checkpoint_in_the_same_numbers(family, tmp_path):
    def trained(until: int, run: Run, trainer: Trainer) -> Run:
        while run.examples < until:
            trainer.advance([run])
        return run

    def fresh() -> tuple[Pack, Trainer, Run]:
        pack = Pack(tiny_of(family))
        slot = pack.enter(spec_of(pack.model, target=expressible(family)))
        return pack, trainer_of(pack), new_run(pack, slot, RUN)

    pack, trainer, run = fresh()
    trained(6, run, trainer)
    save_checkpoint(pack, run, tmp_path / "c", base_name="b", revision=None)
    trained(18, run, trainer)
    again_pack, again_trainer, again = fresh()
    assert load_checkpoint(again, tmp_path / "c")
    assert again.examples == 6
    trained(18, again, again_trainer)
    for name, view in run.slot.parameters.items():
        assert torch.equal(view, again.slot.parameters[name]), name
    pack.eject()
    again_pack.eject()
    assert torch.equal(pack.model(input_ids=IDS).logits, tiny_of(family)(input_ids=IDS).logits)


LLAMA_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3-moe", "gpt-oss", "olmoe", "phi3", "gpt2", "falcon"]
)
def test_family_without_the_layers_of_a_name_list_is_refused_and_not_half_trained(family):
    # Field cases B01 and B13: elsewhere such a list trains attention alone, or two layers of four.
    with pytest.raises(ValueError, match=r"target '\w+' matches no layer"):
        spec_of(tiny_of(family), target=LLAMA_NAMES)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_family_with_experts_adapts_them_all_and_never_the_router(family):
    # Field cases B02 (gpt-oss: all-linear trains no expert) and B03 (the router is adapted too).
    model = tiny_of(family)
    pack = inject(model, [spec_of(model)])
    found = {name.partition(".layers.")[2] for name in pack.layers}
    sparse = {
        name.split(".")[2] for name, _ in tiny_of(family).named_parameters() if ".experts." in name
    }
    assert len(sparse) == (1 if family == "qwen2-moe" else 2)  # the others' first layer is dense
    for layer in sparse:
        for parameter in ("gate_up_proj", "down_proj"):
            assert f"{layer}.mlp.experts.{parameter}" in found
    assert [name for name in found if "gate." in f"{name}." or "router" in name] == []
    # The rank of each expert is rank / active, and alpha stays 32: a scale of 32 / 2.
    site = next(layer for name, layer in pack.layers.items() if name.endswith(".experts.down_proj"))
    assert site.size.rank(4) == 2
    assert pack.slots[0].spec is not None
    assert pack.slots[0].spec.scaling(site.size) == 16


def test_family_whose_dense_layers_peft_takes_for_experts_is_refused_before_it_trains():
    # Loaded, such an adapter would be another one: PEFT maps the names on the experts.
    pack = inject(tiny_of("deepseek-v3"), [spec_of(tiny_of("deepseek-v3"))])
    spec = pack.slots[0].spec
    assert spec is not None
    with pytest.raises(
        ValueError, match=r"PEFT cannot be told to adapt .*mlp\.gate_proj.* of Deepseek"
    ):
        require_expressible(pack.model, spec, lora_config(pack.model, spec, "", None))
    rest = inject(tiny_of("deepseek-v3"), [spec_of(pack.model, target=expressible("deepseek-v3"))])
    assert rest.slots[0].spec is not None
    require_expressible(
        rest.model, rest.slots[0].spec, lora_config(rest.model, rest.slots[0].spec, "", None)
    )


def test_family_rank_of_fused_experts_is_what_the_shape_says_and_not_doubled(tmp_path):
    # Field case B04: at 8 per expert PEFT's automatic conversion has 26,624 parameters a layer, ours 16,384.
    model = tiny_of("mixtral")
    pack = inject(model, [spec_of(model, 16, ["experts"])])
    save_weights(pack, new_run(pack, 0, RUN), tmp_path, base_name="org/base", revision=None)
    loaded = PeftModel.from_pretrained(tiny_of("mixtral"), str(tmp_path), is_trainable=True)
    trained = [
        p for name, p in loaded.named_parameters() if ".layers.0." in name and p.requires_grad
    ]
    assert sum(p.numel() for p in trained) == 16_384
    assert shape_of_config(model.config).lora_params(16, "experts") == 2 * 16_384


def test_family_multimodal_adapts_the_language_part_alone():
    model = tiny_of("gemma3")
    pack = inject(model, [spec_of(model)])
    assert [name for name in pack.layers if "vision" in name or "projector" in name] == []
    assert len([name for name in pack.layers if "language_model" in name]) == 14


QUANTIZABLE = [family for family in CONFIGS if family != "falcon"]


@pytest.mark.parametrize("keep_dequantized", [True, False], ids=["dequantized", "4-bit"])
@pytest.mark.parametrize("family", QUANTIZABLE)
def test_family_in_nf4_trains_every_matrix_and_is_loaded_by_peft(
    family, keep_dequantized, tmp_path
):
    tiny_of(family).save_pretrained(tmp_path / "base")
    base = BaseSpec(
        model=str(tmp_path / "base"),
        quantization="nf4",
        dtype="fp32",
        keep_dequantized=keep_dequantized,
    )
    model = load_base(base)
    # What bitsandbytes leaves whole: embeddings, head, and experts, which are no Linear layers (B07).
    quantized = nf4_layer_names(model)
    assert quantized
    assert not [name for name in quantized if ".experts." in name or name.endswith("lm_head")]
    pack = inject(model, [spec := spec_of(model, target=expressible(family))])
    shape = shape_of_config(model.config)
    target = expressible(family) or shape.components
    count = sum(view.numel() for view in pack.slots[0].parameters.values())
    assert count == shape.lora_params(spec.lora_rank, target)
    randomise(pack)
    batch = RowSource(random_rows(40), 0, CPU).batch([np.arange(40)], 1 << 16)
    trainer_of(pack).head.train_nats(batch, (0,), [1.0])
    assert [name for name, grad in pack.slots[0].gradients.items() if not bool(grad.any())] == []
    (tmp_path / "a").mkdir()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        save_weights(
            pack, new_run(pack, 0, RUN), tmp_path / "a", base_name="org/base", revision=None
        )
        loaded = PeftModel.from_pretrained(
            load_base(replace(base, keep_dequantized=True)), str(tmp_path / "a")
        )
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, atol=1e-3, rtol=0)


def test_family_whose_layers_bitsandbytes_cannot_quantize_is_refused(tmp_path):
    tiny_of("falcon").save_pretrained(tmp_path)  # its Linear layers are of a class of their own
    with pytest.raises(ValueError, match=r"nf4 reached no layer of .*; set quantization: none"):
        load_base(BaseSpec(model=str(tmp_path), quantization="nf4", dtype="fp32"))


def test_to_peft_and_back_is_what_it_was_and_laid_out_as_peft_reads_it():
    A = torch.arange(24.0).view(3, 2, 4)  # 3 experts, rank 2, 4 features
    B = torch.arange(30.0).view(3, 2, 5)
    for name, view in (("x.lora_A.weight", A), ("x.lora_B.weight", B)):
        saved = to_peft(name, view)
        assert tuple(saved.shape) == peft_shape(name, view.shape)
        assert torch.equal(from_peft(name, saved, view.shape), view)
    # ParamWrapper.get_delta_weight: A.reshape(E, r, in), B.reshape(out, r, E).
    delta = torch.einsum(
        "ore,eri->eoi",
        to_peft("x.lora_B.weight", B).reshape(5, 2, 3),
        to_peft("x.lora_A.weight", A).reshape(3, 2, 4),
    )
    assert torch.equal(delta, torch.einsum("ero,eri->eoi", B, A))
