"""A running sweep as its driver hears of it. Numbers only: no clock of its own, no terminal."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestration.objective import Objective
from orchestration.results import TrialRecord

OPEN = ("waiting", "starting", "running")
"""What a trial is that has not ended."""


@dataclass
class TrialState:
    """One trial. last, best: eval_loss of its last evaluation, and its lowest; heard: when something was heard of it
    last, seconds of the driver's clock."""

    name: str
    status: str = "waiting"
    examples: int = 0
    last: float | None = None
    best: float | None = None
    heard: float | None = None
    rate: float | None = None
    """Examples a second between its last two evaluations."""

    @property
    def is_open(self) -> bool:
        return self.status in OPEN


@dataclass(kw_only=True)
class SweepState:
    """All trials of a sweep, and the worker groups as far as they are known.

    Args:
        discarded: rule -> how many candidates it discarded before any trial.
        began: when the driver began, seconds of its clock.
        num_groups: worker groups; None: not known (engine solo).
        packs: see progress.Packs.
        ready_at: when the first group had loaded the base.
        gained: examples that trials were trained on since this driver began.
    """

    objective: Objective
    num_examples: int
    eval_every: int | None
    num_trials: int
    num_discarded: int
    discarded: dict[str, int]
    began: float
    trials: dict[str, TrialState]
    num_groups: int | None = None
    packs: Mapping[str, list[str]] = field(default_factory=dict)
    ready_at: float | None = None
    gained: int = 0
    last_line: str = ""
    is_over: bool = False

    def saw_packs(self, packs: Mapping[str, list[str]], now: float) -> None:
        """The groups that are ready, and their trials."""
        self.packs = packs
        if packs and self.ready_at is None:
            self.ready_at = now

    def was(self, record: TrialRecord) -> None:
        """A trial as an earlier driver left it."""
        trial = self.trials.setdefault(record.name, TrialState(record.name))
        if record.rows:
            last = record.rows[-1]
            trial.examples, trial.last = last["examples"], record.judge.loss(last)
        trial.best = record.best_loss if record.best else None
        if record.status != "unfinished":
            trial.status = record.status

    def started(self, name: str, now: float) -> None:
        trial = self.trials.setdefault(name, TrialState(name))
        trial.status, trial.heard = "starting", now
        if self.num_groups is None and self.ready_at is None:
            self.ready_at = now

    def reported(self, name: str, examples: int, eval_loss: float, now: float) -> None:
        trial = self.trials.setdefault(name, TrialState(name))
        gained = max(0, examples - trial.examples)
        if trial.heard is not None and now > trial.heard:
            trial.rate = gained / (now - max(trial.heard, self.ready_at or trial.heard))
        trial.status, trial.examples, trial.last, trial.heard = "running", examples, eval_loss, now
        if math.isfinite(eval_loss):
            trial.best = min(eval_loss, math.inf if trial.best is None else trial.best)
        self.gained += gained

    def ended(self, name: str, status: str) -> None:
        self.trials.setdefault(name, TrialState(name)).status = status

    @property
    def num_ended(self) -> int:
        return sum(not trial.is_open for trial in self.trials.values())

    @property
    def counts(self) -> Counter[str]:
        """Status -> trials; those that were not proposed yet wait."""
        found = Counter(trial.status for trial in self.trials.values())
        found["waiting"] += max(0, self.num_trials - len(self.trials))
        return found

    @property
    def best(self) -> TrialState | None:
        """The trial with the lowest loss so far; one that diverged or failed is never chosen."""
        usable = (*OPEN, "finished", "stopped")
        scored = [t for t in self.trials.values() if t.best is not None and t.status in usable]
        return min(scored, key=lambda trial: (trial.best or 0.0, trial.name), default=None)

    def rate(self, now: float) -> float | None:
        """Examples a second of all groups together, since the first was ready; None: nothing was heard yet."""
        if self.ready_at is None or not self.gained or now <= self.ready_at:
            return None
        return self.gained / (now - self.ready_at)

    def left_s(self, now: float) -> float | None:
        """Seconds until every trial has run to its end, at this pace; None: nobody knows yet."""
        if (rate := self.rate(now)) is None:
            return None
        open_ones = [trial for trial in self.trials.values() if trial.is_open]
        left = sum(max(0, self.num_examples - trial.examples) for trial in open_ones)
        left += max(0, self.num_trials - len(self.trials)) * self.num_examples
        return left / rate

    def rung(self, trial: TrialState) -> str:
        """Evaluations that a trial has had, of those that it will have: 2/4."""
        if self.eval_every is None:
            return ""
        done = math.ceil(trial.examples / self.eval_every)
        return f"{done}/{math.ceil(self.num_examples / self.eval_every)}"

    def pack_of(self, name: str) -> str:
        """The group of a trial, and how many share it now: group-0, K=2."""
        for group, names in self.packs.items():
            if name in names:
                return f"{group}, K={len(names)}"
        return ""
