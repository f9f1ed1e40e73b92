"""What one run of an arm gave, and why an arm has no optimum yet."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Side = Literal["low", "high", "none"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run that ended.

    Attributes:
        learning_rate: peak learning rate, > 0.
        seed: data order and initialization; the same seed is the same data order in all arms.
        loss: last eval_loss in nats/token; math.inf where the run diverged.
    """

    learning_rate: float
    seed: int
    loss: float

    def __post_init__(self) -> None:
        check_learning_rate(self.learning_rate)
        if math.isnan(self.loss) or self.loss == -math.inf:
            raise ValueError(
                f"loss must be a number, or math.inf where the run diverged, got {self.loss}"
            )


@dataclass(frozen=True, kw_only=True)
class Unsettled:
    """Why there is no optimum.

    Attributes:
        reason: one clause for people.
        side: where the grid must grow for one: 'low' or 'high', or 'none' where it cannot help.
    """

    reason: str
    side: Side = "none"


def check_learning_rate(learning_rate: float) -> float:
    """The learning rate itself.

    Raises:
        ValueError: not a finite number > 0.
    """
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"a learning rate must be a finite number > 0, got {learning_rate!r}")
    return learning_rate


def losses_by_seed(points: Iterable[Point]) -> dict[int, dict[float, float]]:
    """The losses of each seed by learning rate, seeds ascending.

    Raises:
        ValueError: two runs of one learning rate and seed.
    """
    losses: dict[int, dict[float, float]] = {}
    for point in sorted(points, key=lambda point: (point.seed, point.learning_rate)):
        curve = losses.setdefault(point.seed, {})
        if point.learning_rate in curve:
            raise ValueError(
                "an arm must hold one run per learning rate and seed, got two at learning_rate "
                f"{point.learning_rate:g}, seed {point.seed}"
            )
        curve[point.learning_rate] = point.loss
    return losses


def rounded_rate(learning_rate: float) -> float:
    """A learning rate to six digits: trials are named by a hash, so a rate must repeat exactly."""
    return float(f"{learning_rate:.6g}")
