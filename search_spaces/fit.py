"""The optimum of a learning-rate sweep: a parabola in log10(LR) around the best point."""

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass

Points = Iterable[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Where a loss is lowest along the learning rate.

    Attributes:
        log10_lr: log10 of the fitted best learning rate.
        learning_rate: the same, not in log.
        loss: fitted loss there, in the unit of the points (nats/token).
        on_edge: the best point has no finite neighbour on both sides: the optimum lies at the
            edge of the grid or beside a diverged run, nothing was fitted, and the best point
            itself is given. Extend the grid.
    """

    log10_lr: float
    learning_rate: float
    loss: float
    on_edge: bool


def fit_log_parabola(points: Points) -> Optimum:
    """The optimum through the best point and its two neighbours in log10(LR).

    Args:
        points: (learning rate > 0, loss); a loss that is not finite is a diverged run. Runs at
            one learning rate (seeds) are averaged.

    Raises:
        ValueError: a learning rate <= 0, or no finite loss.

    Source: docs/doctrine.md, section 4: never on the edge of the grid or beside a diverged point.
    """
    curve = _curve(points)
    best = min(range(len(curve)), key=lambda i: curve[i][1])
    log_lr, loss = curve[best]
    if not math.isfinite(loss):
        raise ValueError("points must hold a finite loss, got none; lower the learning rates")
    neighbours = curve[best - 1 : best] + curve[best + 1 : best + 2]
    on_edge = len(neighbours) < 2 or not all(math.isfinite(y) for _, y in neighbours)
    if not on_edge:
        log_lr, loss = _vertex(curve[best - 1], curve[best], curve[best + 1])
    return Optimum(log10_lr=log_lr, learning_rate=10**log_lr, loss=loss, on_edge=on_edge)


def _curve(points: Points) -> list[tuple[float, float]]:
    """(log10 LR, mean loss), ascending; a diverged run makes its learning rate infinite."""
    losses: dict[float, list[float]] = {}
    for rate, loss in points:
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"a learning rate must be a finite number > 0, got {rate!r}")
        losses.setdefault(rate, []).append(loss if math.isfinite(loss) else math.inf)
    if not losses:
        raise ValueError("points must hold at least one run, got none")
    return [(math.log10(rate), sum(ys) / len(ys)) for rate, ys in sorted(losses.items())]


def _vertex(
    left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]
) -> tuple[float, float]:
    """Lowest point of the parabola through three points whose middle one is lowest."""
    (x0, y0), (x1, y1), (x2, y2) = left, middle, right
    slope_left, slope_right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (slope_right - slope_left) / (x2 - x0)
    if curvature <= 0:
        return middle  # three equal losses: flat, every point is best
    slope_middle = slope_left + curvature * (x1 - x0)
    shift = -slope_middle / (2 * curvature)
    return x1 + shift, y1 - slope_middle**2 / (4 * curvature)


def interpolated_loss(points: Points, learning_rate: float) -> float:
    """Loss at a learning rate, linear in log10(LR) between the measured neighbours.

    A loss curve is convex near its optimum, so this is an upper bound between grid points; it
    never lies below the best measured loss.

    Raises:
        ValueError: a learning rate outside the measured ones, or points as in `fit_log_parabola`.
    """
    curve = _curve(points)
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate must be a finite number > 0, got {learning_rate!r}")
    x = math.log10(learning_rate)
    xs = [point[0] for point in curve]
    if not xs[0] <= x <= xs[-1]:
        raise ValueError(
            f"learning_rate must lie within the measured {10 ** xs[0]:.3g} to {10 ** xs[-1]:.3g}, "
            f"got {learning_rate:.3g}; nothing is extrapolated"
        )
    right = bisect.bisect_left(xs, x)
    if xs[right] == x:
        return curve[right][1]
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def regret(points: Points, learning_rate: float) -> float:
    """Relative excess loss of a learning rate over the fitted optimum, >= 0 (0.01 is 1%).

    Raises:
        ValueError: as `interpolated_loss`.
    """
    runs = list(points)
    best = fit_log_parabola(runs).loss
    return interpolated_loss(runs, learning_rate) / best - 1
