"""Bytes of a worker and the packs that follow from them, summed by hand."""

import math
from pathlib import Path

import pytest

from cluster.inventory import Inventory, TrialDemand, room_per_worker
from cluster.packing import FORWARD_TOKENS, WorkerMemory, pack_plan, worker_memory
from search_spaces.architecture import ModelShape

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "trainers" / "assets" / "tiny-llama" / "config.json"
LLAMA_8B = ROOT.parent / "shared" / "models" / "Llama-3.1-8B.json"
ALL = ("attn", "mlp", "unembed")
GIB = 1 << 30

TINY_LINEARS = 4 * (2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 512)  # q o, k v, gate up down
TINY_REST = 3072 * 192 + (2 * 4 + 1) * 192  # the embedding, which is the head, and the norms
TINY_PER_RANK = 4 * (2 * (192 + 192) + 2 * (192 + 64) + 3 * (192 + 512)) + (192 + 3072)

LLAMA_LINEARS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
LLAMA_REST = 2 * 128256 * 4096 + (2 * 32 + 1) * 4096  # embedding, head, norms


def nf4_bytes(num_weights: int) -> float:
    """As bitsandbytes lays it out: half a byte for a weight, a byte for 64 weights (the double
    quantized constant), and four for 256 of those."""
    return num_weights / 2 + num_weights / 64 + 4 * num_weights / (64 * 256)


def tiny_memory(**values) -> WorkerMemory:
    options = {"quantized": True, "dtype_bytes": 4, "lora_rank": 8, "target": ALL}
    options |= {"room_bytes": None} | values
    return worker_memory(ModelShape.from_config(TINY), **options)


def llama_memory(**values) -> WorkerMemory:
    if not LLAMA_8B.is_file():
        pytest.skip("needs ../shared/models/Llama-3.1-8B.json")
    options = {"quantized": True, "dtype_bytes": 2, "lora_rank": 16, "target": ALL}
    return worker_memory(
        ModelShape.from_config(LLAMA_8B), **options | {"room_bytes": 80 * GIB} | values
    )


# Bytes


def test_worker_memory_of_the_shipped_base_equals_the_sum_by_hand():
    memory = tiny_memory()
    assert TINY_LINEARS + TINY_REST == 2_164_416  # model.safetensors holds two bytes for each
    assert memory.base_bytes == pytest.approx(nf4_bytes(TINY_LINEARS) + 4 * TINY_REST, rel=1e-4)
    assert memory.dequantized_bytes == 4 * TINY_LINEARS
    assert memory.adapter_bytes == 16 * 8 * TINY_PER_RANK
    # Each layer: 14 vectors of the hidden size and 5 of the MLP's width, in fp32.
    assert memory.token_bytes == 4 * 4 * (14 * 192 + 5 * 512)


def test_worker_memory_without_quantization_is_the_plain_weights():
    memory = tiny_memory(quantized=False)
    assert memory.base_bytes == 4 * (TINY_LINEARS + TINY_REST)
    assert memory.dequantized_bytes == 0
    assert tiny_memory(quantized=False, dtype_bytes=2).base_bytes == 2 * 2_164_416


@pytest.mark.parametrize(
    ("rank", "target", "params"),
    [
        (1, ALL, TINY_PER_RANK),
        (64, ALL, 64 * TINY_PER_RANK),
        (4, ("unembed",), 4 * (192 + 3072)),
        (4, ("attn",), 4 * 4 * (2 * (192 + 192) + 2 * (192 + 64))),
    ],
)
def test_worker_memory_adapter_is_sixteen_bytes_a_parameter(rank, target, params):
    assert tiny_memory(lora_rank=rank, target=target).adapter_bytes == 16 * params


def test_worker_memory_of_llama_8b_in_nf4_is_what_its_checkpoints_weigh():
    memory = llama_memory()
    assert LLAMA_LINEARS + LLAMA_REST == 8_030_261_248  # as its model card has it
    assert memory.base_bytes == pytest.approx(nf4_bytes(LLAMA_LINEARS) + 2 * LLAMA_REST, rel=1e-4)
    # transformers' get_memory_footprint() says 5.59 GB: it leaves out the quantization's constants.
    constants = nf4_bytes(LLAMA_LINEARS) - LLAMA_LINEARS / 2
    assert memory.base_bytes - constants == pytest.approx(5.59e9, rel=1e-3)
    assert memory.dequantized_bytes == 2 * LLAMA_LINEARS
    assert llama_memory(quantized=False).base_bytes == 2 * 8_030_261_248


