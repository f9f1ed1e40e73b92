"""The packs that follow from bytes, summed by hand."""

from dataclasses import replace

import pytest

from cluster.inventory import Inventory, TrialDemand, room_per_worker
from cluster.packing import FORWARD_TOKENS, pack_plan, worker_needs
from cluster.strategy import Asked, DoesNotFitError, Way, Workload
from search_spaces.architecture import ModelShape
from search_spaces.linear_shape import LinearShape

GIB = 1 << 30
BASE, DEQUANTIZED, ADAPTER, TOKEN = 5_000_000, 20_000_000, 1_000_000, 1_000
WORK = Workload(lora_rank=8, row_tokens=64, global_batch_sizes=(4,), num_trials=100, quantized=True)


def needs(way: Way, workload: Workload, *, num_slots: int, tokens: int) -> int:
    base = BASE // (way.num_workers if way.strategy == "zero3" else 1)
    base = DEQUANTIZED if way.keep_dequantized else base
    return base + num_slots * ADAPTER + tokens * TOKEN


def gpus(count: int = 1, room: int | None = None) -> Inventory:
    return Inventory(num_cpus=64, num_gpus=count, where="the test", gpu_bytes=room)


def plan(room: int | None = None, workload: Workload = WORK, **values):
    options = {"max_groups": 1, "max_tokens": 1024, "tokens_per_row": 64.0, "measured": True}
    asked = values.pop("asked", Asked())
    inventory = values.pop("inventory", gpus(room=room))
    return pack_plan(needs, workload, inventory, asked, **(options | values))


@pytest.mark.parametrize(
    ("tokens_per_row", "places"),
    [
        (256, 2),  # four rows of one fill a forward, one more trains while it is judged
        (255.9, 3),
        (128, 3),
        (64, 5),
        (257, 2),
        (25_000, 2),
        (0.2, 100),  # no more than there are trials
    ],
)
def test_pack_plan_places_are_those_that_fill_a_forward_and_one(tokens_per_row, places):
    assert plan(tokens_per_row=tokens_per_row).places == places


@pytest.mark.parametrize(
    ("num_trials", "max_groups", "groups", "places"),
    [(1, 8, 1, 1), (2, 8, 2, 1), (8, 8, 8, 1), (9, 8, 8, 2), (30, 2, 2, 5), (3, 1, 1, 3)],
)
def test_pack_plan_gives_no_group_without_a_trial_and_no_place_without_one(
    num_trials, max_groups, groups, places
):
    work = replace(WORK, num_trials=num_trials)
    asked = Asked(num_workers=1)  # else idle GPUs share the batches
    packs = plan(workload=work, inventory=gpus(8), max_groups=max_groups, asked=asked)
    assert (packs.num_groups, packs.places) == (groups, places)


@pytest.mark.parametrize(("spare", "places"), [(-1, 2), (0, 3), (1, 3)])
def test_pack_plan_memory_cuts_the_places_at_the_byte(spare, places):
    packs = plan(BASE + 3 * ADAPTER + 1024 * TOKEN + spare)
    assert packs.places == places
    assert f"memory holds {places}" in packs.reason
    assert packs.needed_bytes == BASE + places * ADAPTER + 1024 * TOKEN


def test_pack_plan_memory_that_a_slot_more_takes_less_of_holds_what_it_holds():
    def uneven(way: Way, workload: Workload, *, num_slots: int, tokens: int) -> int:
        # Three slots hold 15 of 16 rows: fewer bytes than two, whose adapters are small.
        rows = tokens // 64 // num_slots * num_slots
        return BASE + num_slots * 100 + rows * 64 * TOKEN

    room = BASE + 1024 * TOKEN + 500
    options = {"max_groups": 1, "max_tokens": 1024, "tokens_per_row": 64.0, "measured": True}
    assert pack_plan(uneven, WORK, gpus(room=room), Asked(), **options).places == 5


@pytest.mark.parametrize(("spare", "kept"), [(-1, False), (0, True), (1, True)])
def test_pack_plan_keeps_dequantized_where_two_adapters_fit_beside_it(spare, kept):
    packs = plan(DEQUANTIZED + 2 * ADAPTER + 1024 * TOKEN + spare)
    assert packs.keep_dequantized is kept
    assert packs.places == (2 if kept else 5)


