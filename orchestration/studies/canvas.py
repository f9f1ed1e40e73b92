"""What all charts of the study page share: layout, labelled lines, text."""

import math
from typing import Any

import plotly.graph_objects as go

from orchestration.charts import GREY, escaped, layout

PLOT_PIXELS = 400
MARGIN_PIXELS = 130
"""What axis, titles and legend take of a chart's height."""


def counted(number: int, noun: str) -> str:
    """3 runs, 1 run."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def lay_canvas(figure: go.Figure, x_title: str, y_title: str) -> None:
    """Titles, grid and size; the legend lies under the chart and takes what height it needs."""
    layout(figure, "", escaped(x_title), escaped(y_title), PLOT_PIXELS + MARGIN_PIXELS)
    figure.update_layout(
        margin={"t": 16},
        hoverlabel={"align": "left"},
        legend={
            "orientation": "h",
            "yref": "container",
            "y": 0.0,
            "yanchor": "bottom",
            "x": 0.0,
            "xanchor": "left",
            "font": {"size": 12},
        },
    )


def mark_height(
    figure: go.Figure, y: float, text: str, *, is_log: bool = False, anchor: str = "bottom"
) -> None:
    """A horizontal line with its text at the right end. anchor: the side of the text at the line."""
    figure.add_hline(y=y, line={"dash": "dash", "color": GREY, "width": 1.3})
    # On a log axis an annotation's y is the exponent, and add_hline's own text lands off the chart.
    place: dict[str, Any] = {"xref": "paper", "x": 1, "xanchor": "right", "yanchor": anchor}
    _label(figure, text, y=math.log10(y) if is_log else y, **place)


def mark_place(figure: go.Figure, x: float, text: str, *, is_log: bool = False) -> None:
    """A vertical line with its text along it, from the top down."""
    figure.add_vline(x=x, line={"dash": "dash", "color": GREY, "width": 1.3})
    place: dict[str, Any] = {"yref": "paper", "y": 1, "yanchor": "top", "xanchor": "right"}
    _label(figure, text, x=math.log10(x) if is_log else x, textangle=-90, xshift=-2, **place)


def _label(figure: go.Figure, text: str, **place: Any) -> None:
    figure.add_annotation(
        text=escaped(text), showarrow=False, bgcolor="rgba(0,0,0,0)", font={"size": 11}, **place
    )
