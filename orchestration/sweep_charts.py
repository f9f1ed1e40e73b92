"""The pictures of a sweep's report: score by learning rate, learning curves, what rank and batch seem to do."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from orchestration.charts import COLORS, GREY, capacity_chart, escaped
from orchestration.effects import AXES, Level, axis_effect
from orchestration.forgetting import KEY, base_retention, has_retention
from orchestration.lr_curves import NAMES, RateCurve, as_arm, fit_dict, rate_curves
from orchestration.objective import LOSS, REWARD, Objective
from orchestration.page import Card
from orchestration.results import TrialRecord, objective_of_records
from orchestration.studies.canvas import counted, lay_canvas, mark_height
from orchestration.studies.curves import (
    curve_chart,
    curve_note,
    has_curves,
    loss_range,
    tolerance_text,
)
from search_spaces.studies.points import Unsettled

POLICY = (
    ("kl", "nats/token", "Divergence of the policy from the base, on held-out completions"),
    ("entropy", "nats", "Entropy of the policy, on held-out completions"),
    ("completion_length", "tokens", "Length of held-out completions"),
)
"""Of reinforcement learning: key, unit and title of the charts beside the reward's."""
JUDGED = "what is minimised"
"""In a key's place: what a trial is judged by."""
MOST_NAMED = 8
"""Learning curves that each have a name in the legend; of more, those of a colour share one."""


def cards(plan: dict[str, Any], records: Sequence[TrialRecord]) -> list[Card]:
    """Every chart of the page that has something to show."""
    curves = rate_curves(records)
    found = [*_rate_cards(curves, records), *_effect_cards(records)]
    found.append(
        Card(heading="Capacity: adapter bits against dataset bits", figure=capacity_chart(plan))
    )
    if any(record.rows for record in records):
        found += _curve_cards(curves, records)
    # A chart that stands alone in its row takes the whole of it.
    narrow = [card for card in found if not card.is_wide]
    if len(narrow) % 2:
        found[found.index(narrow[-1])] = Card(
            figure=narrow[-1].figure, heading=narrow[-1].heading, note=narrow[-1].note, is_wide=True
        )
    return found


def _rate_cards(curves: Sequence[RateCurve], records: Sequence[TrialRecord]) -> list[Card]:
    arms, score = [as_arm(curve) for curve in curves], objective_of_records(records)
    if not has_curves(arms):
        return []
    figure, note = curve_chart(arms, score), curve_note(arms, score)
    note = " ".join(filter(None, (_mark_band(figure, curves, score), note)))
    heading = f"Best {score.key} by learning rate"
    return [Card(figure=figure, heading=heading, note=note, is_wide=True)]


def _mark_band(figure: go.Figure, curves: Sequence[RateCurve], score: Objective) -> str:
    """Shades the learning rates that are as good as the best, of the curve that holds the best trial; returns what
    must be said of it. Those of all curves would lie over each other: the table has them."""
    best = min(curves, key=lambda curve: curve.best.best_loss if curve.best else math.inf)
    if isinstance(best.optimum, Unsettled):
        return ""
    fit = fit_dict(best.optimum)
    figure.add_vrect(
        x0=fit["tolerance_low"],
        x1=fit["tolerance_high"],
        fillcolor=GREY,
        opacity=0.14,
        line_width=0,
        layer="below",
    )
    return (
        f"Shaded: rates within {fit['tolerance_frac']:.1%} of the best {score.noun} of {best.label}, "
        f"{tolerance_text(fit)}."
    )


def _effect_cards(records: Sequence[TrialRecord]) -> list[Card]:
    score = objective_of_records(records)
    found = []
    for axis in AXES:
        if levels := axis_effect(records, axis):
            heading = f"Best {score.key} by {NAMES[axis]}, across all else"
            found.append(Card(figure=effect_chart(levels, axis, score), heading=heading))
    return found


def effect_chart(levels: Sequence[Level], axis: str, score: Objective) -> go.Figure:
    """The best score at each value of a setting, and those of all its trials behind it."""
    figure, names = go.Figure(), [str(level.value) for level in levels]
    places = [
        (name, loss) for name, level in zip(names, levels, strict=True) for loss in level.losses
    ]
    figure.add_scatter(
        x=[name for name, _ in places],
        y=[score.of(loss) for _, loss in places],
        mode="markers",
        name="each trial",
        marker={"color": GREY, "size": 8, "opacity": 0.55},
    )
    figure.add_scatter(
        x=names,
        y=[score.of(level.loss) for level in levels],
        mode="lines+markers",
        name="the best",
        text=[escaped(level.best.name) for level in levels],
        line={"color": COLORS[0], "width": 2.5},
        marker={"color": COLORS[0], "size": 11, "symbol": "diamond"},
    )
    lay_canvas(figure, axis, score.title)
    figure.update_xaxes(type="category")
    figure.update_yaxes(range=_range([loss for _, loss in places], [], score))
    figure.update_layout(height=400)
    return figure