def test_pack_plan_of_a_base_that_is_not_quantized_keeps_nothing_dequantized():
    assert not plan(GIB, replace(WORK, quantized=False)).keep_dequantized


@pytest.mark.parametrize("pack_size", [1, 2, 40])
def test_pack_plan_pack_size_is_taken_as_asked(pack_size):
    packs = plan(GIB, pack_size=pack_size)
    assert packs.places == pack_size
    assert packs.reason.startswith(f"pack_size {pack_size}; memory holds ")


def test_pack_plan_pack_size_beyond_the_trials_is_cut_to_them():
    assert plan(workload=replace(WORK, num_trials=3), pack_size=8).places == 3


def test_pack_plan_pack_size_beyond_the_memory_is_refused_with_every_number():
    room = BASE + 4 * ADAPTER + 1024 * TOKEN
    assert plan(room, pack_size=4).places == 4
    with pytest.raises(ValueError, match="pack_size must be what a worker holds") as error:
        plan(room - 1, pack_size=4)
    assert f"3 adapters of rank 8 ({room - ADAPTER:,} of {room - 1:,} bytes), got 4" in str(
        error.value
    )


def test_pack_plan_that_holds_no_row_is_refused():
    room = BASE + ADAPTER + 64 * TOKEN
    assert plan(room, measured=False).places == 1
    with pytest.raises(DoesNotFitError, match=r"needs 0\.0 GB a worker"):
        plan(room - 1, measured=False)


def test_pack_plan_of_unknown_room_asks_for_what_fills_a_forward():
    packs = plan()
    assert packs.places == 5
    assert "memory not known" in packs.reason
    assert not packs.keep_dequantized  # nobody knows whether there is room


@pytest.mark.parametrize(
    ("measured", "text"), [(True, "(measured)"), (False, "(not measured here yet)")]
)
def test_pack_plan_says_whether_the_forward_was_measured(measured, text):
    packs = plan(measured=measured, max_tokens=FORWARD_TOKENS["cpu"])
    assert f"8 fill a forward of 2,048 tokens {text}" in packs.reason
    assert packs.max_tokens == 2048


def test_pack_plan_sharded_forward_is_as_large_as_memory_allows_and_never_the_measured_one():
    # A fifth of the base, one adapter, and ten rows.
    room = BASE // 2 + ADAPTER + 10 * 64 * TOKEN
    asked = Asked(num_workers=2, strategy="zero3")
    packs = plan(inventory=gpus(2, room), asked=asked)
    assert (packs.strategy, packs.workers_per_group) == ("zero3", 2)
    assert packs.max_tokens == 640
    assert not packs.keep_dequantized


def test_pack_plan_of_a_way_decided_before_only_counts_places_anew():
    first = plan(DEQUANTIZED + 4 * ADAPTER + 1024 * TOKEN, measured=False)
    again = plan(DEQUANTIZED + 4 * ADAPTER + 1024 * TOKEN, max_tokens=3072, way=first.way)
    assert first.keep_dequantized
    assert again.way == first.way
    assert (first.places, again.places) == (4, 1)


def test_worker_needs_of_a_forward_shorter_than_a_row_are_those_of_one_row():
    mlp = LinearShape(name="up_proj", in_features=8, out_features=16, component="mlp", count=1)
    attn = LinearShape(name="q_proj", in_features=8, out_features=8, component="attn", count=1)
    shape = ModelShape.from_linears(
        [attn, attn, mlp, replace(mlp, name="down_proj", in_features=16, out_features=8)],
        model_type="llama",
        hidden_size=8,
        num_layers=1,
        vocab_size=32,
        tied_head=True,
        embedding_params=256,
        other_params=0,
    )
    needed = worker_needs(shape, target=("mlp",), compute_bytes=4, on_gpu=False, packing=False)
    way = Way(strategy="single", num_workers=1, gradient_checkpointing=False)
    short, row = (needed(way, WORK, num_slots=1, tokens=tokens) for tokens in (16, 64))
    assert short == row


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
