"""Score against learning rate in a sweep: its curves, and where each is best. Numbers only.

A curve holds the trials that differ in learning rate and seed alone. It is fitted where they can be compared: trials
that ran to their ends, at no less than three learning rates, the best one inside.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestration.results import TrialRecord, usable
from search_spaces.candidate import GRID_FIELDS
from search_spaces.studies.optimum import ArmOptimum, RateOptimum, arm_optimum, one_seed_optimum
from search_spaces.studies.points import Point, Unsettled

MOST_VALUES = 8
"""A setting of more values than this is drawn at random: curves are not told apart by it."""
NAMES = {"lora_rank": "rank", "global_batch_size": "batch", "lora_alpha": "alpha"}
"""Settings by the names that people read; the others go by their own."""
Edge = Literal["", "lowest", "highest"]


@dataclass(frozen=True, kw_only=True)
class RateCurve:
    """Trials of one curve.

    Args:
        label: what its trials share, and others do not.
        records: by learning rate.
        optimum: where it is best, or why nobody can say.
        edge: whether the best of its trials is the lowest or the highest learning rate that was tried.
    """

    label: str
    records: tuple[TrialRecord, ...]
    optimum: RateOptimum | Unsettled
    edge: Edge

    @property
    def lora_rank(self) -> int:
        return self.records[0].candidate["lora_rank"]

    @property
    def best(self) -> TrialRecord | None:
        """The best of its trials that can be chosen."""
        return best_of(self.records)


def best_of(records: Iterable[TrialRecord]) -> TrialRecord | None:
    """The usable trial with the best score, as it stands here."""
    return min(usable(records), key=lambda record: record.best_loss, default=None)


def rate_curves(records: Sequence[TrialRecord]) -> list[RateCurve]:
    """The curves of a sweep, by rank, then by what else they differ in."""
    axes = varied_axes(records)
    groups: dict[tuple[Any, ...], list[TrialRecord]] = defaultdict(list)
    for record in records:
        groups[tuple(value_of(record, axis) for axis in axes)].append(record)
    return [_curve(dict(zip(axes, key, strict=True)), groups[key]) for key in sorted(groups)]


def varied_axes(records: Sequence[TrialRecord]) -> list[str]:
    """The settings in which trials differ, rank always among them and first; none that is drawn at random."""
    others = [axis for axis in GRID_FIELDS if axis not in ("lora_rank", "seed")]
    found = [
        axis for axis in others if 1 < len({value_of(r, axis) for r in records}) <= MOST_VALUES
    ]
    return ["lora_rank", *found]


def value_of(record: TrialRecord, axis: str) -> Any:
    """A trial's value of a setting, as it can be compared and shown."""
    value = getattr(record.settings, axis)
    return "+".join(value) if axis == "target" else value


def axis_text(axis: str, value: Any) -> str:
    """A value with its name: rank 8."""
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return shown if axis == "target" else f"{NAMES.get(axis, axis)} {shown}"


def _curve(values: dict[str, Any], members: list[TrialRecord]) -> RateCurve:
    members = sorted(members, key=lambda r: (r.candidate["learning_rate"], r.name))
    return RateCurve(
        label=", ".join(axis_text(axis, value) for axis, value in values.items()),
        records=tuple(members),
        optimum=_optimum(members),
        edge=edge_of(members),
    )


def edge_of(records: Sequence[TrialRecord]) -> Edge:
    """Whether the best trial has the lowest or the highest learning rate of several that were tried. One beyond which
    trials diverged has not: a larger grid would not help."""
    best = best_of(records)
    rates = sorted({r.candidate["learning_rate"] for r in records if r.rows})
    if best is None or len(rates) < 2:
        return ""
    rate = best.candidate["learning_rate"]
    return "lowest" if rate == rates[0] else "highest" if rate == rates[-1] else ""


def _optimum(members: Sequence[TrialRecord]) -> RateOptimum | Unsettled:
    differing = [
        axis
        for axis in GRID_FIELDS
        if axis != "seed" and len({value_of(r, axis) for r in members}) > 1
    ]
    if differing:
        return Unsettled(reason=f"its trials differ in {', '.join(differing)} too: no curve")
    points = [point for record in members for point in _points(record)]
    if not points:
        return Unsettled(reason="no trial ran to its end")
    found = _fitted(points)
    stopped = [r.candidate["learning_rate"] for r in members if r.status == "stopped"]
    if isinstance(found, Unsettled) and stopped:
        return Unsettled(
            reason=f"{len(stopped)} of its {len(members)} trials were stopped early, and those that ended are too few "
            "or at one side: losses of unequal budgets are not fitted"
        )
    return found


def _points(record: TrialRecord) -> list[Point]:
    rate, seed = record.candidate["learning_rate"], record.candidate["seed"]
    if record.status == "finished" and record.best:
        return [Point(learning_rate=rate, seed=seed, loss=record.best_loss)]
    return (
        [Point(learning_rate=rate, seed=seed, loss=math.inf)] if record.status == "diverged" else []
    )


def _fitted(points: list[Point]) -> RateOptimum | Unsettled:
    """By all seeds, with an interval, where they suffice for that; else by the one with most learning rates."""
    seeds = [point.seed for point in points]
    if len(set(seeds)) > 1 and isinstance(found := arm_optimum(points), ArmOptimum):
        return found
    most = max(sorted(set(seeds)), key=seeds.count)
    return one_seed_optimum([point for point in points if point.seed == most])


def as_arm(curve: RateCurve) -> dict[str, Any]:
    """A curve as results.json of a study has its arms, which is what the chart takes."""
    return {
        "label": curve.label,
        "points": [_drawn(record) for record in curve.records],
        "fit": fit_dict(curve.optimum) if isinstance(curve.optimum, RateOptimum) else None,
    }


def _drawn(record: TrialRecord) -> dict[str, Any]:
    return {
        "learning_rate": record.candidate["learning_rate"],
        "seed": record.candidate["seed"],
        "status": record.status,
        "reason": record.reason,
        "eval_loss": record.best_loss if record.is_usable else None,
        "base_loss": record.base_loss,
        "trial": record.name,
    }


def fit_dict(found: RateOptimum) -> dict[str, Any]:
    """A fit as results.json of a study has it. low and high are None where one seed was run."""
    keys = ("learning_rate", "loss", "tolerance_low", "tolerance_high", "tolerance_frac")
    return {
        **{key: getattr(found, key) for key in (*keys, "open_low", "open_high")},
        "low": found.low if isinstance(found, ArmOptimum) else None,
        "high": found.high if isinstance(found, ArmOptimum) else None,
        "parabola": dict(vars(found.parabola)),
    }
