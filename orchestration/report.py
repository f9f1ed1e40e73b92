"""runs/NAME/report.html: one self-contained page made from what is on disk."""

import html
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from orchestration.charts import (
    capacity_chart,
    learning_curves,
    lr_loss_chart,
    policy_curves,
    retention_curves,
)
from orchestration.forgetting import (
    base_retention,
    forgetting,
    has_retention,
    retention_sentence,
    retention_text,
)
from orchestration.measured import capacity_sentence
from orchestration.objective import REWARD, Objective
from orchestration.page import Card, charts, frame, section, table, tiles
from orchestration.placing import packs_sentence
from orchestration.results import (
    TrialRecord,
    best_trial,
    objective_of_records,
    read_trials,
)
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
from search_spaces.variants import PLAIN
from trainers.credentials import masked
from trainers.paths import RunPaths, read_state, write_text

POLICY = (
    ("kl", "nats/token", "Divergence of the policy from the base, on held-out completions"),
    ("entropy", "nats", "Entropy of the policy, on held-out completions"),
    ("completion_length", "tokens", "Length of held-out completions"),
)
"""Of reinforcement learning: key, unit and title of the charts beside the reward's."""


def write_report(run: RunPaths) -> None:
    """Writes the page; what it shows is read from plan.json, resolved.json and the trials' files.

    Raises:
        FileNotFoundError: the folder is not that of a sweep.
    """
    plan, resolved = read_state(run.plan), read_state(run.resolved)
    packs = read_state(run.packs) if run.packs.is_file() else None
    write_text(run.report, render(run.root.name, plan, resolved, read_trials(run), packs))


def render(
    name: str,
    plan: dict[str, Any],
    resolved: dict[str, Any],
    records: list[TrialRecord],
    packs: dict[str, Any] | None = None,
) -> str:
    """The page as text. packs: packs.json of a packed sweep."""
    best = best_trial(records)
    sections = [
        _header(name, plan, records, best),
        _charts(plan, records),
        section("Trials", _trials_table(records, best)),
        _notes(records),
        section("Best candidate", _best_yaml(resolved, best)),
        section(f"Discarded before any trial ({len(plan['discarded'])})", _discarded_table(plan)),
        section("Pitfalls", _pitfalls(plan)),
        section("Capacity", _capacity(plan)),
        section("Adapted layers", _adapted(plan)),
        section("Data", _data(plan)),
        section("Workers", _workers(packs)),
        section("Where the settings come from", _defaults(plan)),
        section("Versions", _versions(resolved)),
    ]
    return frame(f"Tenfold: {name}", "".join(sections))


def _header(
    name: str, plan: dict[str, Any], records: list[TrialRecord], best: TrialRecord | None
) -> str:
    counts: dict[str, int] = defaultdict(int)
    for record in records:
        counts[record.status] += 1
    ended = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    score = objective_of_records(records)
    base = best.base_loss if best else None
    numbers = [
        (score.text(best.best_loss) if best else "none", f"best {score.title}"),
        (score.text(base) if base is not None else "?", f"{score.key} of the base"),
        (f"{len(records)} + {len(plan['discarded'])}", f"trials + discarded ({ended})"),
        (f"{plan['dataset_bits']:,}", f"dataset bits ({plan['capacity']['source']})"),
    ]
    if best and (change := forgetting(best)) is not None:
        numbers.append((f"{change:+.4f}", "retention_loss of the best over the base's"))
    model = plan["model"]
    intro = (
        f"{html.escape(_short_name(str(model['name'])))}, {model['num_params'] / 1e6:,.1f}M parameters, "
        f"method {html.escape(plan['method'])}"
    )
    head = f'<h1>{html.escape(name)}</h1><p class="muted">{intro}</p>'
    return f"{head}{_verdict(records, best)}{tiles(numbers)}"


def _workers(packs: dict[str, Any] | None) -> str:
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


def _adapted(plan: dict[str, Any]) -> str:
    lines = [*coverage_lines(plan), *shape_lines(plan)]
    return "".join(f"<p>{html.escape(line.strip())}.</p>" for line in lines)


def _short_name(model: str) -> str:
    """A hub id whole; of a folder its name (the whole path is in the YAML below)."""
    return Path(model).name if Path(model).is_absolute() else model


def _verdict(records: list[TrialRecord], best: TrialRecord | None) -> str:
    if best is None or best.best is None:
        return '<p class="bad">No trial ended with a usable score: every one diverged or failed (reasons below).</p>'
    candidate, text = best.candidate, []
    text.append(
        f"Best: {_variant_text(best)}lora_rank {candidate['lora_rank']}, "
        f"learning_rate {candidate['learning_rate']:.2e}, "
        f"global_batch_size {candidate['global_batch_size']}, with {best.objective.key} "
        f"{best.objective.text(best.best_loss)} after {_after(best.best)}."
    )
    if best.base_loss is not None and best.best_loss >= best.base_loss:
        text.append(
            "This is not better than the untouched base: the learning rates are too high or too low."
        )
    rates = sorted({record.candidate["learning_rate"] for record in records})
    if len(rates) > 1 and candidate["learning_rate"] in (rates[0], rates[-1]):
        side = "lowest" if candidate["learning_rate"] == rates[0] else "highest"
        text.append(
            f"Its learning rate is the {side} that was tried: the optimum may lie beyond the grid."
        )
    text.append("One seed per candidate: differences below the noise between seeds decide nothing.")
    return f"<p>{html.escape(' '.join(text))}</p>"


