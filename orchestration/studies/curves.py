"""Loss (or reward) against learning rate, one colour an arm: the study page's main picture."""

from collections.abc import Sequence
from statistics import mean, median, quantiles
from typing import Any

import plotly.graph_objects as go

from orchestration.charts import COLORS, GREY
from orchestration.objective import LOSS, Objective
from orchestration.studies.axes import log_axis, rate_text
from orchestration.studies.canvas import (
    MARGIN_PIXELS,
    PLOT_PIXELS,
    counted,
    escaped,
    lay_canvas,
    mark_height,
)

SEED_SYMBOLS = (
    "circle",
    "square",
    "triangle-down",
    "star",
    "hourglass",
    "bowtie",
    "pentagon",
    "hexagon",
)
PARABOLA_DECADES = 0.5
"""How far to each side of its optimum a parabola is drawn: it says nothing farther out."""
LANE_PIXELS = 18


def has_curves(arms: Sequence[dict[str, Any]]) -> bool:
    """Whether any run has ended in a way that the chart shows."""
    points = [point for arm in arms for point in arm["points"]]
    return any(point["status"] in ("finished", "stopped", "diverged") for point in points)


def loss_range(arms: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The losses between which the curves are drawn, in nats/token: from the best to the base's, or
    to where near-diverged runs begin (farther above the best than twice the 75% quantile), but never
    below any arm's best."""
    losses = sorted(point["eval_loss"] for arm in arms for point in scored(arm))
    if not losses:
        return 0.0, 1.0
    best = losses[0]
    usual = quantiles(losses, n=4)[2] if len(losses) > 1 else best
    top = max(loss for loss in losses if loss <= best + 2 * (usual - best) or loss == best)
    base = base_loss(arms)
    if base is not None and base > best:
        top = min(top, base + 0.02 * (base - best))
    worst_best = max(min(p["eval_loss"] for p in scored(arm)) for arm in arms if scored(arm))
    top = max(top, worst_best + 0.25 * (worst_best - best))
    height = top - best or abs(best) * 0.01 or 0.01
    return best - 0.06 * height, top + 0.06 * height


def finished(arm: dict[str, Any]) -> list[dict[str, Any]]:
    """The arm's runs that have a loss to compare."""
    return [p for p in scored(arm) if p["status"] == "finished"]


def scored(arm: dict[str, Any]) -> list[dict[str, Any]]:
    """The arm's runs that have a loss to show; those that were stopped early are shown, and not compared."""
    shown = ("finished", "stopped")
    return [p for p in arm["points"] if p["status"] in shown and p["eval_loss"] is not None]


def base_loss(arms: Sequence[dict[str, Any]]) -> float | None:
    """eval_loss of the untouched base (the median, should the arms' evaluations differ)."""
    losses = [p["base_loss"] for arm in arms for p in arm["points"] if p["base_loss"] is not None]
    return median(losses) if losses else None


def curve_note(arms: Sequence[dict[str, Any]], score: Objective = LOSS) -> str:
    """What the chart of the curves does not show, or shows out of its place."""
    points = [point for arm in arms for point in arm["points"]]
    count = {s: sum(p["status"] == s for p in points) for s in ("diverged", "failed", "unfinished")}
    _, top = loss_range(arms)
    above = sum(p["eval_loss"] > top for arm in arms for p in scored(arm))
    parts = []
    if above:
        parts.append(
            f"{counted(above, 'run')} with a {score.noun} {_beyond(score)} {score.of(top):.3f}: triangles at "
            f"the {_edge(score)}."
        )
    if count["diverged"]:
        parts.append(
            f"{counted(count['diverged'], 'run')} diverged: crosses at the {_edge(score)}."
        )
    if above or count["diverged"]:
        parts.append("There, each colour has a row, in which seeds lie side by side.")
    for status in ("failed", "unfinished"):
        if count[status]:
            parts.append(f"{counted(count[status], f'{status} run')} not drawn.")
    return " ".join(parts)


def _beyond(score: Objective) -> str:
    """Where worse scores than a chart shows lie."""
    return "above" if score.sign > 0 else "below"


def _edge(score: Objective) -> str:
    """The side of a chart at which what it leaves out is marked: that of the worst."""
    return "top" if score.sign > 0 else "bottom"


def curve_chart(arms: Sequence[dict[str, Any]], score: Objective = LOSS) -> go.Figure:
    """Final score against learning rate: seeds as points, their mean, the fitted parabola near the
    optimum, and the 95% interval of the best learning rate as a bar through it."""
    low, top = loss_range(arms)
    rates = _all_rates(arms)
    axis = log_axis(rates)
    seeds = sorted({point["seed"] for arm in arms for point in arm["points"]})
    figure = go.Figure()
    lanes = 0
    for index, arm in enumerate(arms):
        color = COLORS[index % len(COLORS)]
        _add_arm(figure, arm, color, top, seeds, score, is_dashed=index >= len(COLORS))
        _add_fit(figure, arm, color, top, score)
        span = axis["range"][1] - axis["range"][0]
        lanes += _add_lane(figure, arm, color, top, seeds, score, lanes, span)
    _add_keys(figure, arms, seeds, top, score)
    lay_canvas(figure, "learning rate", score.title)
    figure.update_xaxes(**axis)
    figure.update_yaxes(range=sorted((score.of(low), score.of(top))))
    _lay_lanes(figure, lanes, score)
    _add_base_line(figure, arms, low, top, score)
    return figure


def _all_rates(arms: Sequence[dict[str, Any]]) -> list[float]:
    rates = [point["learning_rate"] for arm in arms for point in arm["points"]]
    fits = [arm["fit"] for arm in arms if arm["fit"]]
    return rates + [fit[key] for fit in fits for key in ("low", "high") if fit[key] is not None]


def _add_arm(
    figure: go.Figure,
    arm: dict[str, Any],
    color: str,
    top: float,
    seeds: Sequence[int],
    score: Objective,
    *,
    is_dashed: bool,
) -> None:
    label, group = escaped(arm["label"]), arm["label"]
    rates, means = _means(arm, score)
    figure.add_scatter(
        x=rates,
        y=means,
        mode="lines",
        line={"color": color, "width": 1.2, "dash": "dash" if is_dashed else "solid"},
        legendgroup=group,
        showlegend=False,
        hoverinfo="skip",
    )
    inside = [point for point in scored(arm) if point["eval_loss"] <= top]
    figure.add_scatter(
        x=[point["learning_rate"] for point in inside],
        y=[score.of(point["eval_loss"]) for point in inside],
        mode="markers",
        name=label,
        legendgroup=group,
        showlegend=False,
        text=[_hover(label, point, score) for point in inside],
        hovertemplate="%{text}<extra></extra>",
        marker={
            "color": color,
            "size": 8,
            "opacity": 0.8,
            "symbol": [_symbol_of(point, seeds) for point in inside],
            "line": {"width": [0 if p["status"] == "finished" else 1.6 for p in inside]},
        },
    )
    # The arm's own place in the legend: always there, even if all its runs diverged.
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="lines+markers",
        name=label,
        legendgroup=group,
        line={"color": color, "width": 3, "dash": "dash" if is_dashed else "solid"},
        marker={"color": color, "size": 8},
    )


