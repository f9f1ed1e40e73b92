"""The report's pictures, as plotly figures."""

import html
import math
from typing import Any

import plotly.graph_objects as go

from orchestration.forgetting import KEY, base_retention
from orchestration.results import USABLE, TrialRecord, objective_of_records
from orchestration.show import target_text

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


def _group(record: TrialRecord) -> str:
    candidate = record.candidate
    target = escaped(target_text(candidate))
    return f"rank {candidate['lora_rank']}, {target}, batch {candidate['global_batch_size']}"


def lr_loss_chart(records: list[TrialRecord]) -> go.Figure:
    """Best score (eval_loss, or eval_reward) against learning rate (log axis), one line per rank, target set
    and batch."""
    figure, score = go.Figure(), objective_of_records(records)
    scored = [record for record in records if record.best and record.status in USABLE]
    for index, group in enumerate(sorted({_group(record) for record in scored}, key=_by_rank)):
        members = sorted(
            (r for r in scored if _group(r) == group), key=lambda r: r.candidate["learning_rate"]
        )
        figure.add_scatter(
            x=[record.candidate["learning_rate"] for record in members],
            y=[score.of(record.best_loss) for record in members],
            mode="lines+markers",
            name=group,
            text=[escaped(f"{record.name} ({record.status})") for record in members],
            marker={
                "size": 9,
                "symbol": ["circle" if r.status == "finished" else "circle-open" for r in members],
            },
            line={"color": COLORS[index % len(COLORS)]},
        )
    _mark_diverged(figure, records)
    title = f"Best {score.key} by learning rate"
    figure = layout(figure, title, "learning_rate", score.title)
    rates = sorted({record.candidate["learning_rate"] for record in records})
    figure.update_xaxes(type="log", tickvals=rates, ticktext=[f"{rate:.1e}" for rate in rates])
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.25})
    return figure


def _mark_diverged(figure: go.Figure, records: list[TrialRecord]) -> None:
    diverged = [record for record in records if record.status == "diverged"]
    score = objective_of_records(records)
    scored = [record.best_loss for record in records if record.best]
    if diverged:
        figure.add_scatter(
            x=[record.candidate["learning_rate"] for record in diverged],
            y=[score.of(max(scored, default=1.0))] * len(diverged),
            mode="markers",
            name="diverged",
            text=[escaped(f"{record.name}: {record.reason}") for record in diverged],
            marker={"size": 11, "symbol": "x", "color": "#D55E00"},
        )


def _short(record: TrialRecord) -> str:
    """A trial's name without its hash, which a legend has no room for."""
    return record.name.rsplit("-", 1)[0]


def _by_rank(group: str) -> tuple[int, str]:
    return int(group.split(",")[0].removeprefix("rank ")), group


def learning_curves(records: list[TrialRecord]) -> go.Figure:
    """The score against examples seen, one line per trial, from the untouched base on."""
    score = objective_of_records(records)
    return _curves(records, score.key, score.title, "Learning curves")


def policy_curves(records: list[TrialRecord], key: str, unit: str, title: str) -> go.Figure:
    """Another number of reinforcement learning against episodes, as `learning_curves`."""
    return _curves(records, key, f"{key} ({unit})", title)


def retention_curves(records: list[TrialRecord]) -> go.Figure:
    """retention_loss against examples seen, one line per trial, from the untouched base on: what lies
    above the start was forgotten. A gap is a loss that was not finite."""
    figure = _curves(records, KEY, f"{KEY} (nats/token)", "Retention: loss on general text")
    base = next((b for b in map(base_retention, records) if b is not None), None)
    if base is not None:
        figure.add_hline(y=base, line={"dash": "dash", "color": GREY})
    return figure


def _curves(records: list[TrialRecord], key: str, y_title: str, title: str) -> go.Figure:
    figure = go.Figure()
    clock = "episodes" if any("episodes" in r.rows[0] for r in records if r.rows) else "examples"
    for index, record in enumerate(records):
        figure.add_scatter(
            x=[row[clock] for row in record.rows],
            y=[row.get(key) for row in record.rows],
            mode="lines+markers",
            name=escaped(f"{_short(record)} ({record.status})"),
            line={
                "color": COLORS[index % len(COLORS)],
                "dash": "solid" if record.status == "finished" else "dot",
            },
            marker={"size": 6},
        )
    figure = layout(figure, title, clock, y_title, 380 + 16 * len(records))
    figure.update_layout(legend={"orientation": "h", "y": -0.2 - 0.002 * len(records)})
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
    figure = layout(figure, "Capacity: adapter bits against dataset bits", "", "bits")
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
