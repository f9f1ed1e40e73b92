"""Checkpoints between packs: what is saved beside one set of neighbours goes on beside another."""

from dataclasses import replace

import pytest
import torch

from tests.trainers.packs import RUNS, Bench, alone
from tests.trainers.tiny import tiny_model
from trainers.checkpoint import load_checkpoint, save_checkpoint
from trainers.checkpoint_folder import checkpoint_examples


def saved(bench: Bench, name: str, folder):
    save_checkpoint(bench.pack, bench.runs[name], folder, base_name="org/base", revision=None)
    return bench.runs[name]


def bench_of(*names: str) -> Bench:
    bench = Bench(tiny_model())
    for name in names:
        bench.enter(name)
    return bench


@pytest.mark.parametrize(
    ("beside", "later"),
    [((), ("d",)), (("d",), ()), (("c",), ("d",))],
    ids=["into a larger rank", "into its own rank", "between two others"],
)
def test_checkpoint_weights_and_moments_survive_another_max_rank(beside, later, tmp_path):
    first = bench_of(*beside, "e")
    while first.runs["e"].steps < 4:
        first.micro_steps(1)
    run = saved(first, "e", tmp_path / "checkpoint")
    second = bench_of(*later, "e")
    assert first.pack.store.max_rank != second.pack.store.max_rank
    loaded = second.runs["e"]
    assert load_checkpoint(loaded, tmp_path / "checkpoint")
    assert loaded.counters == run.counters
    for name, weights in run.slot.parameters.items():
        assert torch.equal(loaded.slot.parameters[name], weights)
        for own, other in zip(loaded.slot.moments[name], run.slot.moments[name], strict=True):
            assert other.abs().max() > 0
            assert torch.equal(own, other)
    # Nothing came into the rows between its rank and the store's.
    num_weights = sum(view.numel() for view in loaded.slot.parameters.values())
    (row,) = loaded.slot.weights
    assert int(row.count_nonzero()) <= num_weights


def test_checkpoint_without_its_weights_is_an_error_that_says_so_and_changes_nothing(tmp_path):
    bench = bench_of("e")
    saved(bench, "e", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "adapter_model.safetensors").unlink()
    run = bench_of("e").runs["e"]
    before = {name: weights.clone() for name, weights in run.slot.parameters.items()}
    with pytest.raises(
        ValueError, match=r"no checkpoint is whole: .*safetensors: must be there, is not"
    ):
        load_checkpoint(run, tmp_path / "checkpoint")
    assert all(torch.equal(run.slot.parameters[name], before[name]) for name in before)


@pytest.mark.parametrize(("beside", "later"), [((), ("d",)), (("d",), ())])
def test_checkpoint_run_going_on_in_another_pack_loses_what_it_loses_alone(beside, later, tmp_path):
    expected = alone(tiny_model(), "e").train
    first = bench_of(*beside, "e")
    while first.runs["e"].steps < 4:
        first.micro_steps(1)
    saved(first, "e", tmp_path / "checkpoint")
    second = bench_of(*later, "e")
    load_checkpoint(second.runs["e"], tmp_path / "checkpoint")
    second.train()
    assert len(expected) == 10
    losses = first.losses["e"].train + second.losses["e"].train
    assert losses == pytest.approx(expected, abs=1e-9)


def test_checkpoint_absent_is_none_and_counts_no_examples(tmp_path):
    bench = bench_of("e")
    before = {n: p.clone() for n, p in bench.runs["e"].slot.parameters.items()}
    assert not load_checkpoint(bench.runs["e"], tmp_path / "none")
    assert checkpoint_examples(tmp_path / "none") == 0
    assert all(torch.equal(before[n], p) for n, p in bench.runs["e"].slot.parameters.items())


def test_checkpoint_left_between_two_renames_is_found_as_the_old_one(tmp_path):
    bench = Bench(tiny_model())
    bench.enter("e", replace(RUNS["e"], num_examples=6))
    while bench.runs["e"].steps < 1:
        bench.micro_steps(1)
    saved(bench, "e", tmp_path / "checkpoint")
    (tmp_path / "checkpoint").rename(tmp_path / ".checkpoint.old")
    assert checkpoint_examples(tmp_path / "checkpoint") == 3
    fresh = bench_of("e")
    assert load_checkpoint(fresh.runs["e"], tmp_path / "checkpoint")
    assert fresh.runs["e"].examples == 3