def test_worker_memory_of_llama_8b_adapter_and_token_equal_the_sum_by_hand():
    memory = llama_memory(lora_rank=16, target=("attn", "mlp"))
    # 41,943,040 is what PEFT prints for rank 16 on all linear layers of Llama-3-8B.
    assert memory.adapter_bytes == 16 * 41_943_040
    assert memory.token_bytes == 2 * 32 * (14 * 4096 + 5 * 14336)


# Places


def room_for(memory: WorkerMemory, adapters: int, max_tokens: int, *, dequantized: bool) -> int:
    """The smallest room whose planned part (four fifths) holds so many adapters."""
    used = memory.base_bytes + max_tokens * memory.token_bytes + adapters * memory.adapter_bytes
    used += memory.dequantized_bytes if dequantized else 0
    return math.ceil(used * 5 / 4)


@pytest.mark.parametrize("dequantized", [False, True])
@pytest.mark.parametrize("adapters", [1, 2, 7])
def test_places_at_the_boundary_of_a_byte(adapters, dequantized):
    enough = room_for(tiny_memory(), adapters, 512, dequantized=dequantized)
    for room, expected in ((enough - 1, adapters - 1), (enough, adapters), (enough + 1, adapters)):
        memory = tiny_memory(room_bytes=room)
        assert memory.places(512, dequantized=dequantized) == expected


def test_places_are_never_below_zero_and_none_where_the_room_is_not_known():
    assert tiny_memory(room_bytes=0).places(512, dequantized=False) == 0
    assert tiny_memory(room_bytes=None).places(512, dequantized=False) is None


def plan(memory: WorkerMemory, **values):
    options = {"num_trials": 100, "max_groups": 1, "max_tokens": 1024, "tokens_per_step": 256}
    return pack_plan(memory, **{**options, "measured": True, **values})


@pytest.mark.parametrize(
    ("tokens_per_step", "places"),
    [
        (1024, 2),  # one fills a forward, one more trains while it is judged
        (1023, 3),
        (512, 3),
        (256, 5),
        (1025, 2),
        (100_000, 2),
        (1, 100),  # no more than there are trials
    ],
)
def test_pack_plan_places_are_those_that_fill_a_forward_and_one(tokens_per_step, places):
    assert plan(tiny_memory(), tokens_per_step=tokens_per_step).places == places


@pytest.mark.parametrize(
    ("num_trials", "max_groups", "groups", "places"),
    [(1, 8, 1, 1), (2, 8, 2, 1), (8, 8, 8, 1), (9, 8, 8, 2), (30, 2, 2, 5), (3, 1, 1, 3)],
)
def test_pack_plan_gives_no_group_without_a_trial_and_no_place_without_one(
    num_trials, max_groups, groups, places
):
    packs = plan(tiny_memory(), num_trials=num_trials, max_groups=max_groups)
    assert (packs.num_groups, packs.places) == (groups, places)


@pytest.mark.parametrize(("spare", "places"), [(-1, 2), (0, 3), (1, 3)])
def test_pack_plan_memory_cuts_the_places_at_the_byte(spare, places):
    memory = tiny_memory(quantized=False)
    room = room_for(memory, 3, 1024, dequantized=False) + spare
    packs = plan(tiny_memory(quantized=False, room_bytes=room))
    assert packs.places == places
    assert f"memory holds {places}" in packs.reason


@pytest.mark.parametrize(("spare", "kept"), [(-1, False), (0, True), (1, True)])
def test_pack_plan_keeps_dequantized_where_two_adapters_fit_beside_it(spare, kept):
    room = room_for(tiny_memory(), 2, 1024, dequantized=True) + spare
    packs = plan(tiny_memory(room_bytes=room))
    assert packs.keep_dequantized is kept
    # What is not spent on dequantized weights is room for nearly three adapters more.
    assert packs.places == (2 if kept else 4)


