"""The lowest point of a mean loss curve, and how well it is known: a parabola that may bend.

In x = log10(LR) the curve near its lowest point m is taken as
`loss + curvature * 2 (e^(b u) - 1 - b u) / b^2`, u = x - m: the parabola for bend b = 0, steeper on
the right for b > 0, which is how learning-rate curves look. Least squares over the window, the
seeds together. What is not known about m comes from two things:

- noise: what a seed and a learning rate do together, beside what each does alone. Its variance is
  read off the runs near the best point, and widened for its degrees of freedom (Student's t).
- misfit: no curve is of this shape. A point at height h above the best one counts with an error of
  MISFIT_FRAC x h, more when it lies more than a step away, and every point with FLOOR_FRAC x the
  height of the lower side of the window: the wall of a curve says little about its floor, and the
  floor may be flatter than any parabola.

The 95% interval holds every m whose best curve costs at most 1.96^2 more than the best of all.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from search_spaces import doctrine
from search_spaces.studies.curve import MeanCurve
from search_spaces.studies.points import Unsettled
from search_spaces.studies.student import t_quantile_95

BENDS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0)
"""Bends tried, per decade; at 6 the right side is 8 times as high as the left half a decade out."""
BEND_SCALE = 5.0
"""ASSUMPTION: a bend of this size costs as much as a misfit of one standard error."""
MISFIT_FRAC = 0.2
MISFIT_FRAC_PER_STEP = 0.2
FLOOR_FRAC = 0.03
"""ASSUMPTION: tuned on planted curves (kinks, cliffs, exponential walls, quartic floors): with them
the intervals of each kind cover at least 91%, of most 98%,
tests/search_spaces/test_study_coverage.py. Plateaus a third of a decade wide are beyond them."""
NOISE_FRAC = 0.3
"""ASSUMPTION: at height h runs may scatter by this times h more; such points weigh less."""
Z_95 = 1.959964
_REACH_DECADES = 1.0
_MESH_DECADES = 0.02
_LEAST_VARIANCE = 1e-10  # (1e-5 nats)^2: no loss in fp32 is known better
_LEAST_DETERMINANT = 1e-12  # of the product of the diagonal, its bound
_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class BentFit:
    """The lowest point of an arm's mean curve.

    Attributes:
        log10_lr: where it is.
        loss: mean loss there, nats/token.
        curvature: half the second derivative there, nats per decade squared.
        low: lower end of the 95% interval of log10_lr.
        high: its upper end.
        loss_error: half width of the 95% interval of `loss`, the seeds' common offset left out.
        shifts: where each seed's own curve has its lowest point, less log10_lr (linearized).
        offsets: how much higher than the mean each seed's curve lies there.
    """

    log10_lr: float
    loss: float
    curvature: float
    low: float
    high: float
    loss_error: float
    shifts: dict[int, float]
    offsets: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class _Window:
    """Points around the best one; x = 0 is the best. `variances` are those of the means."""

    origin: float
    xs: list[float]
    losses: list[float]
    variances: list[float]
    shared: list[int]
    deviations: dict[int, list[float]]
    low: float
    high: float
    flat_cost: float


class _Solution(NamedTuple):
    """Weighted least squares of one bend: start, slope and bow at x = 0, covariance, cost."""

    bend: float
    start: float
    slope: float
    bow: float
    covariance: tuple[tuple[float, float, float], ...]
    cost: float


class _Profile(NamedTuple):
    """Least cost, over all bends, of a curve whose lowest point lies at each place."""

    places: list[float]
    costs: list[float]
    solutions: list[_Solution | None]


def bent_fit(curve: MeanCurve, *, noise: bool = True) -> BentFit | Unsettled:
    """The lowest point of a curve, or why there is none.

    Args:
        curve: of at least two seeds.
        noise: False leaves the noise out of the interval: what more seeds cannot narrow.
    """
    if curve.edge is not None:
        return curve.edge
    if len(curve.by_seed) < 2:
        return Unsettled(reason="one seed gives no interval: run at least two")
    window = _window(curve, noise=noise)
    profile = _profile(window)
    place = min(range(len(profile.places)), key=profile.costs.__getitem__)
    best = profile.solutions[place]
    if best is None or window.flat_cost <= profile.costs[place] + Z_95**2:
        return Unsettled(reason="flat: the losses around the best point differ by their noise only")
    x = _lowest(best, profile.places[place])
    limit = min(best.cost, profile.costs[place]) + Z_95**2
    low, high = _crossing(profile, place, -1, limit), _crossing(profile, place, 1, limit)
    if low is None or high is None:
        open_side = "below" if low is None else "above"
        return Unsettled(
            reason=f"the best learning rate is not bounded {open_side} at 95%: the points near it "
            "differ too little for their noise, or lie too far apart"
        )
    return _described(window, best, x, min(low, x), max(high, x))


def _window(curve: MeanCurve, *, noise: bool) -> _Window:
    origin, lowest = curve.log10_lrs[curve.best], curve.losses[curve.best]
    xs = [curve.log10_lrs[i] - origin for i in curve.window]
    losses = [curve.losses[i] for i in curve.window]
    heights = [max(0.0, loss - lowest) for loss in losses]
    shared = [k for k, i in enumerate(curve.window) if curve.is_shared(i)]
    deviations = {
        seed: [(row[curve.window[k]] or 0.0) - losses[k] for k in shared]
        for seed, row in curve.by_seed.items()
    }
    variance = _LEAST_VARIANCE
    if noise:
        at_best = shared.index(curve.window.index(curve.best))
        variance += _noise_variance(deviations, [heights[k] for k in shared], at_best)
    mean = sum(losses[k] for k in shared) / len(shared)
    spread = sum((losses[k] - mean) ** 2 for k in shared)
    return _Window(
        origin=origin,
        xs=xs,
        losses=losses,
        variances=[
            variance / curve.num_runs[i] + misfit**2
            for i, misfit in zip(curve.window, _misfits(xs, heights), strict=True)
        ],
        shared=shared,
        deviations=deviations,
        low=max(-_REACH_DECADES, curve.log10_lrs[curve.reach[0]] - origin),
        high=min(_REACH_DECADES, curve.log10_lrs[curve.reach[-1]] - origin),
        flat_cost=spread * len(curve.by_seed) / variance,
    )


def _misfits(xs: list[float], heights: list[float]) -> list[float]:
    """How far each point may lie off any curve of the shape, nats."""
    left = max(height for x, height in zip(xs, heights, strict=True) if x <= 0)
    right = max(height for x, height in zip(xs, heights, strict=True) if x >= 0)
    fracs = [
        MISFIT_FRAC
        + MISFIT_FRAC_PER_STEP * max(0.0, abs(x) / doctrine.LR_GRID_STEP_DECADES.value - 1)
        for x in xs
    ]
    return [
        frac * height + FLOOR_FRAC * min(left, right)
        for frac, height in zip(fracs, heights, strict=True)
    ]


def _noise_variance(
    deviations: dict[int, list[float]], heights: list[float], at_best: int
) -> float:
    """Variance of a run beside what its seed and its learning rate explain, widened by Student's t.

    The weights begin with the best point and its neighbours, then follow the noise found: points
    where NOISE_FRAC x height is above it count less, for the degrees of freedom too.
    """
    weights = [float(abs(k - at_best) <= 1) for k in range(len(heights))]
    freedom, variance = 1.0, 0.0
    for _ in range(_ROUNDS):
        total = sum(weights)
        num_points = max(total**2 / sum(weight**2 for weight in weights), 3.0)
        freedom = (num_points - 1) * (len(deviations) - 1)
        squares = 0.0
        for row in deviations.values():
            mean = sum(w * y for w, y in zip(weights, row, strict=True)) / total
            squares += sum(w * (y - mean) ** 2 for w, y in zip(weights, row, strict=True))
        variance = squares / total * num_points / freedom
        scale = variance + _LEAST_VARIANCE
        weights = [1 / (1 + (NOISE_FRAC * height) ** 2 / scale) for height in heights]
    return variance * (t_quantile_95(int(freedom + 1e-9)) / Z_95) ** 2


def _profile(window: _Window) -> _Profile:
    steps = math.ceil((window.high - window.low) / _MESH_DECADES - 1e-9)
    places = [window.low + (window.high - window.low) * k / steps for k in range(steps + 1)]
    costs = [window.flat_cost] * len(places)
    solutions: list[_Solution | None] = [None] * len(places)
    for bend in BENDS:
        solution = _solve(window, bend)
        if solution is None:
            continue
        (_, _, _), (_, slope_var, cross), (_, _, bow_var) = solution.covariance
        for k, place in enumerate(places):
            lean = place if bend == 0 else math.expm1(bend * place) / bend
            # The constraint: no slope at the place. Least squares pay its square over its variance.
            slope = solution.slope + solution.bow * lean
            variance = slope_var + 2 * lean * cross + lean**2 * bow_var
            if solution.bow - (cross + bow_var * lean) * slope / variance <= 0:
                continue  # a highest point: the best curve with a lowest point there is flat
            cost = solution.cost + slope**2 / variance
            if cost < costs[k]:
                costs[k], solutions[k] = cost, solution
    return _Profile(places, costs, solutions)


def _bow(bend: float, x: float) -> float:
    return x * x / 2 if bend == 0 else (math.expm1(bend * x) - bend * x) / bend**2


def _solve(window: _Window, bend: float) -> _Solution | None:
    """Least squares of start + slope x + bow (e^(b x) - 1 - b x) / b^2, by the normal equations.

    None where the points cannot tell the three apart in floating point.
    """
    rows = [(1.0, x, _bow(bend, x)) for x in window.xs]
    weights = [1 / variance for variance in window.variances]
    weighted = list(zip(rows, weights, window.losses, strict=True))
    a, b, c, d, e, f = (
        sum(w * row[i] * row[j] for row, w, _ in weighted)
        for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
    )
    minors = (d * f - e * e, c * e - b * f, b * e - c * d)
    det = a * minors[0] + b * minors[1] + c * minors[2]
    if det <= _LEAST_DETERMINANT * a * d * f:
        return None
    inner = (a * f - c * c, b * c - a * e, a * d - b * b)
    covariance = (
        (minors[0] / det, minors[1] / det, minors[2] / det),
        (minors[1] / det, inner[0] / det, inner[1] / det),
        (minors[2] / det, inner[1] / det, inner[2] / det),
    )
    sides = [sum(w * row[i] * loss for row, w, loss in weighted) for i in range(3)]
    start, slope, bow = (sum(v * s for v, s in zip(row, sides, strict=True)) for row in covariance)
    cost = sum(w * (loss - start - slope * r[1] - bow * r[2]) ** 2 for r, w, loss in weighted)
    return _Solution(bend, start, slope, bow, covariance, cost + (bend / BEND_SCALE) ** 2)


def _lowest(solution: _Solution, place: float) -> float:
    """The solution's own lowest point, when it is the one that the mesh found."""
    if solution.bow <= 0:
        return place
    turn = -solution.slope / solution.bow
    if solution.bend != 0:
        if 1 + solution.bend * turn <= 0:
            return place
        turn = math.log1p(solution.bend * turn) / solution.bend
    return turn if abs(turn - place) <= _MESH_DECADES else place


