"""An adapter's losses do not depend on its neighbours: not on who they are, how many, when they come
or go, nor on their NaNs. The oracle is the same adapter trained alone (which test_loop.py compares with
PEFT)."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.trainers.packs import ALL_TOKENS, NAMES, RUNS, Bench, Losses, alone
from tests.trainers.tiny import random_rows, tiny_model
from trainers.comm import Comm
from trainers.paths import read_json, write_json

ONE, SEVERAL, ALL = 7, 60, ALL_TOKENS
"""max_tokens whose forwards hold one, several or all adapters: rows are 4 to 24 tokens long."""


def model(*, tied: bool = False, dtype: torch.dtype = torch.float64):
    return tiny_model(dtype, tie_word_embeddings=tied)


@cache
def losses_alone(name: str, *, tied: bool = False) -> Losses:
    return alone(model(tied=tied), name)


def assert_equal(losses: Losses, expected: Losses, tolerance: float) -> None:
    assert losses.train == pytest.approx(expected.train, abs=tolerance)
    assert losses.held_out == pytest.approx(expected.held_out, abs=tolerance)


def full_bench(max_tokens: int = SEVERAL, *, but: str = "", tied: bool = False) -> Bench:
    """Five adapters, none with equal settings, at their first step."""
    bench = Bench(model(tied=tied), max_tokens=max_tokens)
    for name in NAMES:
        if name not in but:
            bench.enter(name)
    return bench


@pytest.mark.parametrize(
    ("max_tokens", "most", "tied"),
    [(ONE, 1, False), (SEVERAL, 4, False), (SEVERAL, 4, True), (ALL, 5, False)],
    ids=["one", "several", "several-tied", "all"],
)
def test_pack_of_five_mixed_adapters_loses_what_each_loses_alone(max_tokens, most, tied):
    bench = full_bench(max_tokens, tied=tied).train()
    for name in NAMES:
        assert_equal(bench.losses[name], losses_alone(name, tied=tied), 1e-9)
    assert [len(bench.losses[name].train) for name in NAMES] == [20, 20, 20, 20, 10]
    assert max(len(chosen) for chosen in bench.chosen) == most


def test_losses_alone_of_the_five_move_and_differ():
    # The comparisons of this file are not of constants, nor of one adapter with itself.
    losses = [losses_alone(name) for name in NAMES]
    assert all(abs(one.held_out[-1] - one.held_out[0]) > 0.01 for one in losses)
    assert len({one.train[5] for one in losses}) == 5


def test_pack_of_five_float32_loses_what_each_loses_alone_over_5_steps():
    def short(name):
        size = RUNS[name].global_batch_size
        return replace(RUNS[name], num_examples=5 * size)

    bench = Bench(model(dtype=torch.float32), max_tokens=SEVERAL)
    for name in NAMES:
        bench.enter(name, short(name))
    bench.train()
    for name in NAMES:
        expected = alone(model(dtype=torch.float32), name, short(name))
        assert len(expected.train) == 5
        assert_equal(bench.losses[name], expected, 1e-5)


def test_pack_with_equal_seeds_is_bit_identical_and_with_another_seed_is_not():
    def trained(seed=3):
        bench = Bench(model(dtype=torch.float32), max_tokens=SEVERAL)
        for name in NAMES:
            run = replace(RUNS[name], num_examples=4 * RUNS[name].global_batch_size)
            bench.enter(name, run, **({"seed": seed} if name == "d" else {}))
        bench.train()
        weights = {n: run.slot.parameters for n, run in bench.runs.items()}
        return bench.losses, weights

    (steps, weights), (again, weights_again) = trained(), trained()
    assert steps == again
    for name in NAMES:
        for key, tensor in weights[name].items():
            assert torch.equal(tensor, weights_again[name][key])
    other, _ = trained(seed=30)
    assert other["d"] != steps["d"]
    assert other["a"] == steps["a"]


def poison_weights(bench: Bench) -> None:
    next(iter(bench.runs["c"].slot.parameters.values()))[0, 0] = float("nan")


def poison_gradients(bench: Bench) -> None:
    next(iter(bench.runs["c"].slot.gradients.values())).fill_(float("inf"))


@pytest.mark.parametrize("poison", [poison_weights, poison_gradients])
def test_neighbour_poisoned_inside_a_batch_diverges_alone(poison):
    bench = full_bench(ALL)
    bench.micro_steps(6)
    poison(bench)
    steps_before = bench.runs["c"].steps
    bench.train()
    poisoned = bench.runs["c"]
    assert poisoned.status == "diverged"
    assert f"at step {steps_before + 1}" in poisoned.reason
    assert "nan" in poisoned.reason or "inf" in poisoned.reason
    for name in "abde":
        assert bench.runs[name].status == "finished"
        assert_equal(bench.losses[name], losses_alone(name), 1e-9)


def test_neighbour_with_a_huge_learning_rate_diverges_alone():
    bench = full_bench(ALL, but="c")
    bench.enter("c", replace(RUNS["c"], learning_rate=1e200, warmup=0.0))
    bench.train()
    assert bench.runs["c"].status == "diverged"
    for name in "abde":
        assert_equal(bench.losses[name], losses_alone(name), 1e-9)


def test_adapter_in_the_slot_of_a_diverged_one_trains_as_if_alone():
    bench = full_bench()
    bench.until_accumulating("c", steps_done=2)
    poison_weights(bench)
    while bench.runs["c"].status == "running":
        bench.micro_steps(1)
    slot = bench.runs["c"].slot_index
    bench.leave("c")
    assert bench.enter("c").slot_index == slot
    bench.train()
    for name in NAMES:
        assert_equal(bench.losses[name], losses_alone(name), 1e-9)


def test_neighbour_leaving_inside_its_batch_changes_nothing_for_those_who_stay():
    bench = full_bench()
    bench.until_accumulating("c", steps_done=3)
    bench.leave("c")
    bench.train()
    for name in "abde":
        assert_equal(bench.losses[name], losses_alone(name), 1e-9)


@pytest.mark.parametrize("late", ["c", "d"])
def test_adapter_entering_inside_a_neighbours_batch_moves_memory_and_changes_nothing(late):
    # d has the largest rank and (with a gone) a layer that no other has: all memory moves.
    bench = full_bench(but="a" + late)
    others = [name for name in NAMES if name not in ("a", late)]
    bench.until_accumulating("e", steps_done=2)
    memory = bench.pack.store.memory_4SP.data_ptr()
    bench.enter(late)
    assert bench.pack.store.memory_4SP.data_ptr() != memory
    assert bench.is_accumulating("e")
    bench.train()
    for name in [*others, late]:
        assert_equal(bench.losses[name], losses_alone(name), 1e-9)


def test_adapter_entering_a_pack_with_room_moves_no_memory_and_changes_nothing():
    bench = Bench(model(), max_tokens=SEVERAL)
    bench.enter("a")
    bench.enter("d")
    bench.leave("a")
    bench.until_accumulating("d", steps_done=2)
    memory = bench.pack.store.memory_4SP.data_ptr()
    bench.enter("a")
    assert bench.pack.store.memory_4SP.data_ptr() == memory
    bench.train()
    for name in "ad":
        assert_equal(bench.losses[name], losses_alone(name), 1e-9)


SHORT = 5
"""Steps of the comparison in float32."""


def _train_pack(dtype: torch.dtype, comm: Comm | None = None) -> dict[str, list[float]]:
    bench = Bench(model(dtype=dtype), random_rows(40), max_tokens=SEVERAL, comm=comm)
    for name in NAMES:
        size, budget = RUNS[name].global_batch_size, RUNS[name].num_examples
        short = dtype == torch.float32
        bench.enter(name, replace(RUNS[name], num_examples=SHORT * size if short else budget))
    bench.train()
    return {name: [*one.train, *one.held_out] for name, one in bench.losses.items()}


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        write_json(_path(folder, name, rank), _train_pack(dtype, Comm()))
    dist.destroy_process_group()


def _path(folder: str | Path, name: str, rank: int) -> Path:
    return Path(folder) / f"{name}-{rank}.json"


@pytest.mark.slow
def test_pack_on_two_workers_loses_what_it_loses_on_one(tmp_path):
    # b's global batch is one row: the second worker has none of it.
    mp.spawn(_work, args=(str(tmp_path),), nprocs=2)
    for name, dtype, steps, tolerance in (
        ("float64", torch.float64, 20, 1e-9),
        ("float32", torch.float32, SHORT, 1e-5),
    ):
        first, second = (read_json(_path(tmp_path, name, rank)) for rank in (0, 1))
        assert first == second
        expected = _train_pack(dtype)
        assert len(expected["a"]) == steps + steps // 5
        for key, losses in expected.items():
            assert first[key] == pytest.approx(losses, abs=tolerance)
