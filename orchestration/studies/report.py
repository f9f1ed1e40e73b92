"""A study's report.html: one self-contained page made from its results.json."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestration.objective import Objective
from orchestration.page import charts, frame, section, table, tiles
from orchestration.studies.axes import rate_text
from orchestration.studies.canvas import counted
from orchestration.studies.charts import cards, score_of
from orchestration.studies.csv_table import write_csv
from orchestration.studies.curves import base_loss, finished, interval_text, tolerance_text
from trainers.paths import read_json, write_text

BOX_OF_VERDICT = {
    "supported": "good",
    "contradicted": "bad",
    "undecided": "warn",
    "measured": "accent",
}


def write_study_report(folder: Path) -> None:
    """Writes folder/report.html and folder/results.csv from folder/results.json.

    Raises:
        FileNotFoundError: the folder has no results.json.
    """
    results = read_json(folder / "results.json")
    write_csv(folder, results)
    write_text(folder / "report.html", render(results))


def render(results: dict[str, Any]) -> str:
    """The page as text."""
    parts = [
        _header(results),
        _unfinished(results),
        _verdict(results["verdict"]),
        tiles(_numbers(results)),
        charts(cards(results)),
        _arms(results["arms"], score_of(results)),
        _claims(results["kind"], results["claims"]),
        *(_table(each) for each in results["tables"]),
        _runs(results["arms"], score_of(results)),
        _limits(results["limits"]),
        _protocol(results),
        _machine(results),
    ]
    return frame(f"Tenfold study: {results['name']}", "".join(parts))


def _header(results: dict[str, Any]) -> str:
    preset = f", preset {results['preset']}" if results["preset"] else ""
    kind = html.escape(f"Tenfold study {results['kind']}{preset}")
    question = html.escape(results["question"])
    return f'<p class="muted">{kind}</p><h1>{html.escape(results["name"])}</h1><p>{question}</p>'


def _unfinished(results: dict[str, Any]) -> str:
    if results["status"] == "complete":
        return ""
    points = _points(results["arms"])
    ended = sum(point["status"] != "unfinished" for point in points)
    count = f" {ended} of {counted(len(points), 'run')} have ended." if points else ""
    text = (
        f"This study is unfinished.{count} What follows is of the runs so far; "
        "the command at the end of the page goes on where it stopped."
    )
    return f'<div class="box warn"><p><b class="label">unfinished</b></p><p>{html.escape(text)}</p></div>'


def _verdict(verdict: dict[str, Any]) -> str:
    css = BOX_OF_VERDICT[verdict["status"]]
    decide = verdict["would_decide"]
    more = f'<p class="muted">What would decide it: {html.escape(decide)}</p>' if decide else ""
    return (
        f'<div class="box {css}"><p><b class="label">{html.escape(verdict["status"])}</b></p>'
        f'<p class="lead">{html.escape(verdict["sentence"])}</p>{more}</div>'
    )


def _points(arms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [point for arm in arms for point in arm["points"]]


def _numbers(results: dict[str, Any]) -> list[tuple[str, str]]:
    arms, model, score = results["arms"], results["model"], score_of(results)
    size = f"parameters of {_short_name(model['name'])}"
    shape = f"hidden {model['hidden_size']:,}, {counted(model['num_layers'], 'layer')}"
    numbers = [(_millions(model["num_params"]), f"{size} ({shape})")]
    points = _points(arms)
    if points:
        ended = {s: sum(p["status"] == s for p in points) for s in ("finished", "diverged")}
        seeds = counted(len({point["seed"] for point in points}), "seed")
        what = (
            f"runs finished in {counted(len(arms), 'arm')}, {seeds}; {ended['diverged']} diverged"
        )
        numbers.append((f"{ended['finished']} of {len(points)}", what))
    scored = [(point["eval_loss"], arm["label"]) for arm in arms for point in finished(arm)]
    if scored:
        loss, label = min(scored)
        numbers.append((score.text(loss), f"best {score.title}, {label}"))
    base = base_loss(arms)
    if base is not None:
        numbers.append((score.text(base), f"{score.key} of the untouched base"))
    claims = [claim["status"] for claim in results["claims"]]
    if claims:
        others = (
            f"{claims.count('contradicted')} contradicted, {claims.count('undecided')} undecided"
        )
        numbers.append(
            (f"{claims.count('supported')} of {len(claims)}", f"claims supported; {others}")
        )
    return numbers


def _short_name(model: str) -> str:
    return Path(model).name if Path(model).is_absolute() else model


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f}M" if number >= 100_000 else f"{number:,}"


def _arms(arms: Sequence[dict[str, Any]], score: Objective) -> str:
    if not arms:
        return ""
    headers = [
        ("arm", False),
        ("trained", True),
        ("best rate", True),
        ("95% interval", True),
        ("good rates", True),
        (f"best {score.noun}", True),
        ("seeds", True),
        ("finished", True),
        ("diverged", True),
    ]
    rows = [("warn" if arm["unsettled"] else "", _arm_cells(arm, score)) for arm in arms]
    fracs = sorted({arm["fit"]["tolerance_frac"] for arm in arms if arm["fit"]})
    notes = ["Trained: number of trained parameters."]
    if fracs:
        within = " or ".join(f"{frac:.1%}" for frac in fracs)
        notes.append(
            f"Good rates: learning rates whose fitted {score.noun} is within {within} of the best; an end called "
            "below or above lies beyond the grid."
        )
    reasons = [f"{arm['label']}: {arm['unsettled']}" for arm in arms if arm["unsettled"]]
    unsettled = f"<p>No best rate is given of:</p>{_items(reasons)}" if reasons else ""
    return section("Arms", table(headers, rows, note=" ".join(notes)) + unsettled)


def _arm_cells(arm: dict[str, Any], score: Objective) -> list[str]:
    fit, points = arm["fit"], arm["points"]
    settled = ["unsettled" if arm["unsettled"] else "", "", "", ""]
    if fit:
        rate = rate_text(fit["learning_rate"])
        settled = [rate, interval_text(fit), tolerance_text(fit), score.text(fit["loss"])]
    ended = [str(sum(p["status"] == status for p in points)) for status in ("finished", "diverged")]
    seeds = str(len({point["seed"] for point in points}))
    return [arm["label"], f"{arm['trained_params']:,}", *settled, seeds, *ended]


INTERVAL = {"capacity": "least and most of the seeds", "compute": "least and most of the repeats"}
"""What a claim's interval is, by kind of study; of the others it is one of 95%."""


