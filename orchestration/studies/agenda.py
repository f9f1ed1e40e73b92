"""Which points of a study are still to run, decided from what is on disk. Imports neither torch nor ray."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from orchestration.results import TrialRecord, read_trial
from orchestration.studies.arms import Arm
from orchestration.studies.config import StudyConfig
from orchestration.trials import known_names
from search_spaces import doctrine
from search_spaces.candidate import Candidate, trial_name
from search_spaces.studies.grid import next_points
from search_spaces.studies.points import Point
from trainers.mirror import local_folder, shown
from trainers.paths import RunPaths, TrialPaths, copy_file, read_state, remove_file, write_state

MEASURED = ("finished", "diverged")
"""Ends of a trial that are results: a point with a loss, or one without."""
OWN_KEYS = ("folder", "num_threads", "max_tokens", "micro_batch_size", "keep_weights")
"""Keys of a trial's config.json that do not decide what it measures (but for rounding)."""


class Agenda:
    """The work of a study.

    Args:
        make: a candidate -> its trial's dict.
        sources: other studies whose equal trials are taken over.
        in_turn: LoRA arms wait until full fine-tuning is through, as where one worker group must not
            change between the two all the time.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        config: StudyConfig,
        run: RunPaths,
        make: Callable[[Candidate], dict[str, Any]],
        *,
        sources: Sequence[RunPaths] = (),
        in_turn: bool = False,
    ) -> None:
        self.arms, self.config, self.run, self.make = arms, config, run, make
        self.sources, self.in_turn = sources, in_turn
        self.asked: set[str] = set()
        self._ended: dict[str, TrialRecord] = {}

    def take(self) -> list[dict[str, Any]]:
        """The dicts of the trials that can be begun now, each given once; their config.json is written.
        Empty while others must end first, and at the end."""
        while True:
            wanted, adopted = self._wanted(), False
            new: list[dict[str, Any]] = []
            for candidate in wanted:
                trial = self.make(candidate)
                if adopt(trial, self.sources):
                    adopted = True
                else:
                    new.append(trial)
            for trial in new:
                self.asked.add(trial["name"])
                write_state(TrialPaths(local_folder(trial["folder"])).config, trial)
            if new or not adopted:
                return new

    def is_complete(self) -> bool:
        """Whether every arm has all its points."""
        records = self.records()
        return not any(self._open(arm, records) or self._of(arm, records) for arm in self.arms)

    def _wanted(self) -> list[Candidate]:
        found: list[Candidate] = []
        records = self.records()
        full = [arm for arm in self.arms if arm.full_finetune]
        for arm in full:
            found += self._of(arm, records)
        busy = any(self._open(arm, records) for arm in full)
        if self.in_turn and (found or busy):
            return found
        for arm in self.arms:
            if not arm.full_finetune:
                found += self._of(arm, records)
        return found

    def _of(self, arm: Arm, records: Iterable[TrialRecord]) -> list[Candidate]:
        """What an arm needs. While it has open trials it gets no new ones: what comes next would depend
        on which of them ended first."""
        open_trials = [Candidate.from_dict(r.candidate) for r in self._open(arm, records)]
        left = [candidate for candidate in open_trials if trial_name(candidate) not in self.asked]
        if open_trials:
            return left
        points = next_points(
            points_of(arm, records),
            grid=arm.grid,
            seeds=self.config.seed_list,
            step_decades=doctrine.LR_GRID_STEP_DECADES.value,
            window_decades=self.config.seed_window_decades,
            max_extensions=self.config.max_extensions,
        )
        tried = {record.name for record in records}  # those without a loss have failed
        wanted = [arm.candidate(rate, seed) for rate, seed in points]
        return [candidate for candidate in wanted if trial_name(candidate) not in tried]

    @staticmethod
    def _open(arm: Arm, records: Iterable[TrialRecord]) -> list[TrialRecord]:
        return [r for r in records_of(arm, records) if r.status == "unfinished"]

    def records(self) -> list[TrialRecord]:
        """Every trial of the run; what has ended is read once."""
        found = []
        for name in known_names(self.run):
            if name not in self._ended:
                record = read_trial(self.run.trial(name))
                if record.status == "unfinished":
                    found.append(record)
                    continue
                self._ended[name] = record
            found.append(self._ended[name])
        return found


def records_of(arm: Arm, records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The trials of an arm, by learning rate and seed."""
    found = [record for record in records if arm.holds(Candidate.from_dict(record.candidate))]
    return sorted(found, key=lambda r: (r.candidate["learning_rate"], r.candidate["seed"]))


def points_of(arm: Arm, records: Iterable[TrialRecord]) -> list[Point]:
    """What an arm measured: the loss at the end of the budget, infinite where a run diverged. A trial that
    failed for another reason is no point."""
    return [
        Point(
            learning_rate=record.candidate["learning_rate"],
            seed=record.candidate["seed"],
            loss=last_loss(record),
        )
        for record in records_of(arm, records)
        if record.status in MEASURED
    ]


def last_loss(record: TrialRecord) -> float:
    """eval_loss at the end of the budget: all arms are compared at equal examples."""
    return record.rows[-1]["eval_loss"] if record.status == "finished" else math.inf


def retry_failed(run: RunPaths) -> list[str]:
    """Makes trials that failed (out of memory, a dead worker) unended again; returns their names."""
    names = []
    for name in known_names(run):
        paths = run.trial(name)
        if read_trial(paths).status == "failed":
            remove_file(paths.status)
            names.append(name)
    return names


def adopt(trial: dict[str, Any], sources: Sequence[RunPaths]) -> bool:
    """Takes the numbers of an equal trial from another study, if one measured it."""
    target = TrialPaths(local_folder(trial["folder"]))
    for source in sources:
        found = source.trial(trial["name"])
        if not found.status.exists() or read_trial(found).status not in MEASURED:
            continue
        if _what(read_state(found.config)) == _what(trial):
            copy_file(found.metrics, target.metrics)
            write_state(target.config, trial | {"taken_from": shown(source.root)})
            copy_file(found.status, target.status)  # last: with it the trial has ended
            return True
    return False


def _what(trial: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in trial.items() if key not in (*OWN_KEYS, "taken_from")}