def test_pack_plan_of_a_base_that_is_not_quantized_keeps_nothing_dequantized():
    assert not plan(tiny_memory(quantized=False, room_bytes=GIB)).keep_dequantized


@pytest.mark.parametrize("pack_size", [1, 2, 40])
def test_pack_plan_pack_size_is_taken_as_asked(pack_size):
    packs = plan(tiny_memory(room_bytes=GIB), pack_size=pack_size)
    assert packs.places == pack_size
    assert packs.reason.startswith(f"pack_size {pack_size}; memory holds ")


def test_pack_plan_pack_size_beyond_the_trials_is_cut_to_them():
    assert plan(tiny_memory(), num_trials=3, pack_size=8).places == 3


@pytest.mark.parametrize(("pack_size", "wanted"), [(None, 1), (4, 4)])
def test_pack_plan_that_does_not_fit_is_refused_with_every_number(pack_size, wanted):
    memory = tiny_memory(quantized=False)
    room = room_for(memory, wanted, 1024, dequantized=False)
    assert plan(tiny_memory(quantized=False, room_bytes=room), pack_size=pack_size)
    with pytest.raises(ValueError, match="a worker must hold the base") as error:
        plan(tiny_memory(quantized=False, room_bytes=room - 1), pack_size=pack_size)
    message = str(error.value)
    for part in (
        f"the base ({4 * 2_164_416:,} bytes)",
        f"{wanted} adapter(s) of {16 * 8 * TINY_PER_RANK:,} bytes",
        f"80% of its {room - 1:,} bytes hold {wanted - 1}",
        "lower lora_rank or pack_size",
    ):
        assert part in message
    assert "\n" not in message


def test_pack_plan_of_unknown_room_asks_for_what_fills_a_forward():
    packs = plan(tiny_memory(room_bytes=None))
    assert packs.places == 5
    assert "memory not known" in packs.reason
    assert not packs.keep_dequantized  # nobody knows whether there is room


@pytest.mark.parametrize(
    ("measured", "text"), [(True, "(measured)"), (False, "(not measured here yet)")]
)
def test_pack_plan_says_whether_the_forward_was_measured(measured, text):
    packs = plan(tiny_memory(), measured=measured, max_tokens=FORWARD_TOKENS["cpu"])
    assert f"8 fill a forward of 2,048 tokens {text}" in packs.reason
    assert packs.max_tokens == 2048


def test_pack_plan_of_llama_8b_on_80_gib_is_bounded_by_memory_alone_when_batches_are_small():
    memory = llama_memory(target=("attn", "mlp"))
    packs = plan(memory, max_tokens=2048, tokens_per_step=16, num_trials=1000)
    planned = 0.8 * 80 * GIB
    left = planned - memory.base_bytes - 2048 * memory.token_bytes - 2 * LLAMA_LINEARS
    assert packs.keep_dequantized
    assert packs.places == int(left // (16 * 41_943_040))


# Room


def inventory(**values) -> Inventory:
    return Inventory(num_cpus=8, num_gpus=8, where="the Ray cluster", **values)


@pytest.mark.parametrize(
    ("workers", "gpus", "groups", "expected"),
    [
        (1, 0, 1, 64 * GIB),
        (1, 0, 4, 16 * GIB),
        (2, 0, 4, 8 * GIB),
        (1, 1, 4, 80 * GIB),  # a GPU is nobody else's
        (8, 1, 1, 80 * GIB),
    ],
)
def test_room_per_worker_is_the_gpu_or_a_share_of_the_memory(workers, gpus, groups, expected):
    demand = TrialDemand(num_workers=workers, cpus_per_worker=1, gpus_per_worker=gpus)
    found = room_per_worker(demand, groups, inventory(memory_bytes=64 * GIB, gpu_bytes=80 * GIB))
    assert found == expected


@pytest.mark.parametrize("gpus", [0, 1])
def test_room_per_worker_of_a_cluster_that_does_not_say_is_none(gpus):
    demand = TrialDemand(num_workers=1, cpus_per_worker=1, gpus_per_worker=gpus)
    assert room_per_worker(demand, 1, inventory()) is None
