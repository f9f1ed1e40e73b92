"""Which runs an arm of a learning-rate study still needs.

The first seed runs the whole grid, and the grid grows until the best point has points on both
sides; the other seeds run the window around that best point, and the window follows the mean.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from search_spaces import doctrine
from search_spaces.studies.curve import WINDOW_DECADES
from search_spaces.studies.points import Point, check_learning_rate, rounded_rate

STEP = 8
"""Positions in one step of the grid: a position is an eighth of a step from the first rate."""
FINEST_DECADES = 0.125
"""How fine a gap beside a diverged run is halved: about what a fit resolves anyway."""
_ROUNDING = 0.05  # positions: a user's grid need not lie exactly on the lattice

Curve = dict[float, float]
"""Loss by position; math.inf where a run of any seed diverged."""


def next_points(
    points: Iterable[Point],
    *,
    grid: Sequence[float],
    seeds: Sequence[int],
    step_decades: float = doctrine.LR_GRID_STEP_DECADES.value,
    window_decades: float = WINDOW_DECADES,
    max_extensions: int = 8,
) -> list[tuple[float, int]]:
    """The (learning rate, seed) runs that an arm still needs; none: it is settled, or given up.

    To be asked again after every batch of results, with the results: it never asks for a run that
    is there, and it ends, because the learning rates are bounded. An arm that is given up has its
    best point at the bound, or beside a diverged run at the finest gap; `arm_optimum` says which.

    Args:
        points: runs that ended, of any seed.
        grid: the arm's learning rates, log-spaced by `step_decades`.
        seeds: the first one runs the whole grid.
        step_decades: decades between neighbours of the grid, > 0.
        window_decades: how far from the best point all seeds run.
        max_extensions: steps that the grid may grow beyond each of its ends, >= 0.

    Raises:
        ValueError: no grid, no seed, a seed twice, or a step, window or bound below its least.
    """
    _check(grid, seeds, step_decades, window_decades, max_extensions)
    arm = _Arm.of(points, grid, seeds, step_decades / STEP, window_decades, max_extensions)
    for stage in arm.stages():
        missing = [(x, seed) for x, seed in stage if x not in arm.runs[seed]]
        if missing:
            return [(arm.rate_at(x), seed) for x, seed in dict.fromkeys(missing)]
    return []


@dataclass(frozen=True, kw_only=True)
class _Arm:
    """Runs by seed and position. Positions count eighths of a step from the grid's first rate."""

    grid: tuple[float, ...]
    runs: dict[int, Curve]
    rates: dict[float, float]
    anchor: float
    unit_decades: float
    window: float
    low: float
    high: float

    @classmethod
    def of(
        cls,
        points: Iterable[Point],
        grid: Sequence[float],
        seeds: Sequence[int],
        unit_decades: float,
        window_decades: float,
        max_extensions: int,
    ) -> "_Arm":
        anchor = grid[0]

        def position(rate: float) -> float:
            return round(math.log10(rate / anchor) / unit_decades, 2)

        runs: dict[int, Curve] = {seed: {} for seed in seeds}
        rates: dict[float, float] = {}
        for point in points:
            rates[position(point.learning_rate)] = point.learning_rate
            if point.seed in runs:
                runs[point.seed][position(point.learning_rate)] = point.loss
        for rate in grid:  # a rate that was run stands for one that differs by its rounding
            rates.setdefault(position(rate), rate)
        places = tuple(sorted({position(rate) for rate in grid}))
        return cls(
            grid=places,
            runs=runs,
            rates=rates,
            anchor=anchor,
            unit_decades=unit_decades,
            window=window_decades / unit_decades,
            low=places[0] - max_extensions * STEP,
            high=places[-1] + max_extensions * STEP,
        )

    def rate_at(self, x: float) -> float:
        """The learning rate at a position, to six digits: the same number whoever asks."""
        known = self.rates.get(x)
        return known or rounded_rate(self.anchor * 10 ** (x * self.unit_decades))

    def stages(self) -> Iterator[list[tuple[float, int]]]:
        """What is needed, in the order of need; a later stage counts on the earlier ones."""
        first, *others = self.runs
        yield [(x, first) for x in self.grid]
        curve = self._curve(first)
        yield [(x, first) for x in self._needed(curve, self.window)]
        if not _is_bracketed(curve):
            return
        best = _best(curve)
        window = [x for x, loss in curve.items() if math.isfinite(loss) and self._near(x, best)]
        yield [(x, seed) for seed in others for x in window]
        yield [(x, seed) for seed in others for x in self._needed(self._curve(seed), 0)]
        yield [(x, seed) for x in self._needed(self._mean(), self.window) for seed in self.runs]

    def _near(self, x: float, best: float | None) -> bool:
        return best is not None and abs(x - best) <= self.window + _ROUNDING

    def _diverged(self) -> Curve:
        return {
            x: math.inf
            for curve in self.runs.values()
            for x, loss in curve.items()
            if not math.isfinite(loss)
        }

    def _curve(self, seed: int) -> Curve:
        return self.runs[seed] | self._diverged()

    def _mean(self) -> Curve:
        """Mean loss where all seeds ran, and where any diverged."""
        curves = list(self.runs.values())
        shared = set[float](curves[0]).intersection(*curves[1:])
        mean = {x: sum(curve[x] for curve in curves) / len(curves) for x in shared}
        return mean | self._diverged()

    def _needed(self, curve: Curve, window: float) -> list[float]:
        """Positions that the curve's best one still needs around it, one to each side."""
        best = _best(curve)
        if best is None:  # all diverged, or nothing ran
            lower = min(curve, default=self.grid[0] + STEP) - STEP
            return [lower] if lower >= self.low else []
        return [
            x for side in (-1, 1) if (x := self._outward(curve, best, side, window)) is not None
        ]

    def _outward(self, curve: Curve, best: float, side: int, window: float) -> float | None:
        """The next position needed when walking from the best one to the end of the window."""
        x = best
        while x == best or abs(x - best) + STEP <= window + _ROUNDING:
            ahead = min(
                (p for p in curve if (p - x) * side > 0), key=lambda p: abs(p - best), default=None
            )
            if ahead is None or abs(ahead - x) > STEP + 2 * _ROUNDING:
                wanted = float(round(x + side * STEP))
                return wanted if self.low <= wanted <= self.high else None
            if not math.isfinite(curve[ahead]):
                return self._halfway(best, ahead) if x == best else None
            x = ahead
        return None

    def _halfway(self, best: float, diverged: float) -> float | None:
        gap = abs(diverged - best) / 2 * self.unit_decades
        finest = FINEST_DECADES - _ROUNDING * self.unit_decades
        return float(round((best + diverged) / 2)) if gap >= finest else None


def _best(curve: Curve) -> float | None:
    finite = [x for x, loss in curve.items() if math.isfinite(loss)]
    return min(finite, key=lambda x: (curve[x], x), default=None)


def _is_bracketed(curve: Curve) -> bool:
    """Whether the best position has a finite neighbour on both sides."""
    best = _best(curve)
    places = sorted(curve)
    if best is None or best in (places[0], places[-1]):
        return False
    i = places.index(best)
    return math.isfinite(curve[places[i - 1]]) and math.isfinite(curve[places[i + 1]])


def _check(
    grid: Sequence[float],
    seeds: Sequence[int],
    step_decades: float,
    window_decades: float,
    max_extensions: int,
) -> None:
    for rate in grid:
        check_learning_rate(rate)
    if not grid or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"grid and seeds must not be empty and no seed may come twice, got {list(grid)} and "
            f"{list(seeds)}"
        )
    if step_decades <= 0 or window_decades < 0 or max_extensions < 0:
        raise ValueError(
            "step_decades must be > 0, window_decades and max_extensions >= 0, got "
            f"{step_decades}, {window_decades} and {max_extensions}"
        )
