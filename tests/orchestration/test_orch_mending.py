"""Damaged files of a run that is resumed: each is worked out from what is whole, and said."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestration.mending import choose, mend
from orchestration.results import best_trial, read_trial, read_trials
from orchestration.rungs import RungLedger, RungRecord
from orchestration.schedulers import make_scheduler
from orchestration.trials import settle
from tests.orchestration.sweeps import candidate_dict
from tests.spoilers import emptied, flipped, truncated
from trainers.checkpoint_folder import STATE_FILE
from trainers.integrity import check_folder, seal_folder
from trainers.paths import (
    RunPaths,
    TrialPaths,
    previous_of,
    read_json_lines,
    read_state,
    write_json,
    write_json_lines,
    write_state,
)

WEIGHTS = "adapter_model.safetensors"
NAMES = ("first", "second", "third")


def rows_of(*losses: float) -> list[dict]:
    return [
        {"examples": 16 * step, "steps": step, "eval_loss": loss}
        for step, loss in enumerate(losses)
    ]


def write_trial(paths: TrialPaths, status: str, rows: list[dict]) -> None:
    """A trial as its worker leaves it, its weights written as text."""
    candidate = candidate_dict()
    write_state(paths.config, {"name": paths.root.name, "num_examples": 32, "candidate": candidate})
    write_json_lines(paths.metrics, rows)
    best = min(rows[1:], key=lambda row: row["eval_loss"])
    for folder, row in ((paths.checkpoint, rows[-1]), (paths.best, best)):
        folder.mkdir()
        (folder / WEIGHTS).write_text(f"{paths.root.name} at {row['examples']}")
        if folder == paths.checkpoint:
            write_json(folder / STATE_FILE, {"examples": row["examples"], "rows": rows})
        seal_folder(folder)
    at = {key: rows[-1][key] for key in ("examples", "steps")}
    if status:
        write_state(paths.status, {"status": status, "reason": ""} | at)


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """Two trials that ended, the better one at its last evaluation, and one that has not."""
    run = RunPaths(tmp_path / "run")
    write_trial(run.trial("first"), "finished", rows_of(3.0, 2.0, 1.0))
    write_trial(run.trial("second"), "finished", rows_of(3.0, 1.5, 2.0))
    write_trial(run.trial("third"), "", rows_of(3.0, 2.5))
    return run


def mended(run: RunPaths, *planned: str) -> list[str]:
    """What was said."""
    said: list[str] = []
    mend(run, set(planned), said.append)
    return said


def files_of(run: RunPaths) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in run.root.rglob("*") if p.is_file()}


def test_mend_of_a_run_that_is_whole_says_and_changes_nothing(run):
    before = files_of(run)
    assert mended(run) == []
    assert files_of(run) == before


@pytest.mark.parametrize("spoil", [flipped, truncated, emptied])
@pytest.mark.parametrize("name", ["first", "third"])
def test_mend_metrics_are_taken_from_the_checkpoint(run, spoil, name):
    before, path = files_of(run), run.trial(name).metrics
    spoil(path)
    said = mended(run)
    if (
        spoil is emptied
    ):  # no line of it is wrong; the worker of a trial that goes on writes it again
        return
    assert files_of(run) == before
    (line,) = said
    assert line.startswith(f"{path}:")
    assert line.endswith("is damaged; the rows of the trial's checkpoint are taken")


@pytest.mark.parametrize("spoil", [flipped, truncated, emptied])
def test_mend_status_is_worked_out_from_the_metrics(run, spoil):
    before, path = files_of(run), run.trial("first").status
    spoil(path)
    (line,) = mended(run)
    assert line.startswith(f"{path}: must end in the checksum of what it holds")
    assert files_of(run) == before


def test_mend_status_of_a_stopped_trial_is_worked_out_from_the_decisions(run):
    paths = run.trial("third")
    write_state(paths.status, {"status": "stopped", "reason": "x", "examples": 16, "steps": 1})
    ledger = RungLedger(run.rungs)
    ledger.append(RungRecord(trial="third", examples=16, eval_loss=2.5, decision="STOP"))
    flipped(paths.status)
    assert len(mended(run)) == 1
    assert not paths.status.exists()
    settle(run)
    assert read_state(paths.status)["status"] == "stopped"


@pytest.mark.parametrize("spoil", [flipped, truncated, emptied])
def test_mend_config_of_a_planned_trial_is_written_again_and_of_another_refused(run, spoil):
    path = run.trial("third").config
    spoil(path)
    before = files_of(run)
    with pytest.raises(
        ValueError, match=r"third/config\.json: must end .*; nothing else describes"
    ):
        mended(run, "first")
    assert files_of(run) == before
    (line,) = mended(run, "third")
    assert line.endswith("it is written again from the plan")
    assert not path.exists()


def test_mend_metrics_that_nothing_holds_begin_the_trial_again(run):
    paths = run.trial("first")
    flipped(paths.metrics)
    for folder in (paths.checkpoint, previous_of(paths.checkpoint)):
        folder.mkdir(exist_ok=True)
        empty_file = folder / "checksums.json"
        empty_file.write_bytes(b"")
    (line,) = mended(run)
    assert line.endswith("no checkpoint holds them; the trial begins again")
    assert read_trial(paths).status == "unfinished"
    assert read_trial(paths).rows == ()


def test_mend_removes_what_an_ended_trial_would_have_gone_on_from(run):
    ended, going = (previous_of(run.trial(name).checkpoint) for name in ("first", "third"))
    for folder in (ended, going):
        folder.mkdir()
        (folder / WEIGHTS).write_text("before")
    mended(run)
    assert not ended.exists()
    assert going.is_dir()


# The scheduler's ledger


def asha(run: RunPaths):
    return make_scheduler("asha", 16, 64, 2, RungLedger(run.rungs))


def judge(scheduler, name: str, examples: int, loss: float) -> str:
    trial = SimpleNamespace(config={"trial": {"name": name}})
    result = {"examples": examples, "eval_loss": loss}
    return scheduler.on_trial_result(None, trial, result)


def test_mend_a_damaged_decision_is_left_out_and_the_others_stand(run):
    scheduler = asha(run)
    told = {name: judge(scheduler, name, 16, loss) for name, loss in (("a", 1.0), ("b", 2.0))}
    told["c"] = judge(scheduler, "c", 16, 1.7)
    assert told == {"a": "CONTINUE", "b": "STOP", "c": "STOP"}
    lines = run.rungs.read_text().splitlines(keepends=True)
    lines[0] = lines[0].replace("1.0", "9.0")
    run.rungs.write_text("".join(lines))
    (line,) = mended(run)
    assert line.startswith(f"{run.rungs}:1 is damaged and left out")
    again = asha(run)  # without a, its rule would have let b go on: what was decided stands
    assert judge(again, "b", 16, 2.0) == "STOP"
    assert judge(again, "c", 16, 1.7) == "STOP"
    assert judge(again, "a", 16, 1.0) == "CONTINUE"
    assert [record.trial for record in RungLedger(run.rungs).records()] == ["b", "c", "a"]
    assert judge(asha(run), "a", 16, 1.0) == "CONTINUE"


# The best weights


def test_choose_takes_the_best_whose_weights_are_whole(run):
    said: list[str] = []
    _, best = choose(run, said.append)
    assert best is not None
    assert best.name == "first"
    assert said == []
    flipped(run.trial("first").best / WEIGHTS)
    _records, best = choose(run, said.append)
    assert best is not None
    assert best.name == "first"
    (line,) = said
    assert line.endswith("the same weights are taken from the trial's checkpoint")
    check_folder(run.trial("first").best)
    assert (run.trial("first").best / WEIGHTS).read_text() == "first at 32"
    assert not (run.trial("first").best / STATE_FILE).exists()


def test_choose_weights_that_nothing_holds_fail_their_trial(run):
    first, second = run.trial("first"), run.trial("second")
    for folder in (first.best, first.checkpoint):
        flipped(folder / WEIGHTS)
    said: list[str] = []
    records, best = choose(run, said.append)
    assert best is not None
    assert best.name == "second"
    assert best_trial(read_trials(run)) == best
    assert read_state(first.status)["status"] == "failed"
    assert read_state(first.status)["reason"].startswith("its best weights are damaged: ")
    assert {record.name for record in records} == set(NAMES)
    flipped(second.best / WEIGHTS)  # its checkpoint is of another evaluation
    _, best = choose(run, said.append)
    assert best is None
    assert len(said) == 2


def test_read_of_a_state_file_changed_by_hand_names_it(run):
    path = run.trial("first").status
    path.write_text(path.read_text().replace("finished", "failed"))
    with pytest.raises(ValueError, match=r"status\.json: must end in .*, or was changed by hand"):
        read_trials(run)
    path.write_text(json.dumps({"status": "finished"}))
    with pytest.raises(ValueError, match=r"status\.json: must end in .* has none"):
        read_trials(run)


def test_read_of_metrics_changed_by_hand_names_the_line(run):
    path = run.trial("second").metrics
    path.write_text(path.read_text().replace("1.5", "0.5"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: must be a row with its checksum"):
        read_trials(run)
    assert len(read_json_lines(run.trial("first").metrics)) == 3
