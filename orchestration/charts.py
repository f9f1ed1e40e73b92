"""What the pictures of all pages share, and the one of capacity, as plotly figures."""

import html
import math
from typing import Any

import plotly.graph_objects as go

# Okabe-Ito: told apart by the colour-blind, readable on light and dark.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C00", "#7F7F7F")
GREY = "#7d8796"


def escaped(text: str) -> str:
    """Text as plotly shows it literally: its labels understand some markup."""
    return html.escape(text, quote=False)


def layout(
    figure: go.Figure, title: str, x_title: str, y_title: str, height: int = 400
) -> go.Figure:
    """The figure in the look that all our charts share."""
    axis = {"gridcolor": "rgba(125,135,150,0.25)", "linecolor": GREY, "zeroline": False}
    figure.update_layout(
        title={"text": title, "font": {"size": 15}},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "size": 12},
        margin={"l": 64, "r": 16, "t": 48, "b": 56},
        height=height,
        legend={"font": {"size": 11}},
        xaxis={"title": x_title, **axis},
        yaxis={"title": y_title, **axis},
    )
    return figure


def capacity_chart(plan: dict[str, Any]) -> go.Figure:
    """Adapter bits (2 per parameter) of every rank and target set that was considered, against the
    dataset's bits."""
    bars: dict[tuple[int, str], tuple[int, bool]] = {}
    for item in [*plan["candidates"], *plan["discarded"]]:
        candidate = item["candidate"]
        key = (candidate["lora_rank"], "+".join(candidate["target"]))
        bars[key] = (item["adapter_bits"], item["adapter_bits"] >= plan["dataset_bits"])
    keys = sorted(bars)
    labels = [f"r{rank}<br>{escaped(target).replace('+', '<br>+')}" for rank, target in keys]
    figure = go.Figure(
        go.Bar(
            x=labels,
            y=[bars[key][0] for key in keys],
            marker={"color": ["#009E73" if bars[key][1] else "#D55E00" for key in keys]},
            text=[f"{bars[key][0]:,}" for key in keys],
            showlegend=False,
        )
    )
    data_bits = max(plan["dataset_bits"], 1)
    _mark_bits(figure, data_bits, "dataset bits", "bottom")
    if plan["capacity"]["source"] != "doctrine":
        by_doctrine = max(plan["capacity"]["doctrine_bits"], 1)
        _mark_bits(
            figure, by_doctrine, "by the doctrine", "bottom" if by_doctrine > data_bits else "top"
        )
    figure = layout(figure, "", "", "bits")
    figure.update_layout(margin={"t": 16})
    bits = [bar[0] for bar in bars.values()] + [data_bits]
    # One tick a decade: the bars carry their own numbers.
    figure.update_yaxes(
        type="log", dtick=1, range=[math.log10(min(bits) / 2), math.log10(max(bits) * 1.5)]
    )
    return figure


def _mark_bits(figure: go.Figure, bits: int, name: str, side: str) -> None:
    figure.add_hline(y=bits, line={"dash": "dash", "color": GREY})
    # On a log axis an annotation's y is the exponent, and add_hline's own text lands off the chart.
    figure.add_annotation(
        y=math.log10(bits),
        text=f"{name}: {bits:,}",
        showarrow=False,
        xref="paper",
        x=0.01,
        yanchor=side,
    )
