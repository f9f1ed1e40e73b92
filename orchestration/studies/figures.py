"""Figures of results.json as data; `charts.figure_chart` draws them."""

from collections.abc import Sequence
from typing import Any


def series(
    name: str,
    x: Sequence[float],
    y: Sequence[float],
    *,
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    mode: str = "lines+markers",
    dash: str = "solid",
) -> dict[str, Any]:
    """One line or set of points; low and high are the ends of its error bars."""
    return {
        "name": name,
        "x": list(x),
        "y": list(y),
        "low": None if low is None else list(low),
        "high": None if high is None else list(high),
        "mode": mode,
        "dash": dash,
    }


def figure(
    title: str,
    x_title: str,
    y_title: str,
    drawn: Sequence[dict[str, Any]],
    *,
    x_log: bool = False,
    y_log: bool = False,
    hlines: Sequence[dict[str, Any]] = (),
    x_labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A figure. x_labels: of the places 0, 1, ... where x is no number."""
    return {
        "title": title,
        "x_title": x_title,
        "y_title": y_title,
        "x_log": x_log,
        "y_log": y_log,
        "series": list(drawn),
        "hlines": list(hlines),
        "vlines": [],
        "x_labels": None if x_labels is None else list(x_labels),
    }
