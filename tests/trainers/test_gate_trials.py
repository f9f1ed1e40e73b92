"""The gate of every save in a trial: who ends by what it refuses, and who goes on."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from tests.trainers.links import FakeLink, allow, enter
from tests.trainers.test_gate import ADAPTER, LAYERS, emptied
from tests.trainers.tiny import tiny_model
from tests.trainers.trials import numbers
from trainers import checkpoint
from trainers.comm import Comm
from trainers.integrity import seal_folder
from trainers.pack_server import PackServer
from trainers.paths import TrialPaths, previous_of, read_json, read_json_lines, read_state
from trainers.sft_trainer import Station, TrialSpec, train_trial


class Saver:
    """safetensors' writer; what it writes of some trials' adapters, from some save on, is spoilt."""

    def __init__(self, spoil, trial_name: str, first_bad: int) -> None:
        self.spoil, self.trial_name, self.first_bad, self.count = spoil, trial_name, first_bad, 0

    def __call__(self, tensors, path: Path, metadata=None) -> None:
        if path.name == ADAPTER and self.trial_name in path.parts:
            self.count += 1
            if self.count > self.first_bad:
                tensors = self.spoil(tensors)
        save_file(tensors, path, metadata=metadata)


@pytest.fixture
def make(make, fp64):
    """make(name, ...): a trial with evaluations after 4, 8 and 12 examples, one forward a step."""
    return partial(make, base=fp64, micro_batch_size=4)


def assert_failed(spec: TrialSpec, reason: str, examples: int) -> None:
    """What lies in a failed trial's folder."""
    paths = TrialPaths(spec.folder)
    status = read_state(paths.status)
    assert status["status"] == "failed"
    assert reason in status["reason"]
    assert status["examples"] == examples
    error = paths.error.read_text()
    assert "Traceback" in error
    assert status["reason"] in error


@pytest.mark.parametrize("first_bad", [0, 2])
def test_d01_save_of_empty_tensors_fails_the_trial_and_keeps_the_last_good_checkpoint(
    make, monkeypatch, first_bad
):
    spec = make("bad")
    monkeypatch.setattr(checkpoint, "save_file", Saver(emptied, "bad", first_bad))
    told = []
    result = train_trial(spec, lambda row: told.append(row["examples"]) is None)
    assert result.status == "failed"
    assert result.reason.startswith(f"{ADAPTER} must hold 30 tensors with numbers, 30 are empty")
    assert told == [0, 4][:first_bad]  # what was not saved was not judged
    assert_failed(spec, "30 are empty", 8 if first_bad else 0)
    folder = TrialPaths(spec.folder).checkpoint
    left = sorted(path.name for path in spec.folder.iterdir())
    if first_bad == 0:
        assert left == ["error.txt", "metrics.jsonl", "status.json"]
        return
    assert left == ["best", "checkpoint", "error.txt", "metrics.jsonl", "status.json"]
    assert read_json(folder / "trainer_state.json")["examples"] == 4
    assert len(load_file(folder / ADAPTER)) == 2 * LAYERS


def test_d01_member_whose_save_is_empty_fails_and_its_neighbours_go_on(make, monkeypatch):
    good, bad, late = make("good"), make("bad", seed=4), make("late", seed=5)
    alone = {
        spec.name: numbers(
            train_trial(
                replace(spec, folder=spec.folder.with_name(f"{spec.name} alone")), lambda row: True
            ).rows
        )
        for spec in (good, late)
    }
    monkeypatch.setattr(checkpoint, "save_file", Saver(emptied, "bad", 2))
    slots = []

    def has_ended() -> bool:
        if (end := link.end(bad)) is not None:
            slots.append((set(server.station.pack.slots), set(server.members)))
        return end is not None

    link = FakeLink([enter(good, 0), enter(bad)], (has_ended, [enter(late), allow(good, 9)]))
    server = PackServer(link, Comm(), Station)
    server.serve()
    assert slots[0] == ({0}, {"good"})  # the place of the failed one is free
    assert len(link.rows(bad)) == 1
    end = link.end(bad)
    status = read_state(TrialPaths(bad.folder).status)
    assert (end["status"], end["reason"]) == ("failed", status["reason"])
    assert_failed(bad, "30 are empty", 8)
    for spec in (good, late):
        assert link.end(spec)["status"] == "finished"
        losses = [row["eval_loss"] for row in link.rows(spec)]
        expected = [row["eval_loss"] for row in alone[spec.name][1:]]
        assert losses == pytest.approx(expected, abs=1e-9)


def test_d01_member_whose_first_save_is_empty_leaves_no_slot(make, monkeypatch):
    bad, good = make("bad"), make("good")
    monkeypatch.setattr(checkpoint, "save_file", Saver(emptied, "bad", 0))
    link = FakeLink([enter(bad)], [enter(good)])
    server = PackServer(link, Comm(), Station)
    server.serve()
    assert link.rows(bad) == []
    assert link.end(bad)["status"] == "failed"
    assert link.end(good)["status"] == "finished"
    assert not server.station.pack.slots


def test_d01_empty_tensors_in_the_place_of_a_checkpoint_end_the_trial_that_goes_on(make):
    class Killed(Exception):
        pass

    def die(row) -> bool:
        if row["examples"] == 8:
            raise Killed
        return True

    spec = make("cut")
    with pytest.raises(Killed):
        train_trial(spec, die)
    folder = TrialPaths(spec.folder).checkpoint
    for whole in (folder, previous_of(folder)):
        save_file(emptied(load_file(whole / ADAPTER)), whole / ADAPTER)
        seal_folder(whole)
    result = train_trial(spec, lambda row: True)
    assert result.status == "failed"
    assert_failed(spec, "must hold all 30 weights of the trial", 0)
    assert [row["examples"] for row in result.rows] == [0, 4, 8]
    TrialPaths(spec.folder).status.unlink()
    good = make("good")
    link = FakeLink([enter(spec), enter(good)])
    PackServer(link, Comm(), Station).serve()
    assert link.end(spec)["status"] == "failed"
    assert link.end(good)["status"] == "finished"


def test_gate_trial_that_goes_on_with_another_base_of_the_same_shape_fails(
    make, tmp_path, tiny_folder
):
    spec = make("moved")

    class Killed(Exception):
        pass

    def die(row) -> bool:
        if row["examples"] == 4:
            raise Killed
        return True

    with pytest.raises(Killed):
        train_trial(spec, die)
    other = tiny_model(torch.float32, vocab_size=3072, initializer_range=0.19)
    other.save_pretrained(tmp_path / "other")
    base = replace(spec.base, model=str(tmp_path / "other"))
    result = train_trial(replace(spec, base=base), lambda row: True)
    assert result.status == "failed"
    assert_failed(spec, "reloaded, it must lose", 0)
    assert "the base or the checkpoint is another one" in result.reason


def _work(rank: int, folder: str, spec: TrialSpec) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    if rank == 0:  # who writes; the others only hear of it
        checkpoint.save_file = Saver(emptied, spec.name, 1)
    result = train_trial(spec, lambda row: True)
    (Path(folder) / f"{rank}.txt").write_text(f"{result.status}: {result.reason}")
    dist.destroy_process_group()


def test_gate_two_workers_take_the_same_decision_and_neither_waits(make, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = make("shared")
    mp.spawn(_work, args=(str(tmp_path), spec), nprocs=2)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith(f"failed: {ADAPTER} must hold 30 tensors with numbers, 30 are empty")
    assert_failed(spec, "30 are empty", 4)
    rows = read_json_lines(TrialPaths(spec.folder).metrics)
    assert [row["examples"] for row in rows] == [0, 4]
