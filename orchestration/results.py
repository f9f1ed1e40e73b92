"""What a sweep found, read from the trials' own files: never from a scheduler's memory."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestration.objective import LOSS, Objective, objective_of_rows
from search_spaces.candidate import Candidate
from trainers.credentials import masked
from trainers.integrity import DamagedError, sound_rows
from trainers.metrics import best_row
from trainers.mirror import fetch
from trainers.paths import RunPaths, TrialPaths, read_json_lines, read_state, write_state

USABLE = ("finished", "stopped")


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial as it ended. best: its metrics row with the lowest eval_loss, None without one; notes: what
    went wrong with its files and was mended; clone_of: the trial whose candidate its own was made of, while
    the sweep ran."""

    name: str
    candidate: dict[str, Any]
    status: str
    reason: str
    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()
    clone_of: str = ""

    @property
    def best(self) -> dict[str, Any] | None:
        return best_row(self.rows)

    @property
    def objective(self) -> Objective:
        """What it is judged by, as people know it."""
        return objective_of_rows(self.rows)

    @property
    def remark(self) -> str:
        """What is to be said of it beside its numbers."""
        cloned = [f"clone of {self.clone_of}"] if self.clone_of else []
        return "; ".join([*cloned, *([self.reason] if self.reason else [])])

    @property
    def settings(self) -> Candidate:
        """The candidate as an object, which knows its scale."""
        return Candidate.from_dict(self.candidate)

    @property
    def base_loss(self) -> float | None:
        """eval_loss of the untouched base, measured before the first step."""
        return next((row["eval_loss"] for row in self.rows if row["steps"] == 0), None)


def read_trial(paths: TrialPaths) -> TrialRecord:
    """A trial from its folder; without a status it has not ended."""
    status = (
        read_state(paths.status)
        if paths.status.exists()
        else {"status": "unfinished", "reason": ""}
    )
    return TrialRecord(
        name=paths.root.name,
        candidate=read_state(paths.config)["candidate"],
        status=status["status"],
        reason=masked(status["reason"]),
        rows=tuple(read_json_lines(paths.metrics)),
        notes=notes_of(paths),
        clone_of=_clone_of(paths),
    )


def _clone_of(paths: TrialPaths) -> str:
    try:
        return str(read_state(paths.clone)["of"]) if paths.clone.exists() else ""
    except DamagedError:  # its candidate is in its config, too (clones.py)
        return ""


def notes_of(paths: TrialPaths) -> tuple[str, ...]:
    """What a trial's workers said of damage; a line that is damaged itself is left out."""
    return tuple(row["note"] for row in sound_rows(paths.notes)[0])


def fetch_records(paths: TrialPaths) -> None:
    """Brings here what a trial's worker wrote of it into a run on an object store."""
    for path in (paths.metrics, paths.status, paths.error, paths.notes):
        fetch(path)


def read_trials(run: RunPaths) -> list[TrialRecord]:
    """All trials of a run, best first; those without a usable score last."""
    folders = sorted(folder for folder in run.trials.iterdir() if (folder / "config.json").exists())
    records = [read_trial(TrialPaths(folder)) for folder in folders]
    return sorted(records, key=_ranking)


def objective_of_records(records: Iterable[TrialRecord]) -> Objective:
    """What the trials of a run are judged by."""
    return next((record.objective for record in records if record.rows), LOSS)


def _ranking(record: TrialRecord) -> tuple[bool, float, str]:
    score = record.best["eval_loss"] if record.best else math.inf
    return record.status not in USABLE, score, record.name


def best_trial(records: list[TrialRecord]) -> TrialRecord | None:
    """The usable trial with the lowest eval_loss. A diverged or failed trial is never chosen,
    whatever it scored before."""
    usable = [record for record in records if record.status in USABLE and record.best]
    return min(usable, key=_ranking, default=None)


def mark_ended(paths: TrialPaths, status: str, reason: str) -> None:
    """Writes how a trial ended, unless its worker already wrote it."""
    if paths.status.exists():
        return
    rows = read_json_lines(paths.metrics)
    last = rows[-1] if rows else {"examples": 0, "steps": 0}
    write_state(
        paths.status,
        {"status": status, "reason": reason, "examples": last["examples"], "steps": last["steps"]},
    )
