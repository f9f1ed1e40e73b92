"""What `tenfold resume` finds of a run whose driver died between any two writes."""

from pathlib import Path

import pytest

from orchestration.results import mark_ended, read_trial
from orchestration.rungs import CONTINUE, STOP, RungLedger, RungRecord, stopped_trials
from orchestration.schedulers import make_scheduler
from orchestration.trials import settle, unended, untold
from trainers.paths import RunPaths, write_json_lines, write_state


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


def write_trial(run: RunPaths, name: str, evaluations: int, status: str = "") -> None:
    """A trial of at most 30 examples, evaluated every 10 of them and once before."""
    paths = run.trial(name)
    rows = [
        {"examples": 10 * at, "steps": at, "eval_loss": 3.0 - at} for at in range(evaluations + 1)
    ]
    write_state(paths.config, {"name": name, "num_examples": 30, "candidate": {}})
    write_json_lines(paths.metrics, rows)
    if status:
        mark_ended(paths, status, "")


def record(run: RunPaths, name: str, examples: int, decision=CONTINUE) -> RungRecord:
    made = RungRecord(
        trial=name, examples=examples, eval_loss=3.0 - examples / 10, decision=decision
    )
    RungLedger(run.rungs).append(made)
    return made


@pytest.mark.parametrize("kind", ["fifo", "asha", "median"])
def test_resume_tells_the_scheduler_of_a_finish_that_no_driver_lived_to_see(run, kind):
    write_trial(run, "a", 3, "finished")
    record(run, "a", 10)
    record(run, "a", 20)
    assert settle(run) == {"a": 2}
    assert untold(run) == [("a", 30, 0.0)]
    make_scheduler(kind, 30, 30, 2, RungLedger(run.rungs)).complete("a", 30, 0.0)
    records = RungLedger(run.rungs).records()
    assert {(each.trial, each.examples) for each in records} == {("a", 10), ("a", 20), ("a", 30)}
    assert stopped_trials(records) == {"a"}
    assert untold(run) == []


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_resume_tells_the_scheduler_nothing_of_other_ends(run, status):
    write_trial(run, "a", 2, status)
    record(run, "a", 10)
    assert untold(run) == []


def test_resume_tells_the_scheduler_that_a_trial_was_stopped_by_somebody_else(run):
    write_trial(run, "a", 2, "stopped")
    write_trial(run, "never judged", 1, "stopped")
    record(run, "a", 10)
    assert untold(run) == [("a", 10, 2.0)]


def test_resume_tells_nothing_of_a_trial_that_was_stopped_while_it_finished(run):
    write_trial(run, "a", 3, "finished")
    record(run, "a", 20, STOP)
    assert untold(run) == []


def test_settle_writes_the_end_that_a_dead_driver_decided(run):
    write_trial(run, "stopped", 2)
    record(run, "stopped", 10, STOP)
    write_trial(run, "done", 3)
    record(run, "done", 30, STOP)
    write_trial(run, "running", 1)
    record(run, "running", 10)
    assert settle(run) == {"stopped": 1, "done": 1, "running": 1}
    found = {name: read_trial(run.trial(name)).status for name in ("stopped", "done")}
    assert found == {"stopped": "stopped", "done": "finished"}
    assert unended(run, ["stopped", "done", "running", "waiting"]) == ["running", "waiting"]
