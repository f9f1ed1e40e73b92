"""LoRA's variants, each as PEFT has it: the same logits, gradients and scales, alone and in a pack."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from search_spaces import doctrine
from tests.trainers.families import MOE_FAMILIES, tiny_of
from tests.trainers.test_families import IDS, RUN, expressible, spec_of, trainer_of
from trainers.adapters import AdaptedLayer, Pack, inject
from trainers.base_model import load_base
from trainers.base_spec import BaseSpec
from trainers.checkpoint import load_checkpoint, save_checkpoint, save_weights
from trainers.dora import adapted_norms, dense_weight, row_norms
from trainers.gradient_checkpointing import recompute_layers
from trainers.loop import Trainer
from trainers.merge import merge_adapter
from trainers.pissa import principal
from trainers.runs import Run, new_run
from trainers.slots import AdapterSpec

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to True:UserWarning",
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning",
    "ignore:.*tie_word_embeddings.*:UserWarning",
)
DENSE = ["llama-tied", "phi3", "gpt2", "gpt-neox", "falcon"]
"""Linear, fused, Conv1D, with biases, and a Linear of a class of its own."""
ALL = ["rslora", "dora", "lora_plus", "pissa", "rslora+dora+lora_plus+pissa"]


def randomise(pack: Pack, slot: int = 0) -> None:
    """Moves everything that is trained, as training would."""
    generator = torch.Generator().manual_seed(1)
    spec = pack.slots[slot].spec
    assert spec is not None
    for name, view in pack.slots[slot].parameters.items():
        noise = torch.empty(view.shape).normal_(0, 0.05, generator=generator).to(view.dtype)
        if "magnitude" in name:
            view.mul_(1 + noise)
        elif ".lora_B." in name:
            view[..., : spec.lora_rank] += noise[..., : spec.lora_rank]


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("family", DENSE)
def test_variant_is_loaded_by_peft_and_gives_the_same_logits(family, variant, tmp_path):
    model = tiny_of(family)
    with torch.no_grad():
        untouched = model(input_ids=IDS).logits
        pack = inject(model, [spec_of(model, variant=variant)])
        pack.activate([0])
        torch.testing.assert_close(model(input_ids=IDS).logits, untouched, atol=2e-3, rtol=0)
        randomise(pack)
        pack.activate([0])
        expected = model(input_ids=IDS).logits
        save_weights(pack, new_run(pack, 0, RUN), tmp_path, base_name="org/base", revision="v1")
        loaded = PeftModel.from_pretrained(tiny_of(family), str(tmp_path))
        got = loaded(input_ids=IDS).logits
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)
    assert (untouched - expected).abs().max() > 1e-2


@pytest.mark.parametrize("variant", ["rslora", "lora_plus"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_variant_on_experts_is_loaded_by_peft_and_gives_the_same_logits(family, variant, tmp_path):
    model = tiny_of(family)
    pack = inject(model, [spec_of(model, 6, expressible(family), variant=variant)])
    randomise(pack)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        save_weights(pack, new_run(pack, 0, RUN), tmp_path, base_name="org/base", revision=None)
        loaded = PeftModel.from_pretrained(tiny_of(family), str(tmp_path))
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("variant", ["dora", "pissa", "rslora+dora"])
def test_variant_that_experts_cannot_have_is_refused_and_nothing_is_adapted(variant):
    pack = Pack(tiny_of("mixtral"))
    with pytest.raises(ValueError, match="cannot be trained on fused experts"):
        pack.enter(spec_of(pack.model, variant=variant))
    assert pack.layers == {}
    pack.enter(spec_of(pack.model, target=["attn"], variant=variant))


@pytest.mark.parametrize(
    ("rank", "variant", "scale"),
    # Field case B18, the scales that PEFT was seen to have at alpha 32.
    [
        (8, "lora", 4.0),
        (8, "rslora", 11.3137),
        (64, "lora", 0.5),
        (64, "rslora", 4.0),
        (256, "lora", 0.125),
        (256, "rslora", 2.0),
        (8, "pissa", 4.0),
        (64, "rslora+pissa", 4.0),
    ],
)
def test_variant_scale_of_the_saved_json_is_that_of_the_layer(rank, variant, scale, tmp_path):
    model = tiny_of("llama")
    spec = spec_of(model, rank, ["mlp"], variant=variant)
    pack = inject(model, [spec])
    layer = next(iter(pack.layers.values()))
    assert layer.matrices is not None
    assert float(layer.matrices.scaling_S[0]) == pytest.approx(scale, abs=1e-4)
    save_weights(pack, new_run(pack, 0, RUN), tmp_path, base_name="b", revision=None)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    root = 0.5 if told["use_rslora"] else 1
    assert told["lora_alpha"] / told["r"] ** root == pytest.approx(scale, abs=1e-4)
    peft = PeftModel.from_pretrained(tiny_of("llama"), str(tmp_path))
    (found,) = {m.scaling["default"] for m in peft.modules() if isinstance(m, LoraLayer)}
    assert found == pytest.approx(scale, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox"])
def test_dora_gradients_are_those_of_peft(family):
    model = tiny_of(family, torch.float64)
    spec = spec_of(model, variant="dora")
    pack = inject(model, [spec])
    randomise(pack)
    reference = tiny_of(family, torch.float64)
    config = LoraConfig(
        r=spec.lora_rank,
        lora_alpha=32,
        use_dora=True,
        target_modules=[linear.name for linear in spec.linears],
        fan_in_fan_out=family == "gpt2",
    )
    peft = get_peft_model(reference, config)
    own = {
        name.replace(".default", ""): p for name, p in peft.named_parameters() if p.requires_grad
    }
    own = {name.removesuffix(".weight") if "magn" in name else name: p for name, p in own.items()}
    assert own.keys() == pack.slots[0].parameters.keys()
    with torch.no_grad():
        for name, view in pack.slots[0].parameters.items():
            own[name].copy_(view)
    weights = torch.randn(256, generator=torch.Generator().manual_seed(2)).double()
    pack.activate([0])
    for one in (model, peft):
        (one(input_ids=IDS).logits @ weights).square().mean().backward()
    for name, gradient in pack.slots[0].gradients.items():
        assert bool(gradient.any()), name
        torch.testing.assert_close(gradient, own[name].grad, rtol=1e-6, atol=1e-9)


def test_dora_norms_without_the_matrix_are_those_of_the_matrix():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(48, 32).double()
    A, B = (torch.randn(4, n, generator=generator).double() for n in (48, 32))
    expected = (layer.weight + 3 * B.T @ A).norm(dim=1)
    torch.testing.assert_close(adapted_norms(layer, row_norms(layer), A, B, 3.0), expected)


def test_pissa_holds_the_largest_triplets_and_starts_at_the_base():
    model = tiny_of("llama", torch.float64)
    untouched = model(input_ids=IDS).logits
    spec = spec_of(model, 6, variant="pissa")
    pack = inject(model, [spec])
    pack.activate([0])
    torch.testing.assert_close(model(input_ids=IDS).logits, untouched, atol=1e-9, rtol=0)
    layer = pack.layers["model.layers.0.self_attn.q_proj"]
    assert isinstance(layer, AdaptedLayer)
    assert layer.matrices is not None
    A, B = layer.matrices.A_SRI[0], layer.matrices.B_SRO[0]
    torch.testing.assert_close(B[6:].T @ A[6:], -B[:6].T @ A[:6])
    # No matrix of rank 6 leaves less of the weight; a random one, as here, has no gap in its spectrum.
    least = torch.linalg.svdvals(layer.weight)[6:].norm()
    left = (layer.weight - spec.scaling(layer.size) * B[:6].T @ A[:6]).norm()
    assert float(left / least) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(A[:6] @ A[:6].T, torch.diag((A[:6] ** 2).sum(1)))


def test_pissa_rank_beyond_a_matrix_begins_the_rest_as_lora():
    A, B = principal(torch.randn(8, 20), 12, 1.0, seed=0)
    assert (tuple(A.shape), tuple(B.shape)) == ((8, 20), (8, 8))
    model = tiny_of("llama")
    pack = inject(model, [spec_of(model, 40, ["k_proj"], variant="pissa")])  # 64 -> 32 features
    layer = pack.layers["model.layers.0.self_attn.k_proj"]
    assert layer.matrices is not None
    A, B = layer.matrices.A_SRI[0], layer.matrices.B_SRO[0]
    assert bool(A[32:40].any(1).all())
    assert not bool(B[32:40].any())
    assert not bool(B[72:].any())


def trained(model, specs, *, decay=0.0, again=False) -> tuple[Pack, list[Run], list[list[float]]]:
    if again:
        recompute_layers(model)
    pack = Pack(model)
    trainer = trainer_of(pack)
    spec = replace(RUN, weight_decay=decay, learning_rate=3e-3)
    runs = [new_run(pack, pack.enter(one), spec) for one in specs]
    losses: list[list[float]] = [[] for _ in runs]
    while active := [run for run in runs if run.status == "running"]:
        for run in trainer.advance(active):
            at = runs.index(run)
            trainer.evaluate(run, lambda _, row, at=at: losses[at].append(row.eval_loss) is None)
    return pack, runs, losses


def test_variants_in_a_pack_follow_what_they_lose_alone():
    model = tiny_of("gpt2", torch.float64)
    # Entered in this order, magnitudes come to a store that holds others already.
    specs = [spec_of(model, 4, seed=9)]
    specs += [spec_of(model, 3 + k, seed=k, variant=variant) for k, variant in enumerate(ALL)]
    specs += [spec_of(model, 2, ["attn"], seed=7, variant="dora", dropout=0.1)]
    _, _, together = trained(model, specs)
    assert all(len(losses) == 1 for losses in together)
    for spec, expected in zip(specs, together, strict=True):
        alone = trained(tiny_of("gpt2", torch.float64), [spec])[2][0]
        assert alone == pytest.approx(expected, rel=1e-9), spec.variant
    assert len({loss for (loss,) in together}) == len(specs)


def test_variants_lose_the_same_where_layers_are_computed_again():
    model = tiny_of("llama", torch.float64)
    specs = [spec_of(model, 4, seed=k, variant=variant) for k, variant in enumerate(ALL)]
    kept = trained(model, specs)[2]
    again = trained(tiny_of("llama", torch.float64), specs, again=True)[2]
    for one, other in zip(kept, again, strict=True):
        assert one == pytest.approx(other, rel=1e-12)


def test_pissa_trains_its_first_half_alone_whatever_the_weight_decay():
    model = tiny_of("llama", torch.float64)
    start = inject(tiny_of("llama", torch.float64), [spec_of(model, 4, variant="pissa")])
    before = {name: view.clone() for name, view in start.slots[0].parameters.items()}
    pack, _, _ = trained(model, [spec_of(model, 4, variant="pissa")], decay=0.1)
    for name, view in pack.slots[0].parameters.items():
        ranks = view if ".lora_A." in name else view.T
        old = before[name] if ".lora_A." in name else before[name].T
        assert torch.equal(ranks[4:], old[4:]), name
        assert bool((ranks[:4] != old[:4]).any()), name


def test_lora_plus_steps_b_faster_by_the_doctrines_ratio():
    model = tiny_of("llama", torch.float64)
    pack = inject(model, [spec_of(model, variant="lora_plus"), spec_of(model)])
    assert set(pack.slots[0].lr_factors) == {1.0, doctrine.LORA_PLUS_RATIO.value}
    assert doctrine.LORA_PLUS_RATIO.value == 16
    before = {name: view.clone() for name, view in pack.slots[0].parameters.items()}
    for slot in (0, 1):
        for gradient in pack.slots[slot].gradients.values():
            gradient.fill_(1.0)
    Trainer._optimizer_step(run := new_run(pack, 0, replace(RUN, max_grad_norm=0)), torch.ones(()))
    for name, view in run.slot.parameters.items():  # Adam's first step is the learning rate
        expected = RUN.learning_rate * (16 if ".lora_B." in name else 1)
        torch.testing.assert_close(before[name] - view, torch.full_like(view, expected))


@pytest.mark.parametrize("variant", ALL)
def test_variant_goes_on_from_its_checkpoint_in_the_same_numbers(variant, tmp_path):
    def fresh() -> tuple[Pack, Trainer, Run]:
        pack = Pack(tiny_of("llama"))
        slot = pack.enter(spec_of(pack.model, variant=variant))
        return pack, trainer_of(pack), new_run(pack, slot, replace(RUN, learning_rate=1e-3))

    pack, trainer, run = fresh()
    trainer.advance([run])
    save_checkpoint(pack, run, tmp_path / "c", base_name="b", revision=None)
    again_pack, again_trainer, again = fresh()
    assert load_checkpoint(again, tmp_path / "c")
    for _ in range(2):
        trainer.advance([run])
        again_trainer.advance([again])
    assert run.examples == again.examples == 18
    for name, view in run.slot.parameters.items():
        assert torch.equal(view, again.slot.parameters[name]), name
    pack.leave(0)
    pack.eject()
    assert torch.equal(pack.model(input_ids=IDS).logits, tiny_of("llama")(input_ids=IDS).logits)
    again_pack.eject()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("variant", ["rslora", "dora", "pissa", "rslora+dora+pissa"])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_variant_merged_gives_the_logits_of_base_and_adapter(
    family, variant, quantization, tmp_path
):
    tiny_of(family).save_pretrained(tmp_path / "base")
    base = BaseSpec(model=str(tmp_path / "base"), quantization=quantization, dtype="fp32")
    model = load_base(base)
    pack = inject(model, [spec := spec_of(model, variant=variant)])
    randomise(pack)
    (tmp_path / "a").mkdir()
    run = new_run(pack, 0, RUN)
    with torch.no_grad():
        pack.activate([0])
        expected = model(input_ids=IDS).logits
        save_weights(pack, run, tmp_path / "a", base_name="b", revision=None)
    merged = merge_adapter(base, spec, tmp_path / "a", tmp_path / "merged")
    assert merged.logits_error <= 1e-4
    plain = BaseSpec(model=str(tmp_path / "merged"), quantization="none", dtype="fp32")
    with torch.no_grad():
        got = load_base(plain)(input_ids=IDS).logits
    torch.testing.assert_close(got, expected, atol=5e-4, rtol=0)


def test_dense_weight_of_four_bits_is_what_they_stand_for(tmp_path):
    tiny_of("llama").save_pretrained(tmp_path)
    base = BaseSpec(model=str(tmp_path), quantization="nf4", dtype="fp32")
    name = "model.layers.0.mlp.up_proj"
    four_bits = load_base(base).get_submodule(name)
    dequantized = load_base(replace(base, keep_dequantized=True)).get_submodule(name)
    torch.testing.assert_close(dense_weight(four_bits), dequantized.weight)
    A, B = torch.randn(4, 64), torch.randn(4, 128)
    norms = [adapted_norms(one, row_norms(one), A, B, 0.5) for one in (four_bits, dequantized)]
    torch.testing.assert_close(*norms)


def test_variant_whose_base_is_sharded_is_refused():
    pack = Pack(tiny_of("llama"))
    pack.sharding = object()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="needs whole weights on each worker"):
        pack.enter(spec_of(pack.model, variant="dora"))


def test_adapter_spec_holds_what_a_saved_adapter_says():
    spec = AdapterSpec(lora_rank=16, lora_alpha=32, linears=())
    assert (spec.held_rank, spec.held_alpha) == (16, 32)
    assert (
        replace(spec, variant="pissa").held_rank,
        replace(spec, variant="pissa").held_alpha,
    ) == (32, 64)
    root = replace(spec, variant="rslora+pissa").held_alpha
    assert root == pytest.approx(32 * 2**0.5)
