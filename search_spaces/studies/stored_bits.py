"""Bits of random facts that a model stores, from its own probabilities, and where they level off.

A model that gives the facts' symbols the probability p pays -log2 p bits for them; facts of
`known_bits` random bits cost that much without it. The difference is stored in the model: averaged
over draws of the facts it is a lower bound of what the model holds about them, and it can never be
more than `known_bits`. For facts that a model was never shown it exceeds t bits with a chance of at
most 2^-t, whatever the model (Kraft's inequality): that is how a leak is told.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

LEAK_BITS = 64.0
"""So many bits of facts that were never shown have a chance of at most 2^-64."""
MAX_SLOPE = 0.1
"""A curve has levelled off where at most this part of the bits that its last load adds is stored: 1 is an
adapter with room, 0 a full one."""


def stored_bits(known_bits: float, eval_loss: float, num_loss_tokens: int) -> float:
    """Bits of the facts that a model stores; negative where it is worse than a uniform guess.

    Args:
        known_bits: bits that the facts hold, > 0.
        eval_loss: nats/token over all loss-bearing tokens of all facts, >= 0. End tokens hold no
            bits, and what the model pays for them counts against it.
        num_loss_tokens: of all facts, >= 1.

    Raises:
        ValueError: out of range; so also where more bits than there are would be stored.
    """
    if not (math.isfinite(known_bits) and known_bits > 0 and num_loss_tokens >= 1):
        raise ValueError(
            f"facts must hold more than 0 bits in at least 1 token, got {known_bits} in {num_loss_tokens}"
        )
    if not (math.isfinite(eval_loss) and eval_loss >= 0):
        raise ValueError(
            f"eval_loss must be finite and >= 0 nats/token, got {eval_loss}: below 0 more bits would be stored "
            "than there are; the evaluation is wrong"
        )
    return known_bits - eval_loss * num_loss_tokens / math.log(2)


def check_unseen(stored: float, where: str) -> None:
    """Refuses a model that knows facts which it was never shown.

    Args:
        stored: `stored_bits` of such facts.
        where: whose they are, for the message.

    Raises:
        ValueError: more than LEAK_BITS: the evaluation shows the model what it must predict.
    """
    if stored > LEAK_BITS:
        raise ValueError(
            f"{where} must store at most {LEAK_BITS:g} bits of facts that were never shown, stores "
            f"{stored:,.0f}: the evaluation leaks the values; trust no number of this study"
        )


@dataclass(frozen=True, kw_only=True)
class LoadPoint:
    """What an adapter stores at one load.

    Attributes:
        load: known bits for each adapter parameter.
        stored: bits stored for each adapter parameter, one value for each seed.
    """

    load: float
    stored: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.stored)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most that an adapter stored for each parameter, over loads.

    Attributes:
        load, stored, low, high: of the load that stored most; mean, least and most of its seeds. None of
            the last two where there is one seed.
        rising: why the adapter may hold more than that; None where the curve has levelled off.
    """

    load: float
    stored: float
    low: float | None
    high: float | None
    rising: str | None


def peak_of(points: Sequence[LoadPoint]) -> Peak:
    """The highest point of a curve over loads, and whether the curve levels off.

    It does where at most MAX_SLOPE of the bits that the largest load adds to the one below it are
    stored, whatever the smaller loads did.

    Raises:
        ValueError: no points, or two of one load.
    """
    if not points or len({point.load for point in points}) < len(points):
        loads = ", ".join(f"{point.load:g}" for point in points)
        raise ValueError(f"points must hold one or more different loads, got {loads or 'none'}")
    curve = sorted(points, key=lambda point: point.load)
    best = max(curve, key=lambda point: point.mean)
    return Peak(
        load=best.load,
        stored=best.mean,
        low=min(best.stored) if len(best.stored) > 1 else None,
        high=max(best.stored) if len(best.stored) > 1 else None,
        rising=_rising(curve),
    )


def _rising(curve: Sequence[LoadPoint]) -> str | None:
    if len(curve) < 2:
        return "one load alone"
    if max(point.mean for point in curve) <= 0:
        return "nothing is stored yet"
    before, last = curve[-2:]
    slope = (last.mean - before.mean) / (last.load - before.load)
    if slope <= MAX_SLOPE:
        return None
    return f"{slope:.0%} of the bits that the largest load adds are stored"