def _means(arm: dict[str, Any], score: Objective) -> tuple[list[float], list[float | None]]:
    """The mean over seeds where every run that ended has finished; a gap where one diverged, since the
    mean of the others would look better than the rate is."""
    rates = sorted({p["learning_rate"] for p in arm["points"] if p["status"] != "unfinished"})
    broken = {p["learning_rate"] for p in arm["points"] if p["status"] == "diverged"}
    means: list[float | None] = []
    for rate in rates:
        losses = [p["eval_loss"] for p in finished(arm) if p["learning_rate"] == rate]
        means.append(score.of(mean(losses)) if losses and rate not in broken else None)
    return rates, means


def _add_fit(
    figure: go.Figure, arm: dict[str, Any], color: str, top: float, score: Objective
) -> None:
    fit = arm["fit"]
    if fit is None:
        return
    bow = fit["parabola"]
    steps = [PARABOLA_DECADES * step / 20 for step in range(-20, 21)]
    drawn = [(step, bow["loss"] + bow["curvature"] * step**2) for step in steps]
    shared: dict[str, Any] = {"legendgroup": arm["label"], "showlegend": False}
    figure.add_scatter(
        x=[10 ** (bow["log10_lr"] + step) for step, loss in drawn if loss <= top],
        y=[score.of(loss) for _, loss in drawn if loss <= top],
        mode="lines",
        line={"color": color, "width": 4},
        opacity=0.4,
        hoverinfo="skip",
        **shared,
    )
    figure.add_scatter(
        x=[fit["low"], fit["learning_rate"], fit["high"]],
        y=[score.of(fit["loss"])] * 3,
        mode="lines+markers",
        text=[_fit_hover(arm, score)] * 3,
        hovertemplate="%{text}<extra></extra>",
        line={"color": color, "width": 2.5},
        marker={
            "color": color,
            "symbol": ["line-ns", "diamond", "line-ns"],
            "size": [12, 14, 12],
            "opacity": 1,
            "line": {"width": [2.5, 1.5, 2.5], "color": [color, "#ffffff", color]},
        },
        **shared,
    )