def _crossing(profile: _Profile, place: int, side: int, limit: float) -> float | None:
    """Where the cost rises above the limit for the last time, linear between places."""
    ends = range(len(profile.places)) if side < 0 else range(len(profile.places) - 1, -1, -1)
    inner = next(k for k in ends if profile.costs[k] <= limit or k == place)
    outer = inner + side
    if not 0 <= outer < len(profile.places):
        return None
    inner_cost = min(profile.costs[inner], limit)
    share = (limit - inner_cost) / (profile.costs[outer] - inner_cost)
    return profile.places[inner] + share * (profile.places[outer] - profile.places[inner])


def _described(window: _Window, best: _Solution, x: float, low: float, high: float) -> BentFit:
    row = (1.0, x, _bow(best.bend, x))
    loss = best.start + best.slope * x + best.bow * row[2]
    variance = sum(row[i] * best.covariance[i][j] * row[j] for i in range(3) for j in range(3))
    second = best.bow * math.exp(best.bend * x)
    dip = window.losses[window.xs.index(0.0)] - loss
    shifts: dict[int, float] = {}
    offsets: dict[int, float] = {}
    for seed in window.deviations:
        offsets[seed], lean = _line(window, seed)
        shifts[seed] = min(max(x - lean / second, window.low), window.high) - x
    return BentFit(
        log10_lr=window.origin + x,
        loss=loss,
        curvature=second / 2,
        low=window.origin + low,
        high=window.origin + high,
        # The dip below the best point is the fit's own; nothing measured confirms it.
        loss_error=math.hypot(Z_95 * math.sqrt(variance), dip),
        shifts=shifts,
        offsets=offsets,
    )


def _line(window: _Window, seed: int) -> tuple[float, float]:
    """Weighted mean and slope, per decade, of a seed's deviations from the mean curve."""
    rows = [
        (1 / window.variances[k], window.xs[k], deviation)
        for k, deviation in zip(window.shared, window.deviations[seed], strict=True)
    ]
    total = sum(w for w, _, _ in rows)
    centre = sum(w * place for w, place, _ in rows) / total
    spread = sum(w * (place - centre) ** 2 for w, place, _ in rows)
    lean = sum(w * (place - centre) * deviation for w, place, deviation in rows) / spread
    return sum(w * deviation for w, _, deviation in rows) / total, lean