def _claims(kind: str, claims: Sequence[dict[str, Any]]) -> str:
    if not claims:
        return ""
    headers = [
        ("claim", False),
        ("arm", False),
        ("predicted", True),
        ("measured", True),
        (INTERVAL.get(kind, "95% interval"), True),
        ("verdict", False),
        ("why", False),
    ]
    rows = [
        (
            BOX_OF_VERDICT[claim["status"]],
            [
                claim["name"],
                claim["arm"],
                _number(claim["predicted"]),
                _number(claim["measured"]),
                f"{_number(claim['low'])} to {_number(claim['high'])}"
                if claim["low"] is not None and claim["high"] is not None
                else "",
                claim["status"],
                claim["sentence"],
            ],
        )
        for claim in claims
    ]
    return section("Claims", table(headers, rows))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(each: dict[str, Any]) -> str:
    headers = [(title, number) for title, number in each["headers"]]
    rows = [("", cells) for cells in each["rows"]]
    return section(each["title"], table(headers, rows, note=each["note"] or ""))


def _runs(arms: Sequence[dict[str, Any]], score: Objective) -> str:
    points = _points(arms)
    if not points:
        return ""
    headers = [
        ("arm", False),
        ("learning rate", True),
        ("seed", True),
        ("status", False),
        (score.key, True),
        ("of the base", True),
        ("examples", True),
        ("steps", True),
        ("loss tokens", True),
        ("seconds", True),
        ("peak MiB", True),
        ("trial", False),
        ("reason", False),
    ]
    rows = [("", _run_cells(arm["label"], point, score)) for arm in arms for point in arm["points"]]
    summary = f"<summary>{counted(len(points), 'run')}, every seed and learning rate</summary>"
    return section("Runs", f"<details>{summary}{table(headers, rows)}</details>")


def _run_cells(label: str, point: dict[str, Any], score: Objective) -> list[str]:
    losses = [point["eval_loss"], point["base_loss"]]
    peak = point["peak_bytes"]
    return [
        label,
        rate_text(point["learning_rate"]),
        str(point["seed"]),
        point["status"],
        *("" if loss is None else score.text(loss) for loss in losses),
        *(_count(point[key]) for key in ("examples", "steps", "loss_tokens")),
        "" if point["seconds"] is None else f"{point['seconds']:.1f}",
        "" if peak is None else f"{peak / 2**20:,.0f}",
        point["trial"] or "",
        point["reason"] or "",
    ]


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _limits(lines: Sequence[str]) -> str:
    return section("Limits", _items(lines)) if lines else ""


def _items(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def _protocol(results: dict[str, Any]) -> str:
    rows = [("", [key, text]) for key, text in results["protocol"]]
    rows += [("", [f"data: {key}", _plain(value)]) for key, value in results["data"].items()]
    return section("Protocol", table([("", False), ("", False)], rows))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(each) for each in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _machine(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    made = f"<p>{html.escape(results['machine'])}</p><p class='muted'>{html.escape(versions)}</p>"
    again = f"<p>The same again:</p><pre>{html.escape(results['command'])}</pre>"
    files = (
        "<p class='muted'>Beside this page: results.json has everything that it shows, "
        "results.csv the runs as a table.</p>"
    )
    return section("Machine, versions and command", f"{made}{again}{files}")
