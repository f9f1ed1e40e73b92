"""The tables and lists of a sweep's report, each as markup."""

import html
from collections.abc import Sequence
from typing import Any

from orchestration.forgetting import (
    base_retention,
    has_retention,
    retention_sentence,
    retention_text,
)
from orchestration.lr_curves import RateCurve, fit_dict, rate_curves
from orchestration.measured import capacity_sentence
from orchestration.objective import Objective
from orchestration.page import Header, folded_table, table
from orchestration.placing import packs_sentence
from orchestration.results import TrialRecord, objective_of_records
from orchestration.results_table import beside_names, beside_texts
from orchestration.show import (
    SCALED_LR,
    amount_text,
    coverage_lines,
    cut_others,
    cut_ranks,
    shape_lines,
    target_text,
)
from orchestration.show_audit import data_text, short_cells
from orchestration.studies.axes import rate_text
from orchestration.studies.curves import interval_text, tolerance_text
from search_spaces.studies.points import Unsettled
from search_spaces.variants import PLAIN
from trainers.credentials import masked


def trials_table(records: list[TrialRecord], best: TrialRecord | None) -> str:
    """Every trial, best first."""
    retained = has_retention(records)
    named = any(record.settings.variant != PLAIN for record in records)
    score = objective_of_records(records)
    headers: list[Header] = [
        ("rank", True),
        ("learning_rate", True),
        ("alpha", True),
        ("scale", True),
        (SCALED_LR, True),
        *([("variant", False)] if named else []),
        ("batch", True),
        ("status", False),
        (score.key, True),
        *[(name, True) for name in beside_names(score)],
        ("at examples", True),
        *([("retention (over base)", True)] if retained else []),
        ("seconds", True),
        ("trial", "name"),
        ("reason", False),
    ]
    rows = [
        (
            "chosen" if best and record.name == best.name else "",
            _trial_cells(record, score, retained, named),
        )
        for record in records
    ]
    return folded_table(headers, rows) + _retention_note(records)


def _trial_cells(record: TrialRecord, score: Objective, retained: bool, named: bool) -> list[str]:
    c, top = record.settings, record.best
    candidate = [str(c.lora_rank), f"{c.learning_rate:.2e}", f"{c.lora_alpha:g}", f"{c.scale:.4g}"]
    candidate += [f"{c.scaled_learning_rate:.2e}", *([c.variant] if named else [])]
    candidate += [str(c.global_batch_size)]
    numbers = [""] * (2 + len(beside_names(score)))
    if top:
        numbers = [score.text(record.best_loss), *beside_texts(score, top), f"{top['examples']:,}"]
    retention = [retention_text(record)] if retained else []
    seconds = f"{record.rows[-1]['seconds']:.1f}" if record.rows else ""
    found = [*candidate, record.status, *numbers, *retention, seconds]
    return [*found, record.name, record.remark]


def _retention_note(records: list[TrialRecord]) -> str:
    base = next((b for b in map(base_retention, records) if b is not None), None)
    if base is None:
        return ""
    return (
        f'<p class="muted">retention_loss is the loss on the retention set, {base:.4f} for the untouched '
        "base: what is above it was forgotten. It chooses nothing.</p>"
    )


def rates_table(records: Sequence[TrialRecord]) -> str:
    """Where each curve is best, how far that is known, and what else is as good."""
    curves = rate_curves(records)
    score = objective_of_records(records)
    headers = [
        ("trials that share", False),
        ("trials", True),
        ("best tried", True),
        (f"best {score.key}", True),
        ("fitted optimum", True),
        ("95% interval", True),
        ("as good", True),
        ("what to know", False),
    ]
    rows = [("warn" if _remarks(curve) else "", _rate_cells(curve, score)) for curve in curves]
    note = (
        "Fitted optimum: of a parabola in log10(learning_rate) through the best point and its neighbours (of several "
        f"seeds: all near points, with an interval). As good: learning rates whose {score.noun} is within 0.5% of the "
        "best; an end called below or above lies beyond the grid."
    )
    return table(headers, rows, note=note)


def _rate_cells(curve: RateCurve, score: Objective) -> list[str]:
    best = curve.best
    tried = ["", ""]
    if best is not None and best.best is not None:
        tried = [rate_text(best.candidate["learning_rate"]), score.text(best.best_loss)]
    fitted = ["", "", ""]
    if not isinstance(curve.optimum, Unsettled):
        fit = fit_dict(curve.optimum)
        fitted = [
            rate_text(fit["learning_rate"]),
            interval_text(fit) or "one seed: none",
            tolerance_text(fit),
        ]
    return [curve.label, str(len(curve.records)), *tried, *fitted, _remarks(curve)]


