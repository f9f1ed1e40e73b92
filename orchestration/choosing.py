"""Which trial a sweep hands back, and how sure that is: the best two trained again on new seeds, compared."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestration.config import SweepConfig
from orchestration.objective import Objective
from orchestration.results import (
    USABLE,
    TrialRecord,
    mean_loss,
    picked,
    read_trials,
    repeats_of,
    usable,
)
from search_spaces.candidate import Candidate
from search_spaces.studies.student import t_quantile_95
from trainers.paths import RunPaths


def repeat_names(
    run: RunPaths,
    write: Callable[[Candidate, str | None], dict[str, Any]],
    config: SweepConfig,
) -> list[str]:
    """The trials that repeat the best two of a search that has ended, which are written where they are not yet.

    Args:
        write: see trials.TrialMaker.write.
    """
    records = read_trials(run)
    known = [record.name for record in records if record.repeats is not None]
    if len(known) == 2 * config.confirm:
        return known
    two = top_two([record for record in records if record.repeats is None])
    first_seed = 1 + max(record.candidate["seed"] for record in records if record.repeats is None)
    names = []
    for seed in range(first_seed, first_seed + config.confirm if len(two) == 2 else first_seed):
        for record in two:
            candidate = replace(record.settings, seed=seed)
            names.append(write(candidate, record.name)["name"])
    return names


def top_two(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trial that would be chosen, and the one that would be without it."""
    first = picked(found := usable(records))
    if first is None:
        return []
    second = picked([r for r in found if r.but_for_seed != first.but_for_seed])
    return [first, second] if second else [first]


@dataclass(frozen=True)
class Confirmation:
    """The best two on new seeds alone: the seeds of the search chose them, and flatter them.

    Args:
        names: of the two trials of the search, the chosen one first.
        losses: what is minimised, of each on each new seed, in the order of the seeds; inf where one diverged or
            failed.
        objective: what people know that as.
    """

    names: tuple[str, str]
    losses: tuple[tuple[float, ...], tuple[float, ...]]
    objective: Objective

    @property
    def difference(self) -> tuple[float, float]:
        """Mean of the second's loss minus the first's on the same seeds, and the half width of its 95% interval."""
        pairs = zip(*self.losses, strict=True)
        differences = [second - first for first, second in pairs]
        mean = statistics.fmean(differences)
        if not math.isfinite(mean):
            return mean, 0.0
        spread = statistics.stdev(differences) / math.sqrt(len(differences))
        return mean, spread * t_quantile_95(len(differences) - 1)

    @property
    def tells_apart(self) -> bool:
        """Whether the first is better beyond what seeds do."""
        mean, half = self.difference
        return mean > half

    @property
    def sentence(self) -> str:
        """What was found, for people."""
        first, second = (self.objective.of(statistics.fmean(each)) for each in self.losses)
        mean, half = self.difference
        seeds = len(self.losses[0])
        key, (one, other) = self.objective.key, self.names
        found = f"on {seeds} new seeds {one} has {key} {first:.4f} and {other} {second:.4f}"
        if not math.isfinite(mean):
            return f"{found}: the second diverged or failed on one"
        interval = f"difference {mean:.4f}, 95% interval {mean - half:.4f} to {mean + half:.4f}"
        verdict = "the first is better" if self.tells_apart else "they cannot be told apart"
        return f"{found} ({interval}): {verdict}"


def confirmation(records: Sequence[TrialRecord]) -> Confirmation | None:
    """How the best two compare on new seeds; None where that was not asked for, or was not ended."""
    repeats = repeats_of(records)
    if len(repeats) != 2:
        return None
    names = sorted(repeats, key=lambda name: (mean_loss(repeats[name]), name))
    losses = [_by_seed(repeats[name]) for name in names]
    if not math.isfinite(statistics.fmean(losses[0])):
        return None  # neither holds
    objective = repeats[names[0]][0].objective
    return Confirmation((names[0], names[1]), (losses[0], losses[1]), objective)


def choice_lines(records: Sequence[TrialRecord], best: TrialRecord | None) -> list[str]:
    """Why the best is the best, where that is not simply the lowest score, and what limited the search."""
    lines = []
    if best is not None and (lowest := min(usable(records), key=lambda r: r.best_loss)) is not best:
        lines.append(_why_not(lowest, best))
    if found := confirmation(records):
        lines.append(found.sentence)
    return lines + _forgetting_lines(records) + _limit_lines(records)


def _why_not(lowest: TrialRecord, best: TrialRecord) -> str:
    score, tolerance = best.objective, best.judge.lr_tolerance
    why = "it is better in the mean over new seeds"
    if best.repeats is None and tolerance:
        why = f"its learning rate is lower, and {tolerance:.2%} were allowed"
    return (
        f"{best.name} ({score.key} {score.text(best.best_loss)}) is chosen before {lowest.name} "
        f"({score.text(lowest.best_loss)}): {why}"
    )


def _forgetting_lines(records: Sequence[TrialRecord]) -> list[str]:
    trained = [r for r in records if r.status in USABLE and any(row["steps"] for row in r.rows)]
    out = [record for record in trained if record.best is None]
    if not out or out[0].judge.max_forgetting is None:
        return []
    return [
        f"{len(out)} of {len(trained)} trials forgot more than max_forgetting {out[0].judge.max_forgetting:g} at every "
        "evaluation and cannot be chosen"
    ]


def is_of_limit(reason: str) -> bool:
    """Whether a trial was ended because the sweep's time was up."""
    return reason.startswith(("time_budget ", "max_cost "))


def _limit_lines(records: Sequence[TrialRecord]) -> list[str]:
    cut = [record for record in records if is_of_limit(record.reason)]
    begun = sum(bool(record.rows) for record in cut)
    if not cut:
        return []
    limit = cut[0].reason.partition(" was used up")[0]
    return [
        f"{limit} was used up: {begun} trials were stopped, {len(cut) - begun} never began; best of what there is"
    ]


def _by_seed(members: Sequence[TrialRecord]) -> tuple[float, ...]:
    ordered = sorted(members, key=lambda record: record.candidate["seed"])
    return tuple(record.usable_loss for record in ordered)
