"""Where a rank leaves the learning curve of full fine-tuning, and where its capacity is filled."""

import itertools
import math
from collections.abc import Sequence

CurvePoint = tuple[int, float, float]
"""(examples, mean loss in nats/token, standard deviation over seeds)."""


def leaving_examples(
    reference: Sequence[CurvePoint], curve: Sequence[CurvePoint], tolerance_frac: float
) -> int | None:
    """Examples at the first evaluation from which on a curve stays above the reference to the end.

    Args:
        reference: curve of full fine-tuning, or of the highest rank.
        curve: of a rank; compared at the evaluations that both have.
        tolerance_frac: above means by more than this share of the reference loss, >= 0.

    Returns:
        None where the last evaluation is within the tolerance.

    Raises:
        ValueError: no evaluation at the same examples, or tolerance_frac < 0.
    """
    if not tolerance_frac >= 0:
        raise ValueError(f"tolerance_frac must be >= 0, got {tolerance_frac}; set e.g. 0.005")
    expected = {examples: loss for examples, loss, _ in reference}
    shared = sorted((n, loss) for n, loss, _ in curve if n in expected)
    if not shared:
        raise ValueError("the curves must share an evaluation, got none; evaluate both alike")
    left = None
    for examples, loss in reversed(shared):
        if loss - expected[examples] <= tolerance_frac * abs(expected[examples]):
            break
        left = examples
    return left


def capacity_examples(
    adapter_bits: float, loss_tokens_per_example: float, bits_per_token: float
) -> int:
    """Whole examples whose bits fit into an adapter, every token at the same bits.

    Args:
        adapter_bits: parameters x bits per parameter, >= 0.
        loss_tokens_per_example: mean loss-bearing tokens, > 0.
        bits_per_token: bits that a loss-bearing token needs, > 0.

    Raises:
        ValueError: a number outside its range.
    """
    if not (adapter_bits >= 0 and loss_tokens_per_example > 0 and bits_per_token > 0):
        raise ValueError(
            "adapter_bits must be >= 0, loss_tokens_per_example and bits_per_token > 0, got "
            f"{adapter_bits}, {loss_tokens_per_example} and {bits_per_token}"
        )
    return math.floor(adapter_bits / (loss_tokens_per_example * bits_per_token))


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b: 1 where both order alike, -1 where they order opposite, ties accounted for.

    Returns:
        None where one of them is all alike, or has fewer than two values: no order.

    Raises:
        ValueError: different lengths.

    Source: Kendall 1945, Biometrika 33 (tau-b).
    """
    if len(first) != len(second):
        raise ValueError(f"both must have one length, got {len(first)} and {len(second)}")
    agreeing = untied_first = untied_second = 0
    for (a, b), (c, d) in itertools.combinations(zip(first, second, strict=True), 2):
        agreeing += _sign(a - c) * _sign(b - d)
        untied_first += a != c
        untied_second += b != d
    if not untied_first or not untied_second:
        return None
    return agreeing / math.sqrt(untied_first * untied_second)


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)
