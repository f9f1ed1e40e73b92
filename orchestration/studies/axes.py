"""Ranges and tick labels of the study charts' axes."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

MAX_VALUE_TICKS = 10
MAX_VALUE = 4096
"""So many different whole numbers up to this one (ranks, batches) each get a tick of their own."""


def log_axis(values: Sequence[float], *, pad_frac: float = 0.04) -> dict[str, Any]:
    """Layout of a log axis that spans the positive ones of the values, with readable labels."""
    positive = sorted({value for value in values if value > 0}) or [1.0]
    low, high = math.log10(positive[0]), math.log10(positive[-1])
    pad = max(high - low, 0.3) * pad_frac
    layout: dict[str, Any] = {"type": "log", "range": [low - pad, high + pad]}
    ticks = log_ticks(positive, low - pad, high + pad)
    if ticks:
        layout |= {"tickvals": ticks, "ticktext": tick_texts(ticks)}
    return layout


def linear_axis(values: Sequence[float], *, pad_frac: float = 0.06) -> dict[str, Any]:
    """Layout of a linear axis that spans the values."""
    if not values:
        return {}
    low, high = min(values), max(values)
    pad = (high - low or abs(high) or 1.0) * pad_frac
    return {"range": [low - pad, high + pad]}


def label_axis(labels: Sequence[str]) -> dict[str, Any]:
    """Layout of an axis whose places are named."""
    return {
        "tickvals": list(range(len(labels))),
        "ticktext": ["<br>".join(textwrap.wrap(label, 18)) or label for label in labels],
        "range": [-0.5, len(labels) - 0.5],
        "showgrid": False,
    }


def log_ticks(values: Sequence[float], low: float, high: float) -> list[float]:
    """Where a log axis has its ticks; none where plotly's own are better (under half a decade).

    Args: values: what is drawn, sorted. low, high: the axis's ends, as powers of ten.
    """
    is_counts = all(value == int(value) for value in values) and values[-1] <= MAX_VALUE
    if is_counts and len(values) <= MAX_VALUE_TICKS:
        return [float(value) for value in values]
    decades = high - low
    if decades < 0.5:
        return []
    digits = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 4.5 else (1,)
    step = max(1, math.ceil(decades / 9))
    exponents = range(math.floor(low), math.ceil(high) + 1)
    return [
        digit * 10.0**exponent
        for exponent in exponents
        if exponent % step == 0
        for digit in digits
        if low <= math.log10(digit) + exponent <= high
    ]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """3e-4 for numbers too small or too large to be read otherwise; one form for a whole axis."""
    if min(ticks) >= 0.01 and max(ticks) < 100_000:
        return [f"{tick:,.10g}" for tick in ticks]
    return [_short_power(tick) for tick in ticks]


def rate_text(rate: float) -> str:
    """A learning rate with three digits: 3.16e-4."""
    digits, exponent = f"{rate:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def _short_power(value: float) -> str:
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"
