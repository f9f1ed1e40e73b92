"""The cost of a step: FLOPs against hand sums over the model's shape, bytes against its parameters."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from search_spaces.architecture import LinearShape, ModelShape
from trainers import step_cost
from trainers.base_model import load_base
from trainers.base_spec import BaseSpec
from trainers.step_cost import (
    SHIPPED_BASE,
    StepBench,
    StepSpec,
    held_bytes,
    measure_step,
    peak_bytes,
    reset_peak,
    write_random_weights,
)

CPU = torch.device("cpu")
WIDE_MLP = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
SPEC = StepSpec(
    model=str(SHIPPED_BASE),
    lora_rank=0,
    lora_alpha=32.0,
    target=("attn", "mlp", "experts", "unembed"),
    quantization="none",
    dtype="fp32",
    rows=3,
    tokens=16,
    num_threads=1,
    warmup_steps=1,
    min_steps=1,
    sample_s=1e-9,
)
INPUTS_OF_FIRST_LAYER = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(params=["shipped", "untied, wide MLP"])
def model(request, tmp_path) -> str:
    """A folder with weights."""
    return str(SHIPPED_BASE) if request.param == "shipped" else str(random_model(tmp_path / "m"))


def random_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(WIDE_MLP))
    write_random_weights(folder)
    return folder


def bench_of(spec: StepSpec, device: torch.device = CPU) -> StepBench:
    base = BaseSpec(model=spec.model, quantization=spec.quantization, dtype=spec.dtype)
    return StepBench(load_base(base, device), spec)


def sides(linears: list[LinearShape]) -> int:
    return sum((one.in_features + one.out_features) * one.count for one in linears)


def expected_flops(shape: ModelShape, spec: StepSpec) -> dict[str, int]:
    """By hand. Of a weight and token: 2 forward, 2 for the input's gradient, and 2 for its own if it is
    trained; of a low-rank weight all six. The frozen first layer's q, k and v pass no gradient on."""
    layers = [one for one in shape.linears if one.component != "unembed"]
    head = [one for one in shape.linears if one.component == "unembed"]
    rank, tokens, predicted = (
        spec.lora_rank,
        spec.rows * spec.tokens,
        spec.rows * (spec.tokens - 1),
    )
    first = [one for one in layers if one.name in INPUTS_OF_FIRST_LAYER]
    weights = sum(one.num_params for one in layers)
    vocabulary = sum(one.num_params for one in head)
    if rank == 0:
        return {"linears": 6 * weights * tokens, "head": 6 * vocabulary * predicted}
    spared = sum(one.num_params // one.count + rank * one.in_features for one in first)
    return {
        "linears": (4 * weights + 6 * rank * sides(layers) - 2 * spared) * tokens,
        "head": (4 * vocabulary + 6 * rank * sides(head)) * predicted,
    }


def attention_products(shape: ModelShape, spec: StepSpec) -> int:
    """FLOPs of one product of all queries with all keys, in all layers."""
    queries = next(one for one in shape.linears if one.name == "q_proj")
    return 2 * spec.rows * spec.tokens**2 * queries.out_features * queries.count


@pytest.mark.parametrize("lora_rank", [0, 1, 8, 128])
def test_flops_of_a_step_equal_the_hand_sum_over_the_shape(model, lora_rank):
    spec = replace(SPEC, model=model, lora_rank=lora_rank)
    shape, counted = ModelShape.from_config(model), bench_of(spec).flops()
    expected = expected_flops(shape, spec)
    assert counted["linears"] == expected["linears"]
    assert counted["head"] == expected["head"]
    # Two products forward; five in the fused kernel's backward, which computes the scores again.
    assert counted["attention"] == 7 * attention_products(shape, spec)
    assert counted["step"] == counted["linears"] + counted["attention"] + counted["head"]


def test_flops_of_the_head_in_chunks_are_all_counted(monkeypatch):
    spec = replace(SPEC, lora_rank=4)
    whole = bench_of(spec).flops()
    monkeypatch.setattr("trainers.head.CHUNK_BYTES", {"cpu": 4 * 3072 * 5, "cuda": 1})
    bench = bench_of(spec)
    assert bench.head.max_positions == 5
    assert bench.flops() == whole


def test_flops_of_attention_by_its_parts_are_what_torch_itself_counts():
    model = AutoModelForCausalLM.from_pretrained(
        SHIPPED_BASE, dtype=torch.float32, attn_implementation="eager"
    )
    shape = ModelShape.from_config(SHIPPED_BASE)
    # Plain batched products, for which torch has formulas: two forward, four backward.
    assert StepBench(model, SPEC).flops()["attention"] == 6 * attention_products(shape, SPEC)


@pytest.mark.parametrize("name", step_cost.ATTENTION_OPS)
def test_flops_of_shared_key_heads_are_those_of_heads_of_their_own(monkeypatch, name):
    def equal_heads_only(*shapes: tuple[int, ...]) -> int:  # what torch 2.11 does
        assert len({shape[1] for shape in shapes}) == 1
        return len(shapes)

    monkeypatch.setattr(step_cost, "sdpa_flop_count", equal_heads_only)
    monkeypatch.setattr(step_cost, "sdpa_backward_flop_count", equal_heads_only)
    formulas, query, key = step_cost.op_formulas(), (3, 8, 16, 64), (3, 2, 16, 64)
    assert formulas[getattr(torch.ops.aten, name)](query, key, key) == 3
    assert formulas[getattr(torch.ops.aten, f"{name}_backward")](query, query, key, key) == 4


def test_flops_on_nf4_are_those_on_the_plain_base():
    pytest.importorskip("bitsandbytes")
    plain, nf4 = (
        bench_of(replace(SPEC, lora_rank=8, quantization=quantization)).flops()
        for quantization in ("none", "nf4")
    )
    assert nf4 == plain


def test_flops_counted_before_a_step_leave_it_as_it_was():
    losses = []
    for counts in (False, True):
        bench = bench_of(replace(SPEC, lora_rank=4))
        if counts:
            bench.flops()
        bench.step()
        losses.append((bench.run.grad_norm, bench.run.since_report))
    assert losses[0] == losses[1]


def test_step_trains_the_whole_batch_once():
    bench = bench_of(replace(SPEC, lora_rank=4))
    whole, part = bench.step()
    assert bench.run.steps == 1
    assert (bench.run.tokens, bench.run.loss_tokens) == (48, 45)
    assert 0 < part < whole


@pytest.mark.parametrize(
    ("min_steps", "sample_s", "num_steps"), [(4, 1, 4), (1, 7, 3), (1, 9, 3), (1, 9.5, 4)]
)
def test_sample_lasts_as_many_steps_and_seconds_as_asked(
    monkeypatch, min_steps, sample_s, num_steps
):
    clock = itertools.count()
    monkeypatch.setattr("trainers.step_cost.now", lambda device: next(clock))
    bench = bench_of(
        replace(SPEC, lora_rank=1, warmup_steps=2, min_steps=min_steps, sample_s=sample_s)
    )
    # The clock is read before and after the step, and before and after its forward and backward.
    assert bench.sample() == {
        "step": 3,
        "forward_backward": 1,
        "update": 2,
        "num_steps": num_steps,
    }
    assert bench.run.steps == 2 + num_steps


def test_counted_bytes_of_full_finetuning_are_four_numbers_a_parameter():
    num_params = ModelShape.from_config(SHIPPED_BASE).num_params
    found = bench_of(SPEC).counted_bytes()
    rotary = found["base"] - 4 * num_params
    assert rotary == 2 * 16 * 4  # two tables of half a head's 32 frequencies
    assert found["adapter"] == 0
    assert found["gradients"] == 4 * num_params
    assert found["optimizer"] == 8 * num_params


def test_counted_bytes_of_an_adapter_are_four_numbers_a_lora_parameter():
    spec = replace(SPEC, lora_rank=8)
    num_params = ModelShape.from_config(SHIPPED_BASE).lora_params(8)
    found = bench_of(spec).counted_bytes()
    assert found["base"] == bench_of(SPEC).counted_bytes()["base"]
    assert found["adapter"] == found["gradients"] == 4 * num_params
    assert found["optimizer"] == 8 * num_params


def test_counted_bytes_of_nf4_hold_four_bits_and_the_constants_of_each_block():
    pytest.importorskip("bitsandbytes")
    shape = ModelShape.from_config(SHIPPED_BASE)
    layers = [one for one in shape.linears if one.component != "unembed"]
    weights, matrices = sum(one.num_params for one in layers), sum(one.count for one in layers)
    plain, nf4 = (
        bench_of(replace(SPEC, lora_rank=1, quantization=q)).counted_bytes()["base"]
        for q in ("none", "nf4")
    )
    packed = weights // 2 + weights // 64  # one byte a block of 64, itself quantized
    constants = nf4 - (plain - 4 * weights) - packed
    # A matrix's own: a scale for 256 blocks, an offset, at most two code books of 16 and 256 numbers.
    assert 4 * 2 * matrices <= constants <= 4 * (16 + 256 + 1 + 6) * matrices


def test_peak_bytes_after_a_tensor_is_freed_still_hold_it():
    before = held_bytes(CPU)
    assert before is not None, "tests run on Linux"
    reset_peak(CPU)
    torch.ones(16 << 20).sum()
    highest = peak_bytes(CPU)
    assert highest is not None
    # The kernel counts pages by the handful.
    assert 63 << 20 < highest - before < 72 << 20
    held_bytes(CPU)  # gives back what the C library keeps (trainers/cpu.py tells it to)
    reset_peak(CPU)
    later = peak_bytes(CPU)
    assert later is not None
    assert later - before < 8 << 20


def test_measure_step_of_a_config_alone_makes_weights_and_holds_them_in_the_peak(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(WIDE_MLP | {"vocab_size": 60_000}))
    found = measure_step(replace(SPEC, model=str(folder)))
    held = sum(found["bytes"][part] for part in ("base", "adapter", "gradients", "optimizer"))
    assert held > 16 * 2 * 64 * 60_000
    assert found["bytes"]["peak"] > held
    weights = (folder / "model.safetensors").read_bytes()
    write_random_weights(folder)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_write_random_weights_beside_weights_that_are_there_writes_nothing(tmp_path):
    folder = random_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"mine")
    write_random_weights(folder)
    assert (folder / "model.safetensors").read_bytes() == b"mine"


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_flops_on_a_gpu_equal_the_hand_sum_over_the_shape(dtype, quantization):
    spec = replace(SPEC, lora_rank=8, dtype=dtype, quantization=quantization)
    counted = bench_of(spec, torch.device("cuda", 0)).flops()
    expected = expected_flops(ModelShape.from_config(SHIPPED_BASE), spec)
    assert {part: counted[part] for part in expected} == expected
