"""What a run that trusted a prior learning rate would have lost, on the measured curve."""

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from search_spaces.studies.bend import bent_fit
from search_spaces.studies.curve import MeanCurve, mean_curve
from search_spaces.studies.points import Point, Unsettled, check_learning_rate

DIVERGED = "diverged"


@dataclass(frozen=True, kw_only=True)
class Regret:
    """Of one prior on one arm.

    Attributes:
        learning_rate: the prior.
        regret_frac: excess of the mean loss there over the best loss, as its share, >= 0; None
            where nothing was measured.
        note: why there is none, or what the best loss is when the arm has no optimum.
    """

    learning_rate: float
    regret_frac: float | None
    note: str | None


def prior_regrets(points: Iterable[Point], priors: Mapping[str, float]) -> dict[str, Regret]:
    """The regret of each prior, linear in log10(LR) between the measured points.

    Args:
        points: runs of one arm.
        priors: learning rates by the name of the law.

    Raises:
        ValueError: a prior that is not a finite number > 0, or two runs of one rate and seed.
    """
    curve = mean_curve(points)
    return {
        name: _regret(curve, check_learning_rate(learning_rate))
        for name, learning_rate in priors.items()
    }


def _regret(curve: MeanCurve | Unsettled, learning_rate: float) -> Regret:
    if isinstance(curve, Unsettled):
        return Regret(learning_rate=learning_rate, regret_frac=None, note=curve.reason)
    loss = _loss_at(curve, math.log10(learning_rate))
    if isinstance(loss, str):
        return Regret(learning_rate=learning_rate, regret_frac=None, note=loss)
    fit = bent_fit(curve)
    lowest = min(y for i, y in enumerate(curve.losses) if i in curve.reach)
    note = None
    if isinstance(fit, Unsettled):
        note = f"over the best point: {fit.reason}"
    else:
        lowest = min(lowest, fit.loss)
    return Regret(learning_rate=learning_rate, regret_frac=(loss - lowest) / abs(lowest), note=note)


def _loss_at(curve: MeanCurve, x: float) -> float | str:
    """Mean loss at a log10 learning rate, or why it has none."""
    xs, losses = curve.log10_lrs, curve.losses
    right = bisect.bisect_left(xs, x - 1e-9)
    if right == len(xs):
        return "above the grid" if math.isfinite(losses[-1]) else DIVERGED
    if abs(xs[right] - x) <= 1e-9:
        return losses[right] if math.isfinite(losses[right]) else DIVERGED
    if right == 0:
        return "below the grid"
    below, above = losses[right - 1], losses[right]
    if not math.isfinite(below) and not math.isfinite(above):
        return DIVERGED
    if not math.isfinite(above) or not math.isfinite(below):
        return "beside a diverged run"
    return below + (above - below) * (x - xs[right - 1]) / (xs[right] - xs[right - 1])