def _after(row: dict[str, Any]) -> str:
    """How far a trial was at a row."""
    if "episodes" in row:
        return f"{row['episodes']:,} episodes of {row['examples']:,} prompts"
    return f"{row['examples']:,} examples"


def _variant_text(record: TrialRecord) -> str:
    variant = record.settings.variant
    return "" if variant == PLAIN else f"variant {variant}, "


def _charts(plan: dict[str, Any], records: list[TrialRecord]) -> str:
    cards = [
        Card(figure=lr_loss_chart(records)),
        Card(figure=capacity_chart(plan)),
        Card(figure=learning_curves(records), is_wide=True),
    ]
    if objective_of_records(records) is REWARD:
        cards += [Card(figure=policy_curves(records, *kind), is_wide=True) for kind in POLICY]
    if has_retention(records):
        cards.append(Card(figure=retention_curves(records), is_wide=True))
    return charts(cards)


def _trials_table(records: list[TrialRecord], best: TrialRecord | None) -> str:
    retained = has_retention(records)
    named = any(record.settings.variant != PLAIN for record in records)
    score = objective_of_records(records)
    headers = [
        ("trial", False),
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
        ("reason", False),
    ]
    rows = [
        (
            "chosen" if best and record.name == best.name else "",
            _trial_cells(record, score, retained, named),
        )
        for record in records
    ]
    return table(headers, rows) + _retention_note(records)


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
    return [
        record.name,
        *candidate,
        record.status,
        *numbers,
        *retention,
        seconds,
        record.reason,
    ]


def _notes(records: list[TrialRecord]) -> str:
    """What was damaged and mended; no section where nothing was."""
    lines = [f"{record.name}: {note}" for record in records for note in record.notes]
    if not lines:
        return ""
    return section("Damaged files", "".join(f"<p>{html.escape(line)}.</p>" for line in lines))


def _retention_note(records: list[TrialRecord]) -> str:
    base = next((b for b in map(base_retention, records) if b is not None), None)
    if base is None:
        return ""
    return (
        f'<p class="muted">retention_loss is the loss on the retention set, {base:.4f} for the untouched '
        "base: what is above it was forgotten. It chooses nothing.</p>"
    )


def _best_yaml(resolved: dict[str, Any], best: TrialRecord | None) -> str:
    if best is None:
        return "<p>None.</p>"
    config = {key: value for key, value in resolved["config"].items() if value is not None}
    config |= {
        key: value
        for key, value in best.candidate.items()
        if key in config or key in ("lora_rank", "learning_rate")
    }
    config |= {
        "global_batch_size": best.candidate["global_batch_size"],
        "lora_alpha": best.candidate["lora_alpha"],
        "variant": best.settings.variant,
    }
    config |= {
        "target": list(best.candidate["target"]),
        "name": f"{config.get('name', 'sweep')}-best",
    }
    config.pop("num_candidates", None)
    config.pop("search", None)
    text = yaml.safe_dump(config, sort_keys=False)
    return (
        "<p>The adapter is in <code>best/</code>. To train it again, save this as best.yaml and run "
        f"<code>tenfold sweep best.yaml</code>:</p><pre>{html.escape(text)}</pre>"
    )


def _discarded_table(plan: dict[str, Any]) -> str:
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
        rows.append(("", [*cells, item["rule"], item["reason"]]))
    return cut + table(headers, rows)


def _pitfalls(plan: dict[str, Any]) -> str:
    if not plan["pitfalls"]:
        return '<p class="good">None found.</p>'
    headers = [("pitfall", False), ("what was found", False), ("fix", False)]
    rows = [("", [p["symptom"], p["evidence"], p["fix"]]) for p in plan["pitfalls"]]
    return table(headers, rows)


def _capacity(plan: dict[str, Any]) -> str:
    counted = f"{amount_text(plan)} count for {plan['dataset_bits']:,} bits"
    return f"<p>{html.escape(f'{counted}: {capacity_sentence(plan)}.')}</p>"


def _data(plan: dict[str, Any]) -> str:
    if plan["data"] is None:
        return "<p>Not given.</p>"
    data = plan["data"] | {"seq_len": plan["seq_len"]}
    rows = [("", list(cell)) for cell in [("data", data_text(data)), *short_cells(data)]]
    rows += [("", ["note", note]) for note in data["notes"]]
    if plan["retention"]:
        sentence = retention_sentence(plan["retention"])
        rows.append(("", ["retention", sentence.removeprefix("retention: ")]))
    return table([("", False), ("", False)], rows)


def _defaults(plan: dict[str, Any]) -> str:
    rows = [("", [d["key"], d["value"], d["source"]]) for d in plan["defaults"]]
    return table([("setting", False), ("value", False), ("source", False)], rows)


def _versions(resolved: dict[str, Any]) -> str:
    return f"<p class='muted'>{html.escape(', '.join(f'{k} {v}' for k, v in resolved['versions'].items()))}</p>"
