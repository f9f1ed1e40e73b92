"""What a trial's folder holds when its worker is killed at any moment, and what a restart makes of it."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainers.links import Killed
from tests.trainers.packs import RUNS, Bench
from tests.trainers.tiny import tiny_model
from tests.trainers.trials import numbers, trial
from trainers.checkpoint import load_checkpoint
from trainers.checkpoint_folder import find_checkpoint
from trainers.gate import Probe
from trainers.paths import TrialPaths, read_json, read_json_lines, read_state
from trainers.recorder import Recorder

RUN = replace(RUNS["a"], learning_rate=3e-2, num_examples=18, eval_every=6)


def attempt(folder: Path, report=lambda row: True) -> None:
    """Trains three steps with an evaluation after each, from the folder's checkpoint on."""
    bench, paths = Bench(tiny_model()), TrialPaths(folder)
    run = bench.enter("b", RUN)
    checkpoint = load_checkpoint(run, paths.checkpoint)
    if run.examples >= RUN.num_examples:
        run.status = "finished"
    spec = trial(folder / "no data", folder)
    recorder = Recorder(spec, Probe(bench.trainer), paths, report, checkpoint)
    bench.trainer.run([run], recorder)
    recorder.finish(run)


def outcome(folder: Path):
    paths = TrialPaths(folder)
    weights = [
        (at / "adapter_model.safetensors").read_bytes() for at in (paths.best, paths.checkpoint)
    ]
    return numbers(read_json_lines(paths.metrics)), weights, read_state(paths.status)


class Moves:
    """Counts the renames of a process and kills it just before one of them."""

    def __init__(self, monkeypatch) -> None:
        self.count, self.killed_at = 0, -1
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, move):
        def moved(*args, **kwargs):
            self.count += 1
            if self.count == self.killed_at:
                raise Killed
            return move(*args, **kwargs)

        return moved


def test_recorder_killed_before_any_rename_ends_in_the_numbers_of_a_whole_trial(
    tmp_path, monkeypatch
):
    moves = Moves(monkeypatch)
    attempt(tmp_path / "whole")
    expected, num_moves = outcome(tmp_path / "whole"), moves.count
    assert [row["examples"] for row in expected[0]] == [0, 6, 12, 18]
    losses = [row["eval_loss"] for row in expected[0]]
    assert losses == sorted(losses, reverse=True)  # each evaluation replaces the best
    assert num_moves > 20
    for killed_at in range(1, num_moves + 1):
        folder = tmp_path / f"killed at {killed_at}"
        moves.count, moves.killed_at = 0, killed_at
        with pytest.raises(Killed):
            attempt(folder)
        moves.killed_at = -1
        attempt(folder)
        assert outcome(folder) == expected, f"killed before rename {killed_at} of {num_moves}"


def test_recorder_row_that_was_told_is_on_disk_with_its_checkpoint(tmp_path):
    told = []

    def report(row) -> bool:
        told.append(row)
        assert read_json_lines(TrialPaths(tmp_path).metrics) == told
        assert find_checkpoint(TrialPaths(tmp_path).checkpoint).rows == told
        state = read_json(TrialPaths(tmp_path).checkpoint / "trainer_state.json")
        assert state["examples"] == row["examples"]
        return True

    attempt(tmp_path, report)
    assert len(told) == 4


def test_recorder_worse_evaluation_keeps_the_best_weights(tmp_path):
    bench, paths = Bench(tiny_model()), TrialPaths(tmp_path)
    run = bench.enter("a", replace(RUN, num_examples=24))
    kept = {}

    def report(row) -> bool:
        path = paths.checkpoint / "adapter_model.safetensors"
        kept[row["eval_loss"]] = path.read_bytes() if row["steps"] else b""
        return True

    spec = trial(tmp_path / "no data", tmp_path)
    recorder = Recorder(spec, Probe(bench.trainer), paths, report, None)
    bench.trainer.run([run], recorder)
    losses = [row["eval_loss"] for row in recorder.trained_rows]
    assert losses[0] > min(losses) < losses[-1]
    assert (paths.best / "adapter_model.safetensors").read_bytes() == kept[min(losses)]
