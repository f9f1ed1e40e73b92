"""The study page's charts: the curves, then whatever else a study drew, and which is the main one."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from orchestration.charts import COLORS
from orchestration.objective import LOSS, Objective, objective_named
from orchestration.page import Card
from orchestration.studies.axes import label_axis, linear_axis, log_axis
from orchestration.studies.canvas import escaped, lay_canvas, mark_height, mark_place
from orchestration.studies.curves import curve_chart, curve_note, has_curves

CURVE_KINDS = ("lr-ratio", "layers", "rl")
"""Studies whose answer is read off the loss by learning rate; the others' is in their first figure."""
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "triangle-down", "star")


def cards(results: dict[str, Any]) -> list[Card]:
    """All charts of a study, in the page's order."""
    found, score = [], score_of(results)
    if has_curves(results["arms"]):
        note = curve_note(results["arms"], score)
        chart = curve_chart(results["arms"], score)
        heading = f"{score.noun.capitalize()} by learning rate"
        found.append(Card(figure=chart, heading=heading, note=note, is_wide=True))
    for spec in filter(_has_values, results["figures"]):
        found.append(Card(figure=figure_chart(spec), heading=spec["title"], is_wide=True))
    return found


def score_of(results: dict[str, Any]) -> Objective:
    """What a study's arms are judged by; results of before 2026-11-27 do not say so: by their loss."""
    return objective_named(results.get("objective", LOSS.key))


def _has_values(spec: dict[str, Any]) -> bool:
    """An unfinished or unsettled study has figures that are still empty."""
    return any(_heights(series) for series in spec["series"])


def picture(results: dict[str, Any]) -> go.Figure | None:
    """The study's main chart with its title inside, for a picture outside the page; None of a study
    that has drawn nothing yet."""
    found = cards(results)
    if not found:
        return None
    first_other = int(has_curves(results["arms"]))
    is_curve = results["kind"] in CURVE_KINDS or first_other == len(found)
    card = found[0 if is_curve else first_other]
    return card.figure.update_layout(title={"text": escaped(card.heading)}, margin={"t": 48})


def figure_chart(spec: dict[str, Any]) -> go.Figure:
    """A figure of results.json: lines or markers with intervals, and labelled lines across."""
    figure = go.Figure()
    for index, series in enumerate(spec["series"]):
        if index >= len(COLORS) and series["dash"] == "solid":
            series = series | {"dash": "dot"}  # its colour has been used
        look = {"color": COLORS[index % len(COLORS)], "symbol": _symbol(spec, index)}
        _add_series(figure, series, look, _shift(spec, index))
    lay_canvas(figure, spec["x_title"], spec["y_title"])
    figure.update_layout(showlegend=len(spec["series"]) > 1)
    figure.update_xaxes(**_x_axis(spec))
    heights = [value for series in spec["series"] for value in _heights(series)]
    heights += [line["y"] for line in spec["hlines"]]
    figure.update_yaxes(**(log_axis if spec["y_log"] else linear_axis)(heights))
    for line, anchor in zip(spec["hlines"], _anchors(spec["hlines"]), strict=True):
        mark_height(figure, line["y"], line["text"], is_log=spec["y_log"], anchor=anchor)
    for line in spec["vlines"]:
        mark_place(figure, line["x"], line["text"], is_log=spec["x_log"])
    return figure


def _x_axis(spec: dict[str, Any]) -> dict[str, Any]:
    if spec["x_labels"]:
        return label_axis([escaped(label) for label in spec["x_labels"]])
    places = [x for series in spec["series"] for x in series["x"]]
    places += [line["x"] for line in spec["vlines"]]
    return (log_axis if spec["x_log"] else linear_axis)(places)


def _symbol(spec: dict[str, Any], index: int) -> str:
    """One of its own for each series of mere markers; open where others have intervals (a law beside
    what was measured)."""
    series = spec["series"][index]
    if series["mode"] != "markers":
        return "circle"
    has_intervals = any(each["low"] is not None for each in spec["series"])
    is_open = has_intervals and series["low"] is None
    return SYMBOLS[index % len(SYMBOLS)] + ("-open" if is_open else "")


def _shift(spec: dict[str, Any], index: int) -> float:
    """Sideways, in categories: the markers of several series over one label would hide each other."""
    num_series = len(spec["series"])
    if not spec["x_labels"] or num_series == 1:
        return 0.0
    return (index - (num_series - 1) / 2) * min(0.12, 0.6 / num_series)


def _heights(series: dict[str, Any]) -> list[float]:
    values = [*series["y"], *(series["low"] or []), *(series["high"] or [])]
    return [value for value in values if value is not None]


def _anchors(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The side of each line's text: the lowest of several lines has it below, to part the texts."""
    lowest = min((line["y"] for line in lines), default=None)
    return ["top" if len(lines) > 1 and line["y"] == lowest else "bottom" for line in lines]


def _add_series(
    figure: go.Figure, series: dict[str, Any], look: dict[str, str], shift: float
) -> None:
    has_interval = series["low"] is not None and series["high"] is not None
    is_band = has_interval and series["mode"] == "lines"
    if is_band:
        _add_band(figure, series, look["color"])
    figure.add_scatter(
        x=[x + shift for x in series["x"]] if shift else series["x"],
        y=series["y"],
        mode=series["mode"],
        name=escaped(series["name"]),
        legendgroup=series["name"],
        line={"color": look["color"], "width": 2, "dash": series["dash"]},
        marker=look | {"size": 9, "line": {"width": 1.8 if "open" in look["symbol"] else 0}},
        error_y=_error_bars(series) if has_interval and not is_band else None,
    )


def _error_bars(series: dict[str, Any]) -> dict[str, Any]:
    ends = list(zip(series["y"], series["low"], series["high"], strict=True))
    whole = [None not in end for end in ends]
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - y if ok else 0 for ok, (y, _, high) in zip(whole, ends, strict=True)],
        "arrayminus": [y - low if ok else 0 for ok, (y, low, _) in zip(whole, ends, strict=True)],
        "thickness": 1.5,
        "width": 4,
    }


def _add_band(figure: go.Figure, series: dict[str, Any], color: str) -> None:
    ends = zip(series["x"], series["low"], series["high"], strict=True)
    edge = [(x, low, high) for x, low, high in ends if low is not None and high is not None]
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    figure.add_scatter(
        x=[x for x, _, _ in edge] + [x for x, _, _ in reversed(edge)],
        y=[low for _, low, _ in edge] + [high for _, _, high in reversed(edge)],
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.18)",
        legendgroup=series["name"],
        showlegend=False,
        hoverinfo="skip",
    )
