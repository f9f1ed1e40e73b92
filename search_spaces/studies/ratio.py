"""A LoRA arm beside the full-fine-tuning arm: the ratio of the best learning rates, and the gap."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from search_spaces.studies.bend import MISFIT_FRAC, BentFit, bent_fit
from search_spaces.studies.curve import mean_curve
from search_spaces.studies.points import Point, Unsettled
from search_spaces.studies.student import t_quantile_95

METHOD = (
    "bent log-parabola of the mean curve of each arm, seeds paired; 95% interval from the cost of "
    "moving its lowest point, noise by Student's t from what seed and learning rate do together, "
    f"with a misfit of {MISFIT_FRAC:.0%} of the height above the best point allowed for"
)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Best LoRA learning rate over the best full-fine-tuning one.

    Attributes:
        estimate: of the mean curves.
        low: lower end of the 95% interval.
        high: its upper end.
        by_seed: the ratio of each seed that both arms ran.
        method: how the interval was made, one clause.
        misfit_decades: half width of the interval, in decades, that more seeds would leave.
    """

    estimate: float
    low: float
    high: float
    by_seed: dict[int, float]
    method: str
    misfit_decades: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Best LoRA loss less the best full-fine-tuning one, nats/token, with its 95% interval."""

    estimate: float
    low: float
    high: float


def lr_ratio(full_points: Iterable[Point], lora_points: Iterable[Point]) -> Ratio | Unsettled:
    """The ratio of the best learning rates, from the seeds that both arms ran.

    Raises:
        ValueError: two runs of one learning rate and seed in an arm.

    Source: METHOD; coverage measured in tests/search_spaces/test_study_coverage.py.
    """
    full_points, lora_points = _paired(full_points, lora_points)
    fits = _fits(full_points, lora_points)
    if isinstance(fits, Unsettled):
        return fits
    full, lora = fits
    low, middle, high = _difference(full, lora)
    quiet = _fits(full_points, lora_points, noise=False)
    misfit = 0.0
    if not isinstance(quiet, Unsettled):
        bottom, _, top = _difference(*quiet)
        misfit = min(top - bottom, high - low) / 2
    return Ratio(
        estimate=10**middle,
        low=10**low,
        high=10**high,
        by_seed={
            seed: 10 ** (middle + lora.shifts[seed] - full.shifts[seed]) for seed in full.shifts
        },
        method=METHOD,
        misfit_decades=misfit,
    )


def loss_gap(full_points: Iterable[Point], lora_points: Iterable[Point]) -> Gap | Unsettled:
    """The gap of the best losses, each arm at its own best learning rate, paired by seed.

    The wider of two widths counts: Student's t over the seeds' own gaps, and the error of the two
    fits; to it comes how far each fit dips below its best measured point.

    Raises:
        ValueError: two runs of one learning rate and seed in an arm.
    """
    fits = _fits(*_paired(full_points, lora_points))
    if isinstance(fits, Unsettled):
        return fits
    full, lora = fits
    gap = lora.loss - full.loss
    differences = [lora.offsets[seed] - full.offsets[seed] for seed in full.offsets]
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    paired = t_quantile_95(len(differences) - 1) * spread
    half = max(paired, math.hypot(full.loss_error, lora.loss_error))
    return Gap(estimate=gap, low=gap - half, high=gap + half)


def _paired(
    full_points: Iterable[Point], lora_points: Iterable[Point]
) -> tuple[list[Point], list[Point]]:
    """The runs of the seeds that are in both arms."""
    full_points, lora_points = list(full_points), list(lora_points)
    seeds = {point.seed for point in full_points} & {point.seed for point in lora_points}
    return (
        [point for point in full_points if point.seed in seeds],
        [point for point in lora_points if point.seed in seeds],
    )


def _fits(
    full_points: list[Point], lora_points: list[Point], *, noise: bool = True
) -> tuple[BentFit, BentFit] | Unsettled:
    found: list[BentFit] = []
    for name, points in (("FullFT", full_points), ("LoRA", lora_points)):
        curve = mean_curve(points)
        fit = curve if isinstance(curve, Unsettled) else bent_fit(curve, noise=noise)
        if isinstance(fit, Unsettled):
            return Unsettled(reason=f"{name}: {fit.reason}", side=fit.side)
        found.append(fit)
    return found[0], found[1]


def _difference(full: BentFit, lora: BentFit) -> tuple[float, float, float]:
    """Low end, estimate and high end of the difference of log10 optima.

    Source: Zou and Donner 2008, Statistics in Medicine 27: the ends of two intervals, each distance
    squared, give those of the difference of two independent estimates.
    """
    middle = lora.log10_lr - full.log10_lr
    below = math.hypot(lora.log10_lr - lora.low, full.high - full.log10_lr)
    above = math.hypot(lora.high - lora.log10_lr, full.log10_lr - full.low)
    return middle - below, middle, middle + above