def _add_lane(
    figure: go.Figure,
    arm: dict[str, Any],
    color: str,
    top: float,
    seeds: Sequence[int],
    score: Objective,
    lane: int,
    span: float,
) -> int:
    """Marks the arm's diverged runs and those above the curves in a row of its own; returns the number
    of rows added (0 or 1). span: decades of the x axis."""
    marks = [p for p in arm["points"] if p["status"] == "diverged"]
    num_diverged = len(marks)
    marks += [point for point in scored(arm) if point["eval_loss"] > top]
    if not marks:
        return 0
    # Side by side, within a fifth of a decade: points of one rate would hide each other.
    step = min(0.012 * span, 0.2 / len(seeds))
    places = [(seeds.index(p["seed"]) - (len(seeds) - 1) / 2) * step for p in marks]
    figure.add_scatter(
        x=[p["learning_rate"] * 10**place for p, place in zip(marks, places, strict=True)],
        y=[lane] * len(marks),
        yaxis="y2",
        mode="markers",
        legendgroup=arm["label"],
        showlegend=False,
        text=[_hover(escaped(arm["label"]), point, score) for point in marks],
        hovertemplate="%{text}<extra></extra>",
        marker={
            "color": color,
            "size": 8,
            "symbol": ["x"] * num_diverged + [_triangle(score)] * (len(marks) - num_diverged),
            "line": {"width": [0] * num_diverged + [1.6] * (len(marks) - num_diverged)},
        },
    )
    return 1


def _triangle(score: Objective) -> str:
    return "triangle-up-open" if score.sign > 0 else "triangle-down-open"


def _lay_lanes(figure: go.Figure, lanes: int, score: Objective) -> None:
    strip = LANE_PIXELS * lanes + (LANE_PIXELS / 2 if lanes else 0)
    share = PLOT_PIXELS / (PLOT_PIXELS + strip)
    border = share if score.sign > 0 else 1 - share
    below, above = [0, border], [border, 1]
    figure.update_layout(
        height=PLOT_PIXELS + strip + MARGIN_PIXELS,
        yaxis={"domain": below if score.sign > 0 else above},
        yaxis2={
            "domain": above if score.sign > 0 else below,
            "range": [-0.75, lanes - 0.25],
            "visible": False,
            "fixedrange": True,
        },
    )
    if lanes:
        figure.add_shape(
            type="line",
            xref="paper",
            yref="paper",
            x0=0,
            x1=1,
            y0=border,
            y1=border,
            line={"color": GREY, "width": 1},
        )