def _remarks(curve: RateCurve) -> str:
    """Why a curve was not fitted, and a warning where its best lies at an end of the grid."""
    edge = f"the best is the {curve.edge} that was tried: extend the grid" if curve.edge else ""
    why = f"no fit: {curve.optimum.reason}" if isinstance(curve.optimum, Unsettled) else ""
    return "; ".join(filter(None, (edge, why)))


def discarded_table(plan: dict[str, Any]) -> str:
    """What never became a trial, with its numbers."""
    sentences = [*cut_ranks(plan), *cut_others(plan)]
    cut = "".join(f"<p>Cut before any draw: {html.escape(line)}.</p>" for line in sentences)
    if not plan["discarded"]:
        return cut or "<p>None.</p>"
    headers = [
        ("rank", True),
        ("learning_rate", True),
        ("batch", True),
        ("target", False),
        ("rule", False),
        ("needed", True),
        ("there is", True),
        ("reason", False),
    ]
    rows = []
    for item in plan["discarded"]:
        c = item["candidate"]
        cells = [
            str(c["lora_rank"]),
            f"{c['learning_rate']:.2e}",
            str(c["global_batch_size"]),
            target_text(c),
        ]
        rows.append(("", [*cells, item["rule"], *_amounts(item["numbers"]), item["reason"]]))
    return cut + folded_table(headers, rows)


COMPARED = (("dataset_bits", "adapter_bits", "bits"), ("needed_bytes", "room_bytes", "bytes"))
"""What the numbers of a verdict call what is needed and what there is, where its rule compares two amounts."""


def _amounts(numbers: dict[str, Any]) -> tuple[str, str]:
    for needed, there, unit in COMPARED:
        if needed in numbers:
            return f"{numbers[needed]:,} {unit}", f"{numbers[there]:,} {unit}"
    return "", ""


def workers(packs: dict[str, Any] | None) -> str:
    """The worker groups. packs: packs.json of a packed sweep."""
    if packs is None:
        return "<p>Engine solo: every trial had workers of its own, made and ended with it.</p>"
    headers = [
        ("group", False),
        ("device", False),
        ("tokens a forward", True),
        ("base loaded and measured in s", True),
        ("adapter as counted in the loaded model", False),
    ]
    rows = [
        (
            "",
            [
                name,
                info.get("device") or masked(info["lost"]),
                f"{info.get('max_tokens', 0):,}",
                f"{info.get('loaded_in_s', 0):.1f}",
                _counted(info.get("adapter")),
            ],
        )
        for name, info in sorted(packs.get("groups", {}).items())
    ]
    sentence = html.escape(packs_sentence(packs).removeprefix("packs: "))
    return f"<p>{sentence}.</p>{table(headers, rows)}"


def _counted(adapter: dict[str, int] | None) -> str:
    if adapter is None:  # lost before it loaded, a full fine-tuning, or of an earlier version
        return ""
    return (
        f"rank {adapter['lora_rank']}: {adapter['layers']} layers, {adapter['params']:,} parameters"
    )


def adapted(plan: dict[str, Any]) -> str:
    """Which layers have adapters."""
    lines = [*coverage_lines(plan), *shape_lines(plan)]
    return "".join(f"<p>{html.escape(line.strip())}.</p>" for line in lines)


def pitfalls(plan: dict[str, Any]) -> str:
    """What the plan warned of."""
    if not plan["pitfalls"]:
        return '<p class="good">None found.</p>'
    headers = [("pitfall", False), ("what was found", False), ("fix", False)]
    rows = [("", [p["symptom"], p["evidence"], p["fix"]]) for p in plan["pitfalls"]]
    return table(headers, rows)


def capacity(plan: dict[str, Any]) -> str:
    """What the data count for, and why."""
    counted = f"{amount_text(plan)} count for {plan['dataset_bits']:,} bits"
    return f"<p>{html.escape(f'{counted}: {capacity_sentence(plan)}.')}</p>"


def data(plan: dict[str, Any]) -> str:
    """The audit in short."""
    if plan["data"] is None:
        return "<p>Not given.</p>"
    data = plan["data"] | {"seq_len": plan["seq_len"]}
    rows = [("", list(cell)) for cell in [("data", data_text(data)), *short_cells(data)]]
    rows += [("", ["note", note]) for note in data["notes"]]
    if plan["retention"]:
        sentence = retention_sentence(plan["retention"])
        rows.append(("", ["retention", sentence.removeprefix("retention: ")]))
    return table([("", False), ("", False)], rows)


def defaults(plan: dict[str, Any]) -> str:
    """Every setting with its source."""
    rows = [("", [d["key"], d["value"], d["source"]]) for d in plan["defaults"]]
    return table([("setting", False), ("value", False), ("source", False)], rows)


def versions(resolved: dict[str, Any]) -> str:
    """Versions of what decides the numbers."""
    return f"<p class='muted'>{html.escape(', '.join(f'{k} {v}' for k, v in resolved['versions'].items()))}</p>"
