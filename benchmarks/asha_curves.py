"""Best-so-far eval_loss against wall time: a packed ASHA sweep and the naive grid."""

import math
from pathlib import Path
from typing import Any

from benchmarks.common import machine_text, results_of, spread, spread_text, table, verdict

NEAR, MIN_SPREAD, MIN_RATIO = 1.005, 0.03, 15.0

Curve = list[tuple[float, float]]


def curve(part: dict[str, Any]) -> Curve:
    """(wall seconds since the process began, best eval_loss so far), falling."""
    rows = [
        (row["at_s"], row["eval_loss"])
        for trial in part["trials"]
        for row in trial["rows"]
        if row["steps"] > 0
        and isinstance(row["eval_loss"], float)
        and math.isfinite(row["eval_loss"])
    ]
    points: Curve = []
    for at_s, loss in sorted(rows):
        if not points or loss < points[-1][1]:
            points.append((at_s, loss))
    return points


def time_within(points: Curve, loss: float) -> float | None:
    """When a curve is first at or below a loss; None: never."""
    return next((at_s for at_s, best in points if best <= loss), None)


def grid_spread(part: dict[str, Any]) -> float:
    """(worst - best) / best of the last losses of a grid's trials; infinite where one diverged."""
    last = [
        trial["rows"][-1]["eval_loss"] if trial["rows"] else math.inf for trial in part["trials"]
    ]
    losses = [
        loss if isinstance(loss, float) and math.isfinite(loss) else math.inf for loss in last
    ]
    return (max(losses) - min(losses)) / min(losses)


def compare(grid: dict[str, Any], asha: dict[str, Any]) -> dict[str, Any]:
    """One data set and seed."""
    points, own = curve(grid), curve(asha)
    best = points[-1][1]
    within = time_within(own, NEAR * best)
    return {
        "dataset": grid["dataset"],
        "seed": grid["seed"],
        "repeat": grid["repeat"],
        "grid_spread": grid_spread(grid),
        "grid_best": best,
        "grid_ends_s": grid["makespan_s"],
        "grid_within_s": time_within(points, NEAR * best),
        "asha_best": own[-1][1],
        "asha_within_s": within,
        "asha_ends_s": asha["makespan_s"],
        "ratio": grid["makespan_s"] / within if within else None,
        "curves": {"naive": points, "packed-asha": own},
    }


def summarise_asha(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Table and verdicts over data sets and seeds."""
    found = {(p["arm"], p["dataset"], p["seed"], p["repeat"]): p for p in parts}
    pairs = [
        compare(part, found["packed-asha", *key])
        for (arm, *key), part in found.items()
        if arm == "naive" and ("packed-asha", *key) in found
    ]
    ratios = [pair["ratio"] for pair in pairs if pair["ratio"]]
    spreads = [pair["grid_spread"] for pair in pairs]
    missed = len(pairs) - len(ratios)
    verdicts = [
        verdict(
            f"the grid's last losses spread by more than {MIN_SPREAD:.0%}",
            min(spreads) > MIN_SPREAD if spreads else None,
            f"least {min(spreads):.1%}" if spreads else "-",
        ),
        verdict(
            f"within 0.5% of the grid's best {MIN_RATIO:g}x sooner than the naive grid ends",
            spread(ratios)["median"] >= MIN_RATIO and not missed if ratios else None,
            f"{spread_text(ratios, 'x', 1) if ratios else '-'}; never reached in {missed} of {len(pairs)}",
        ),
    ]
    return {"pairs": pairs, "verdicts": verdicts, "lines": [*asha_lines(pairs), ""]}


def asha_lines(pairs: list[dict[str, Any]]) -> list[str]:
    """One row for each data set and seed."""
    head = [
        "data set",
        "seed",
        "grid's spread",
        "grid's best",
        "naive grid ends",
        "naive within 0.5%",
    ]
    head += ["packed ASHA's best", "packed ASHA within 0.5%", "naive ends / packed within"]
    rows = [
        [
            pair["dataset"],
            str(pair["seed"]),
            f"{float(pair['grid_spread']):.1%}",
            f"{pair['grid_best']:.4f}",
            f"{pair['grid_ends_s']:.0f} s",
            _seconds(pair["grid_within_s"]),
            f"{pair['asha_best']:.4f}",
            _seconds(pair["asha_within_s"]),
            f"{pair['ratio']:.1f}x" if pair["ratio"] else "never",
        ]
        for pair in pairs
    ]
    return table(head, rows)


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f} s"


def asha_readme(results: Path) -> list[str]:
    """The README's table of the ASHA results."""
    lines: list[str] = []
    for name, result in results_of(results, "asha-*.json"):
        lines += [f"**{name}** ({machine_text(result)})", "", *asha_lines(result["pairs"]), ""]
    return lines or ["Not measured yet."]