def _add_base_line(
    figure: go.Figure, arms: Sequence[dict[str, Any]], low: float, top: float, score: Objective
) -> None:
    base = base_loss(arms)
    if base is not None and low <= base <= top:
        mark_height(figure, score.of(base), "the untouched base", anchor=_edge(score))


def _add_keys(
    figure: go.Figure,
    arms: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    top: float,
    score: Objective,
) -> None:
    """What the marks mean, in grey after the arms."""
    marks: list[tuple[str, dict[str, Any]]] = []
    if 1 < len(seeds) <= len(SEED_SYMBOLS):
        marks += [(f"seed {seed}", {"symbol": _symbol(seed, seeds), "size": 8}) for seed in seeds]
    fits = [arm["fit"] for arm in arms if arm["fit"]]
    if fits:
        known = any(fit["low"] is not None for fit in fits)
        name = f"best rate{', 95% interval' if known else ' by the fit'}"
        marks.append((name, {"symbol": "diamond", "size": 12}))
    if any(point["status"] == "stopped" for arm in arms for point in scored(arm)):
        stopped = {"symbol": f"{SEED_SYMBOLS[0]}-open", "size": 8, "line": {"width": 1.6}}
        marks.append(("stopped early", stopped))
    if any(point["status"] == "diverged" for arm in arms for point in arm["points"]):
        marks.append(("diverged", {"symbol": "x", "size": 8}))
    if any(point["eval_loss"] > top for arm in arms for point in scored(arm)):
        outside = {"symbol": _triangle(score), "size": 8, "line": {"width": 1.6}}
        marks.append((f"{score.noun} {_beyond(score)} the chart", outside))
    lines = [("mean of the seeds", 1.2, 1.0)] if len(seeds) > 1 else []
    lines += [("fitted parabola", 4, 0.4)] if fits else []
    for name, marker in marks:
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=name, marker=marker | {"color": GREY}
        )
    for name, width, opacity in lines:
        line = {"color": GREY, "width": width}
        figure.add_scatter(x=[None], y=[None], mode="lines", name=name, line=line, opacity=opacity)


def _symbol(seed: int, seeds: Sequence[int]) -> str:
    return SEED_SYMBOLS[seeds.index(seed) % len(SEED_SYMBOLS)]


def _symbol_of(point: dict[str, Any], seeds: Sequence[int]) -> str:
    return _symbol(point["seed"], seeds) + ("" if point["status"] == "finished" else "-open")


def _hover(label: str, point: dict[str, Any], score: Objective) -> str:
    has_loss = point["status"] in ("finished", "stopped")
    loss = f"{score.key} {score.text(point['eval_loss'])}" if has_loss else "diverged"
    lines = [f"<b>{label}</b>", f"learning rate {rate_text(point['learning_rate'])}"]
    lines += [f"seed {point['seed']}", loss, escaped(point["reason"] or "")]
    return "<br>".join(line for line in lines if line)


def _fit_hover(arm: dict[str, Any], score: Objective) -> str:
    fit = arm["fit"]
    lines = [
        f"<b>{escaped(arm['label'])}</b>: best learning rate {rate_text(fit['learning_rate'])}",
        interval_text(fit) and f"95% interval {interval_text(fit)}",
        f"within {fit['tolerance_frac']:.1%} of the best {score.noun}: {tolerance_text(fit)}",
        f"{score.noun} there {score.text(fit['loss'])}",
    ]
    return "<br>".join(filter(None, lines))


def interval_text(fit: dict[str, Any]) -> str:
    """The 95% interval of the best learning rate; empty where one seed was run, which gives none."""
    if fit["low"] is None:
        return ""
    return f"{rate_text(fit['low'])} to {rate_text(fit['high'])}"


def tolerance_text(fit: dict[str, Any]) -> str:
    """The interval of learning rates whose loss is within the tolerance of the best; an end that the
    grid did not reach is said to be open."""
    low, high = rate_text(fit["tolerance_low"]), rate_text(fit["tolerance_high"])
    below = "below " if fit["open_low"] else ""
    above = "above " if fit["open_high"] else ""
    return f"{below}{low} to {above}{high}"
