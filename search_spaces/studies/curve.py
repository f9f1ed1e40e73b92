"""The mean loss curve of an arm over its seeds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from search_spaces.studies.points import Point, Unsettled, losses_by_seed

WINDOW_DECADES = 0.5
"""How far from the best point a fit looks; all seeds run this window (`grid.py`)."""
_NEAR = 1e-3  # decades: learning rates are rounded to six digits, steps are hundreds of times this

Row = tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class MeanCurve:
    """An arm's losses by learning rate, averaged over the seeds.

    Attributes:
        log10_lrs: every learning rate that was run, ascending.
        losses: mean loss in nats/token, each seed's offset removed where not all seeds ran;
            math.inf where a run of any seed diverged.
        num_runs: seeds that ran it.
        best: index of the lowest loss among the learning rates that all seeds ran.
        by_seed: losses of each seed in the order of `log10_lrs`; None where it did not run.
        edge: why the best point has no finite neighbour on both sides; None if it has.
    """

    log10_lrs: tuple[float, ...]
    losses: tuple[float, ...]
    num_runs: tuple[int, ...]
    best: int
    by_seed: dict[int, Row]
    edge: Unsettled | None

    @cached_property
    def reach(self) -> range:
        """Indices around the best one, up to the nearest diverged run on each side."""
        low = high = self.best
        while low > 0 and math.isfinite(self.losses[low - 1]):
            low -= 1
        while high + 1 < len(self.losses) and math.isfinite(self.losses[high + 1]):
            high += 1
        return range(low, high + 1)

    @cached_property
    def window(self) -> list[int]:
        """Indices within WINDOW_DECADES of the best one, and those of its shared neighbours."""
        shared = [i for i in self.reach if self.is_shared(i)]
        place = shared.index(self.best)
        low, high = shared[max(place - 1, 0)], shared[min(place + 1, len(shared) - 1)]
        middle = self.log10_lrs[self.best]
        return [
            i
            for i in self.reach
            if low <= i <= high or abs(self.log10_lrs[i] - middle) <= WINDOW_DECADES + _NEAR
        ]

    def is_shared(self, i: int) -> bool:
        """Whether all seeds ran a learning rate."""
        return self.num_runs[i] == len(self.by_seed)


def mean_curve(points: Iterable[Point]) -> MeanCurve | Unsettled:
    """The mean curve of an arm, or why it has none.

    Raises:
        ValueError: two runs of one learning rate and seed.
    """
    losses = losses_by_seed(points)
    rates = sorted({rate for curve in losses.values() for rate in curve})
    rows: dict[int, Row] = {
        seed: tuple(curve.get(rate) for rate in rates) for seed, curve in losses.items()
    }
    plain = [_mean([row[i] for row in rows.values()]) for i in range(len(rates))]
    if not any(map(math.isfinite, plain)):
        return Unsettled(reason="no run with a finite loss", side="low" if rates else "none")
    num_runs = [sum(row[i] is not None for row in rows.values()) for i in range(len(rates))]
    shared = [i for i, n in enumerate(num_runs) if n == len(rows) and math.isfinite(plain[i])]
    if not shared:
        return Unsettled(reason="no learning rate that all seeds ran to the end")
    best = min(shared, key=lambda i: (plain[i], i))
    near = [i for i in shared if abs(math.log10(rates[i] / rates[best])) <= WINDOW_DECADES + _NEAR]
    return MeanCurve(
        log10_lrs=tuple(map(math.log10, rates)),
        losses=tuple(_without_offsets(rows, plain, near)),
        num_runs=tuple(num_runs),
        best=best,
        by_seed=rows,
        edge=_edge(rates, plain, shared, best),
    )


def _mean(losses: Sequence[float | None]) -> float:
    ran = [loss for loss in losses if loss is not None]
    return sum(ran) / len(ran)


def _edge(
    rates: Sequence[float], losses: Sequence[float], shared: Sequence[int], best: int
) -> Unsettled | None:
    place = shared.index(best)
    below = shared[place - 1] if place else -1
    above = shared[place + 1] if place + 1 < len(shared) else len(rates)
    diverged = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    point = f"the best point, {rates[best]:.3g},"
    if any(best < i < above for i in diverged):
        return Unsettled(reason=f"{point} stands beside a diverged run", side="high")
    if any(below < i < best for i in diverged):
        return Unsettled(reason=f"{point} stands just above a diverged run", side="low")
    if above == len(rates):
        return Unsettled(reason=f"{point} is the highest that all seeds ran", side="high")
    if below < 0:
        return Unsettled(reason=f"{point} is the lowest that all seeds ran", side="low")
    return None


def _without_offsets(
    rows: dict[int, Row], plain: Sequence[float], near: Sequence[int]
) -> list[float]:
    """Means of losses from which each seed's offset to the mean over `near` is taken."""
    offsets = {
        seed: sum((row[i] or 0.0) - plain[i] for i in near) / len(near)
        for seed, row in rows.items()
    }
    return [
        _mean([None if (y := row[i]) is None else y - offsets[seed] for seed, row in rows.items()])
        for i in range(len(plain))
    ]