def _range(losses: Sequence[float], kept: Sequence[float], score: Objective) -> list[float]:
    """The scores between which a chart is drawn: without the few that would flatten all others.

    Args:
        losses: what is drawn, as eval_loss counts: less is better.
        kept: what must be seen of it.
    """
    low, top = loss_range([_as_arm_of(losses)])
    top = max([top, *(value + 0.06 * (value - low) for value in kept)])
    return sorted((score.of(low), score.of(top)))


def _as_arm_of(losses: Sequence[float]) -> dict[str, Any]:
    shared = {"status": "finished", "base_loss": None}
    return {"points": [shared | {"eval_loss": loss} for loss in losses]}


def _curve_cards(curves: Sequence[RateCurve], records: Sequence[TrialRecord]) -> list[Card]:
    score = objective_of_records(records)
    found = [_curve_card(curves, records, JUDGED, score.title, "Learning curves", score)]
    if score is REWARD:
        for key, unit, title in POLICY:
            found.append(_curve_card(curves, records, key, f"{key} ({unit})", title))
    if has_retention(list(records)):
        title = "Retention: loss on general text"
        found.append(_curve_card(curves, records, KEY, f"{KEY} (nats/token)", title, LOSS))
    return found


def _curve_card(
    curves: Sequence[RateCurve],
    records: Sequence[TrialRecord],
    key: str,
    y_title: str,
    heading: str,
    score: Objective | None = None,
) -> Card:
    """One number of every trial against examples seen (episodes), from the untouched base on.

    Args:
        key: of metrics rows.
        score: what it is on the chart, where values far off the others are to be left out.
    """
    figure, note = _curves(curves, records, key, y_title, score), ""
    if score is not None:
        values = [v for record in records for v in _values(record, key) if v is not None]
        base = base_retention if key == KEY else lambda record: record.base_loss
        start = next((b for b in map(base, records) if b is not None), None)
        ends = _range(values, [] if start is None else [start], score)
        figure.update_yaxes(range=ends)
        if start is not None:
            side = "top" if score.sign > 0 else "bottom"
            mark_height(figure, score.of(start), "the untouched base", anchor=side)
        outside = sum(not ends[0] <= score.of(value) <= ends[1] for value in values)
        note = (
            f"{counted(outside, 'evaluation')} not drawn: far worse than the others."
            if outside
            else ""
        )
    return Card(figure=figure, heading=heading, note=note, is_wide=True)


def _values(record: TrialRecord, key: str) -> list[float | None]:
    if key == JUDGED:
        return [record.judge.loss(row) for row in record.rows]
    return [row.get(key) for row in record.rows]


def _curves(
    curves: Sequence[RateCurve],
    records: Sequence[TrialRecord],
    key: str,
    y_title: str,
    score: Objective | None,
) -> go.Figure:
    figure, sign = go.Figure(), 1 if score is None else score.sign
    clock = "episodes" if any("episodes" in r.rows[0] for r in records if r.rows) else "examples"
    place = {r.name: index for index, curve in enumerate(curves) for r in curve.records}
    named, seen = len(records) <= MOST_NAMED, set[int]()
    for number, record in enumerate(records):
        index = number if named else place[record.name]
        label = f"{short_name(record)} ({record.status})" if named else curves[index].label
        figure.add_scatter(
            x=[row[clock] for row in record.rows],
            y=[None if v is None else sign * v for v in _values(record, key)],
            mode="lines+markers",
            name=escaped(label),
            legendgroup=str(index),
            showlegend=index not in seen,
            text=[escaped(f"{record.name} ({record.status})")] * len(record.rows),
            hovertemplate="%{text}<br>%{x}: %{y:.4f}<extra></extra>",
            opacity=1 if named or number == 0 else 0.6,
            line={
                "color": COLORS[index % len(COLORS)],
                "width": 2.5 if named or number == 0 else 1.4,
                "dash": "solid" if record.status == "finished" else "dot",
            },
            marker={"size": 6 if named or number == 0 else 4},
        )
        seen.add(index)
    lay_canvas(figure, clock, y_title)
    return figure


def short_name(record: TrialRecord) -> str:
    """A trial's name without its hash, which a legend has no room for."""
    return record.name.rsplit("-", 1)[0]
