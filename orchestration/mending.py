"""What a resume does about files that are damaged: each is worked out again from what is whole, and this is said.

plan.json, resolved.json        nothing else holds them: the resume is refused (trainers/paths.py says so)
trials/T/config.json            from the plan, where the plan names the trial
trials/T/metrics.jsonl          from the trial's checkpoint, which holds its rows
trials/T/status.json            from its metrics and the scheduler's decisions; else the trial goes on from its
                                checkpoint, and comes to the same end
rungs.jsonl                     a damaged line is left out (orchestration/rungs.py)
"""

from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from orchestration.results import TrialRecord, best_trial, mark_ended, read_trial, read_trials
from orchestration.rungs import RungLedger
from trainers.checkpoint_folder import (
    Checkpoint,
    copy_weights,
    fetch_checkpoint,
    find_checkpoint,
)
from trainers.integrity import DamagedError, check_folder, sound_rows
from trainers.mirror import fetch_all_records, fetch_folder, shown
from trainers.paths import (
    RunPaths,
    TrialPaths,
    drop_previous,
    read_state,
    remove_file,
    write_json_lines,
    write_state,
)

Say = Callable[[str], None]


def mend(run: RunPaths, planned: Set[str], say: Say) -> None:
    """Mends a run that nobody else writes into, before anything is read of it.

    Args:
        planned: trials whose config.json can be written again.
        say: is told of everything that was damaged.

    Raises:
        ValueError: a trial that nothing else describes.
    """
    fetch_all_records(run.root)
    ledger = RungLedger(run.rungs)
    ledger.records()
    for number in ledger.damaged:
        say(
            f"{shown(run.rungs)}:{number} is damaged and left out; decisions after it stand as written"
        )
    for folder in sorted(run.trials.iterdir()):
        if folder.is_dir() and (folder / "config.json").exists():
            mend_trial(TrialPaths(folder), planned, say)


def sound_record(paths: TrialPaths, status: str, reason: str, say: Say) -> TrialRecord:
    """A trial that has just ended, as it is on disk, with its files mended where they are damaged.

    Args:
        status: how it ended, where its worker did not write that.
    """
    try:
        mark_ended(paths, status, reason)
        return read_trial(paths)
    except DamagedError:
        mend_trial(paths, set(), say)
        mark_ended(paths, status, reason)
        return read_trial(paths)


def mend_trial(paths: TrialPaths, planned: Set[str], say: Say) -> None:
    """Mends one trial; see `mend`."""
    config = _config(paths, planned, say)
    _mend_metrics(paths, say)
    if paths.status.exists() and (problem := _problem(paths.status)):
        remove_file(paths.status)
        rows, _ = sound_rows(paths.metrics)
        if config and rows and rows[-1]["examples"] >= config["num_examples"]:
            mark_ended(paths, "finished", "")
        say(f"{problem}; the trial's end is worked out from its metrics and its checkpoint")
    if paths.status.exists():  # it has ended: what it would have gone on from is of no use
        drop_previous(paths.checkpoint)


def _config(paths: TrialPaths, planned: Set[str], say: Say) -> dict[str, Any] | None:
    """A trial's config; None: it is to be written again."""
    try:
        return read_state(paths.config)
    except DamagedError as error:
        if paths.root.name not in planned:
            raise ValueError(
                f"{error}; nothing else describes this trial: restore the file, or remove {shown(paths.root)} to "
                "give the trial up"
            ) from error
        remove_file(paths.config)
        say(f"{error}; it is written again from the plan")
        return None


def _mend_metrics(paths: TrialPaths, say: Say) -> None:
    _, damaged = sound_rows(paths.metrics)
    if not damaged:
        return
    place = f"{shown(paths.metrics)}:{damaged[0]} is damaged"
    if checkpoint := _checkpoint_of(paths):
        write_json_lines(paths.metrics, checkpoint.rows)
        say(f"{place}; the rows of the trial's checkpoint are taken")
        return
    remove_file(paths.metrics)
    if paths.status.exists():
        remove_file(paths.status)
        say(f"{place}, and no checkpoint holds them; the trial begins again")
    else:
        say(f"{place}, and no checkpoint holds them")


def _checkpoint_of(paths: TrialPaths) -> Checkpoint | None:
    """A trial's checkpoint; None where there is none, or a damaged one, of which its worker speaks."""
    fetch_checkpoint(paths.checkpoint)
    try:
        return find_checkpoint(paths.checkpoint)
    except DamagedError:
        return None


def choose(run: RunPaths, say: Say) -> tuple[list[TrialRecord], TrialRecord | None]:
    """All trials of a run, and the best whose weights are whole; one whose are not has failed."""
    while True:
        records = read_trials(run)
        best = best_trial(records)
        if best is None or _has_weights(run.trial(best.name), best, say):
            return records, best


def _has_weights(paths: TrialPaths, best: TrialRecord, say: Say) -> bool:
    assert best.best is not None
    fetch_folder(paths.best)
    try:
        check_folder(paths.best)
        return True
    except DamagedError as error:
        problem = str(error)
    checkpoint = _checkpoint_of(paths)
    if checkpoint and checkpoint.state["examples"] == best.best["examples"]:
        copy_weights(checkpoint.folder, paths.best)
        say(f"{problem}; the same weights are taken from the trial's checkpoint")
        return True
    say(f"{best.name}: {problem}; the trial counts as failed")
    end = {"status": "failed", "reason": f"its best weights are damaged: {problem}"}
    at = {key: best.rows[-1][key] for key in ("examples", "steps")}
    write_state(paths.status, end | at)
    return False


def _problem(state: Path) -> str:
    try:
        read_state(state)
    except DamagedError as error:
        return str(error)
    return ""
