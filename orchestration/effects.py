"""What a setting seems to do in a sweep: the best score at each of its values, across all others. Numbers only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.lr_curves import best_of, value_of
from orchestration.results import TrialRecord, usable
from search_spaces.candidate import Candidate

AXES = ("lora_rank", "global_batch_size")
"""The settings whose effects a report shows."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One value of a setting.

    Args:
        losses: eval_loss of every usable trial that has it.
        best: the best of them.
        num_trials: usable or not.
    """

    value: Any
    losses: tuple[float, ...]
    best: TrialRecord
    num_trials: int

    @property
    def loss(self) -> float:
        return self.best.best_loss


def axis_effect(records: Sequence[TrialRecord], axis: str) -> list[Level]:
    """The values of a setting at which a trial can be chosen, ascending; none where there are fewer than two."""
    levels = []
    for value in sorted({value_of(record, axis) for record in records}):
        members = [record for record in records if value_of(record, axis) == value]
        best = best_of(members)
        if best is not None:
            losses = tuple(record.best_loss for record in usable(members))
            levels.append(Level(value=value, losses=losses, best=best, num_trials=len(members)))
    return levels if len(levels) > 1 else []


def seed_noise(records: Sequence[TrialRecord]) -> float | None:
    """Standard deviation of eval_loss between seeds of one candidate, pooled over the candidates that ended with
    several; None where none did. Those that were stopped early are left out: their losses are of other budgets."""
    groups: dict[Candidate, list[float]] = {}
    for record in records:
        if record.status == "finished" and record.best:
            groups.setdefault(record.but_for_seed, []).append(record.best_loss)
    several = [losses for losses in groups.values() if len(losses) > 1]
    if not several:
        return None
    squares = sum(sum((x - sum(g) / len(g)) ** 2 for x in g) for g in several)
    return (squares / sum(len(losses) - 1 for losses in several)) ** 0.5
