"""The best learning rate of an arm, its interval, and the learning rates that are as good."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from search_spaces.fit import fit_log_parabola
from search_spaces.studies.bend import bent_fit
from search_spaces.studies.curve import MeanCurve, mean_curve
from search_spaces.studies.points import Point, Unsettled

TOLERANCE_FRAC = 0.005
LEAST_POINTS = 3
"""Learning rates that a curve of one seed needs."""


@dataclass(frozen=True, kw_only=True)
class Parabola:
    """loss + curvature * (log10(LR) - log10_lr)^2: touches the fit at its lowest point."""

    log10_lr: float
    loss: float
    curvature: float


@dataclass(frozen=True, kw_only=True)
class RateOptimum:
    """Where a curve is best, whatever is known of how sure that is.

    Attributes:
        log10_lr: log10 of the best learning rate.
        learning_rate: the same, not in log.
        loss: fitted loss there, mean over seeds, nats/token.
        tolerance_frac: what counts as equally good, as a share of the best loss.
        tolerance_low: lowest learning rate whose mean loss is within the tolerance.
        tolerance_high: highest such learning rate.
        open_low: the tolerance reaches the lowest learning rate that was run.
        open_high: it reaches the highest one; not set where a diverged run stands beyond.
        parabola: to draw.
    """

    log10_lr: float
    learning_rate: float
    loss: float
    tolerance_frac: float
    tolerance_low: float
    tolerance_high: float
    open_low: bool
    open_high: bool
    parabola: Parabola


@dataclass(frozen=True, kw_only=True)
class ArmOptimum(RateOptimum):
    """Where an arm of several seeds is best.

    Attributes:
        low: lower end of the 95% interval of the best learning rate.
        high: its upper end.
        log10_by_seed: each seed's own optimum, by the shared curvature.
    """

    low: float
    high: float
    log10_by_seed: dict[int, float]


def arm_optimum(
    points: Iterable[Point], *, tolerance_frac: float = TOLERANCE_FRAC
) -> ArmOptimum | Unsettled:
    """The optimum of an arm, or why it has none.

    Never one at the edge of what all seeds ran, or beside a diverged run: a learning rate where one
    seed diverged counts as diverged.

    Args:
        points: runs of at least two seeds; those of a learning rate that some seeds lack help too.
        tolerance_frac: share of the best loss within which a loss counts as equally good, >= 0.

    Raises:
        ValueError: two runs of one learning rate and seed, or tolerance_frac < 0.

    Source: docs/doctrine.md, section 4; the fit and its interval: `bend.py`.
    """
    _check_tolerance(tolerance_frac)
    curve = mean_curve(points)
    if isinstance(curve, Unsettled):
        return curve
    fit = bent_fit(curve)
    if isinstance(fit, Unsettled):
        return fit
    parabola = Parabola(log10_lr=fit.log10_lr, loss=fit.loss, curvature=fit.curvature)
    return ArmOptimum(
        **vars(_described(curve, parabola, tolerance_frac)),
        low=10**fit.low,
        high=10**fit.high,
        log10_by_seed={seed: fit.log10_lr + shift for seed, shift in fit.shifts.items()},
    )


def one_seed_optimum(
    points: Iterable[Point], *, tolerance_frac: float = TOLERANCE_FRAC
) -> RateOptimum | Unsettled:
    """The optimum of a curve of one seed, through its best point and the two beside it, or why it has none. How
    sure it is nobody can say: one seed shows no noise.

    Raises:
        ValueError: runs of several seeds, or as `arm_optimum`.
    """
    _check_tolerance(tolerance_frac)
    curve = mean_curve(points)
    if isinstance(curve, Unsettled):
        return curve
    if len(curve.by_seed) > 1:
        raise ValueError(f"points must be of one seed, got {sorted(curve.by_seed)}")
    num_ended = sum(map(math.isfinite, curve.losses))
    if num_ended < LEAST_POINTS:
        return Unsettled(
            reason=f"{num_ended} learning rate(s) ran to their ends: a fit needs {LEAST_POINTS}"
        )
    if curve.edge is not None:
        return curve.edge
    return _described(curve, _parabola(curve), tolerance_frac)


def _parabola(curve: MeanCurve) -> Parabola:
    """Through the best point and its neighbours."""
    pairs = [(10 ** curve.log10_lrs[i], curve.losses[i]) for i in curve.reach]
    found = fit_log_parabola(pairs)
    # From the farther neighbour: beside the vertex itself the difference is lost in rounding.
    left, right = curve.best - 1, curve.best + 1
    far = max((left, right), key=lambda i: abs(curve.log10_lrs[i] - found.log10_lr))
    curvature = (curve.losses[far] - found.loss) / (curve.log10_lrs[far] - found.log10_lr) ** 2
    return Parabola(log10_lr=found.log10_lr, loss=found.loss, curvature=curvature)


def _check_tolerance(tolerance_frac: float) -> None:
    if not tolerance_frac >= 0:
        raise ValueError(f"tolerance_frac must be >= 0, got {tolerance_frac}; set e.g. 0.005")


def _described(curve: MeanCurve, fit: Parabola, tolerance_frac: float) -> RateOptimum:
    limit = fit.loss + tolerance_frac * abs(fit.loss)
    low, open_low = _tolerance_end(curve, fit, limit, -1)
    high, open_high = _tolerance_end(curve, fit, limit, 1)
    return RateOptimum(
        log10_lr=fit.log10_lr,
        learning_rate=10**fit.log10_lr,
        loss=fit.loss,
        tolerance_frac=tolerance_frac,
        tolerance_low=10**low,
        tolerance_high=10**high,
        open_low=open_low,
        open_high=open_high,
        parabola=fit,
    )


def _tolerance_end(curve: MeanCurve, fit: Parabola, limit: float, side: int) -> tuple[float, bool]:
    """Where the measured curve first rises above the limit, and whether it never does.

    Linear between points: a curve that is convex there is below the line, so no learning rate is
    called good that is not.
    """
    outward = curve.reach if side > 0 else reversed(curve.reach)
    x, loss = fit.log10_lr, fit.loss
    end = x
    for i in outward:
        end = curve.log10_lrs[i]
        if (end - fit.log10_lr) * side <= 0:
            continue
        if curve.losses[i] > limit:
            return x + (end - x) * (limit - loss) / (curve.losses[i] - loss), False
        x, loss = end, curve.losses[i]
    last = curve.log10_lrs[-1] if side > 0 else curve.log10_lrs[0]
    return x, end == last
