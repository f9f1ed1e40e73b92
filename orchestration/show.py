"""Plans and results as tables on a terminal, and as JSON."""

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestration.results import TrialRecord
from trainers.paths import RunPaths

MAX_LISTED = 20
"""Candidates of a kind that a terminal lists; the JSON has all of them."""


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


def show_check(plan: dict[str, Any]) -> None:
    """Data audit and pitfalls."""
    console = Console(highlight=False)
    if plan["data"]:
        _show_data(console, plan["data"])
    console.print(
        f"dataset: {plan['dataset_tokens']:,} loss-bearing tokens = {plan['dataset_bits']:,} bits to hold"
    )
    _show_pitfalls(console, plan)


def show_plan(plan: dict[str, Any]) -> None:
    """The whole plan, candidates grouped as the pruner judged them."""
    console = Console(highlight=False)
    model = plan["model"]
    experts = (
        f", {model['num_experts']} experts ({model['num_active_experts']} active)"
        if model["num_experts"]
        else ""
    )
    console.print(
        f"[bold]{plan['name']}[/]: {escape(model['name'])} ({model['model_type']}, {model['num_params']:,} parameters, "
        f"hidden {model['hidden_size']}, {model['num_layers']} layers{experts}), {plan['method']}"
    )
    if plan["data"]:
        _show_data(console, plan["data"])
    console.print(
        f"dataset: {plan['dataset_tokens']:,} loss-bearing tokens = {plan['dataset_bits']:,} bits to hold"
    )
    if plan["budget"]:
        budget = plan["budget"]
        console.print(
            f"a trial: {budget['num_examples']:,} examples, evaluated every {budget['eval_every']:,}"
        )
    _show_defaults(console, plan)
    _show_candidates(console, plan)
    _show_discarded(console, plan)
    _show_pitfalls(console, plan)


def _show_data(console: Console, data: dict[str, Any]) -> None:
    table = Table(title=escape(f"data: {data['data']}"), show_header=False, title_justify="left")
    shown = {
        key: value
        for key, value in data.items()
        if key != "data" and value not in (0, [], {}, None)
    }
    for key, value in shown.items():
        text = (
            f"{value:,}"
            if isinstance(value, int)
            else f"{value:,.1f}"
            if isinstance(value, float)
            else str(value)
        )
        if isinstance(value, dict):
            text = ", ".join(f"{name}: {count:,}" for name, count in value.items())
        elif isinstance(value, list):
            text = "\n".join(map(str, value))
        table.add_row(key.replace("_", " "), escape(text))
    console.print(table)


def _show_defaults(console: Console, plan: dict[str, Any]) -> None:
    table = Table(title="settings", title_justify="left")
    for column in ("setting", "value", "source"):
        table.add_column(column)
    for note in plan["defaults"]:
        table.add_row(note["key"], escape(note["value"]), escape(note["source"]))
    console.print(table)


def _show_candidates(console: Console, plan: dict[str, Any]) -> None:
    count = len(plan["candidates"])
    table = Table(
        title=f"{count:,} admitted, in the order in which they start", title_justify="left"
    )
    for column in ("lora_rank", "learning_rate", "batch", "target", "adapter params", "capacity"):
        table.add_column(column, justify="left" if column == "target" else "right")
    for item in plan["candidates"][:MAX_LISTED]:
        c = item["candidate"]
        margin = (
            f"{item['adapter_bits'] / plan['dataset_bits']:.2f}x" if plan["dataset_bits"] else ""
        )
        row = [
            str(c["lora_rank"]),
            f"{c['learning_rate']:.2e}",
            str(c["global_batch_size"]),
            escape("+".join(c["target"])),
        ]
        table.add_row(*row, f"{item['adapter_params']:,}", margin)
    console.print(table)
    if count > MAX_LISTED:
        console.print(f"... and {count - MAX_LISTED:,} more (--json lists all)")


def _show_discarded(console: Console, plan: dict[str, Any]) -> None:
    reasons: dict[str, int] = {}
    for item in plan["discarded"]:
        reasons[item["reason"]] = reasons.get(item["reason"], 0) + 1
    console.print(f"{len(plan['discarded']):,} discarded before any trial")
    for cut in plan["cut_ranks"]:
        ranks = ", ".join(map(str, cut["lora_ranks"]))
        console.print(
            f"  cut before any draw: lora_rank {ranks} on {'+'.join(cut['target'])}: "
            f"the data needs {cut['sufficient_rank']}",
            markup=False,
            soft_wrap=True,
        )
    for reason, count in reasons.items():
        console.print(f"  {count:,} x {reason}", markup=False, soft_wrap=True)
    for reason in {item["reason"] for item in plan["advised"]}:
        console.print(
            f"  kept, as capacity_policy is advisory: {reason}", markup=False, soft_wrap=True
        )


def _show_pitfalls(console: Console, plan: dict[str, Any]) -> None:
    if not plan["pitfalls"]:
        console.print("no pitfall found")
    for pitfall in plan["pitfalls"]:
        color = {"error": "red", "warning": "yellow"}.get(pitfall["severity"], "cyan")
        console.print(f"[{color}]{pitfall['severity']}[/] [bold]{pitfall['code']}[/]: ", end="")
        console.print(
            f"{pitfall['symptom']}. {pitfall['evidence']}. Fix: {pitfall['fix']}",
            markup=False,
            soft_wrap=True,
        )


def show_results(
    records: list[TrialRecord],
    best: TrialRecord | None,
    run: RunPaths,
    num_discarded: int,
    console: Console | None = None,
) -> None:
    """The results table, and where the report and the best adapter are."""
    console = console or Console(highlight=False)
    console.print(
        f"{run.root.name}: {len(records)} trials, {num_discarded} candidates discarded before any trial"
    )
    table = Table()
    numbers = ("rank", "learning_rate", "batch", "examples", "eval_loss", "bits/byte")
    for column in ("rank", "learning_rate", "batch", "target", "status", *numbers[3:]):
        table.add_column(column, justify="right" if column in numbers else "left")
    for record in records:
        chosen = best is not None and record.name == best.name
        table.add_row(*_result_cells(record), style="bold green" if chosen else None)
    console.print(table)
    for record in records:
        if record.reason:
            console.print(f"{record.name}: {record.reason}", markup=False, soft_wrap=True)
    base = next((record.base_loss for record in records if record.base_loss is not None), None)
    if base is not None:
        console.print(f"eval_loss of the untouched base: {base:.4f}")
    console.print(f"report: {run.report}", markup=False, soft_wrap=True)
    console.print(
        f"best adapter: {run.best}" if best else "no trial ended with a usable score",
        markup=False,
        soft_wrap=True,
    )


def _result_cells(record: TrialRecord) -> list[str]:
    c, top = record.candidate, record.best
    cells = [str(c["lora_rank"]), f"{c['learning_rate']:.2e}", str(c["global_batch_size"])]
    cells += ["+".join(c["target"]), record.status]
    if top is None:
        return [*cells, "", "", ""]
    return [
        *cells,
        f"{top['examples']:,}",
        f"{top['eval_loss']:.4f}",
        f"{top['eval_bits_per_byte']:.4f}",
    ]
