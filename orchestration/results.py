"""What a sweep found, read from the trials' own files: never from a scheduler's memory."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestration.objective import LOSS, Objective, objective_named, objective_of_rows
from search_spaces.candidate import Candidate
from trainers.credentials import masked
from trainers.integrity import DamagedError, sound_rows
from trainers.metrics import BY_LOSS, Judge
from trainers.mirror import fetch
from trainers.paths import RunPaths, TrialPaths, read_json_lines, read_state, write_state

USABLE = ("finished", "stopped")


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial as it ended.

    Args:
        notes: what went wrong with its files and was mended.
        judge: by what it is judged.
        repeats: the trial whose candidate it trains on another seed.
        clone_of: the trial whose candidate its own was made of, while the sweep ran.
    """

    name: str
    candidate: dict[str, Any]
    status: str
    reason: str
    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()
    judge: Judge = BY_LOSS
    repeats: str | None = None
    clone_of: str = ""

    @property
    def best(self) -> dict[str, Any] | None:
        """Its best evaluation, whose weights are kept; None without one."""
        return self.judge.best_row(self.rows)

    @property
    def best_loss(self) -> float:
        """What is minimised, at its best evaluation; inf without one."""
        return self.judge.loss(self.best) if self.best else math.inf

    @property
    def is_usable(self) -> bool:
        """Whether it has a score that counts: a diverged or failed trial never has, whatever it scored before."""
        return self.status in USABLE and self.best is not None

    @property
    def usable_loss(self) -> float:
        """`best_loss` of one that is usable; inf of another."""
        return self.best_loss if self.is_usable else math.inf

    @property
    def objective(self) -> Objective:
        """What it is judged by, as people know it."""
        key = self.judge.key
        return objective_of_rows(self.rows) if key == LOSS.key else objective_named(key)

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
    def but_for_seed(self) -> Candidate:
        """The candidate as all its seeds have it."""
        return replace(self.settings, seed=0)

    @property
    def base_loss(self) -> float | None:
        """What is minimised, of the untouched base, measured before the first step."""
        return next((self.judge.loss(row) for row in self.rows if row["steps"] == 0), None)


def read_trial(paths: TrialPaths) -> TrialRecord:
    """A trial from its folder; without a status it has not ended."""
    status = (
        read_state(paths.status)
        if paths.status.exists()
        else {"status": "unfinished", "reason": ""}
    )
    config = read_state(paths.config)
    return TrialRecord(
        name=paths.root.name,
        candidate=config["candidate"],
        status=status["status"],
        reason=masked(status["reason"]),
        rows=tuple(read_json_lines(paths.metrics)),
        notes=notes_of(paths),
        judge=Judge(**config.get("judge", {})),
        repeats=config.get("repeats"),
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
    return record.status not in USABLE, record.best_loss, record.name


def best_trial(records: list[TrialRecord]) -> TrialRecord | None:
    """The trial that is chosen. A diverged or failed trial never is, whatever it scored before.

    Of several that were confirmed on new seeds the one with the best mean there, at its best seed; else the usable
    trial with the best score, or within its judge's tolerance of that the one with the lowest learning rate.
    """
    if repeats := repeats_of(records):
        first = min(repeats, key=lambda name: (mean_loss(repeats[name]), name))
        return min(usable([r for r in records if first in (r.name, r.repeats)]), key=_ranking)
    return picked(usable(records))


def usable(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Those that have a score that counts."""
    return [record for record in records if record.is_usable]


def picked(found: Sequence[TrialRecord]) -> TrialRecord | None:
    """The one of usable trials that its judge's rule takes."""
    if not found:
        return None
    best = min(found, key=_ranking)
    limit = best.best_loss + best.judge.lr_tolerance * abs(best.best_loss)
    near = [record for record in found if record.best_loss <= limit]
    if not best.judge.lr_tolerance:
        return best
    return min(near, key=lambda record: (record.candidate["learning_rate"], *_ranking(record)))


def repeats_of(records: Iterable[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Trial -> those that repeat its candidate on new seeds; nothing where one of them was kept from its end."""
    found: dict[str, list[TrialRecord]] = {}
    for record in records:
        if record.repeats is not None:
            found.setdefault(record.repeats, []).append(record)
    cut = any(r.status in ("unfinished", "stopped") for members in found.values() for r in members)
    return {} if cut else found


def mean_loss(members: Sequence[TrialRecord]) -> float:
    """Mean over seeds; inf where one of them diverged or failed."""
    return statistics.fmean(record.usable_loss for record in members)


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
