"""runs/NAME/report.html: one self-contained page made from what is on disk."""

import html
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestration import report_tables as tables
from orchestration.best_config import best_yaml
from orchestration.forgetting import forgetting
from orchestration.page import charts, frame, section, tiles
from orchestration.report_costs import memory_table, time_table
from orchestration.results import TrialRecord, best_trial, objective_of_records, read_trials
from orchestration.spending import homes_of
from orchestration.summary import Found, summary
from orchestration.sweep_charts import cards
from trainers.mirror import mirror_of, shown
from trainers.paths import RunPaths, read_state, write_text


def write_report(run: RunPaths) -> None:
    """Writes the page, and best.yaml beside it; what it shows is read from plan.json, resolved.json and the trials'
    files.

    Raises:
        FileNotFoundError: the folder is not that of a sweep.
    """
    plan, resolved = read_state(run.plan), read_state(run.resolved)
    packs = read_state(run.packs) if run.packs.is_file() else None
    records, homes = read_trials(run), homes_of(run)
    again = shown(run.rerun) if mirror_of(run.rerun) is None else run.rerun.name
    if best := best_trial(records):
        write_text(run.rerun, best_yaml(run.root.name, resolved, best))
    write_text(
        run.report,
        render(run.root.name, plan, resolved, records, packs, homes=homes, again=again),
    )


def render(
    name: str,
    plan: dict[str, Any],
    resolved: dict[str, Any],
    records: list[TrialRecord],
    packs: dict[str, Any] | None = None,
    *,
    homes: Mapping[str, str] | None = None,
    again: str = "best.yaml",
) -> str:
    """The page as text.

    Args:
        packs: packs.json of a packed sweep.
        homes: trial -> the worker group that had it.
        again: where the best candidate's YAML lies.
    """
    best = best_trial(records)
    sections = [
        _header(name, plan, records, best),
        charts(cards(plan, records)),
        section("Learning rates", tables.rates_table(records)),
        section("Trials", tables.trials_table(records, best)),
        _notes(records),
        section("Best candidate", _best(name, resolved, best, again)),
        section(
            f"Discarded before any trial ({len(plan['discarded'])})", tables.discarded_table(plan)
        ),
        section("Pitfalls", tables.pitfalls(plan)),
        section("Time and cost", time_table(plan, resolved["config"], records, packs)),
        section("Memory", memory_table(plan, records, packs, homes or {})),
        section("Workers", tables.workers(packs)),
        section("Capacity", tables.capacity(plan)),
        section("Adapted layers", tables.adapted(plan)),
        section("Data", tables.data(plan)),
        section("Where the settings come from", tables.defaults(plan)),
        section("Versions", tables.versions(resolved)),
    ]
    return frame(f"Tenfold: {name}", "".join(sections))


def _header(
    name: str, plan: dict[str, Any], records: list[TrialRecord], best: TrialRecord | None
) -> str:
    model = plan["model"]
    intro = (
        f"{html.escape(_short_name(str(model['name'])))}, {model['num_params'] / 1e6:,.1f}M parameters, "
        f"method {html.escape(plan['method'])}"
    )
    head = f'<h1>{html.escape(name)}</h1><p class="muted">{intro}</p>'
    return f"{head}{_verdict(plan, records, best)}{tiles(_numbers(plan, records, best))}"


def _numbers(
    plan: dict[str, Any], records: list[TrialRecord], best: TrialRecord | None
) -> list[tuple[str, str]]:
    counts = Counter(record.status for record in records)
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
    return numbers


def _short_name(model: str) -> str:
    """A hub id whole; of a folder its name (the whole path is in the YAML below)."""
    return Path(model).name if Path(model).is_absolute() else model


def _verdict(plan: dict[str, Any], records: list[TrialRecord], best: TrialRecord | None) -> str:
    first, *others = summary(Found(plan, records, best))
    css = "accent" if best else "bad"
    rest = "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in others)
    return (
        f'<div class="box {css}"><p><b class="label">what was found</b></p>'
        f'<p class="lead">{html.escape(first)}</p>{rest}</div>'
    )


def _best(name: str, resolved: dict[str, Any], best: TrialRecord | None, again: str) -> str:
    if best is None:
        return "<p>None.</p>"
    command = html.escape(f"tenfold sweep {again}")
    text = html.escape(best_yaml(name, resolved, best))
    return (
        "<p>The adapter is in <code>best/</code>. To train it again, from the folder in which the sweep was started "
        f'(a click selects the whole line):</p><pre class="copy">{command}</pre>'
        f'<p>with this in <code>{html.escape(again)}</code>:</p><pre class="copy">{text}</pre>'
    )


def _notes(records: list[TrialRecord]) -> str:
    """What was damaged and mended; no section where nothing was."""
    lines = [f"{record.name}: {note}" for record in records for note in record.notes]
    if not lines:
        return ""
    return section("Damaged files", "".join(f"<p>{html.escape(line)}.</p>" for line in lines))
