"""What a sweep took, as tables of its report: time, money, memory."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.gpus import GB
from orchestration.durations import duration
from orchestration.page import table
from orchestration.placing import cost_text
from orchestration.results import TrialRecord
from orchestration.spending import GroupMemory, Spending, group_memory, spending


def time_table(
    plan: Mapping[str, Any],
    config: Mapping[str, Any],
    records: Sequence[TrialRecord],
    packs: Mapping[str, Any] | None,
) -> str:
    """Seconds, examples a second, and of GPUs their hours and price, beside what was planned."""
    spent = spending(plan, config, records, packs)
    rows = [("", list(cells)) for cells in _time_cells(spent) if cells[1]]
    note = (
        "Training: each trial's share of the forwards that it was in, without evaluations, waiting and the loading of "
        "the base. Held: from the start of the worker groups to their end; a driver that was killed did not write it."
    )
    return table([("", False), ("", True)], rows, note=note)


def _time_cells(spent: Spending) -> list[tuple[str, str]]:
    rate, hours = spent.examples_per_s, spent.gpu_hours
    priced = spent.price_per_gpu_hour
    return [
        ("training, all trials", duration(spent.trained_s)),
        ("examples trained on, all trials", f"{spent.examples:,}"),
        ("examples a second, of a worker group that trains", f"{rate:,.1f}" if rate else ""),
        ("worker groups held", "" if spent.held_s is None else duration(spent.held_s)),
        ("GPU-hours held", "" if hours is None else f"{hours:,.3f}"),
        (
            f"price at {priced:g} a GPU-hour" if priced else "price",
            "" if spent.price is None else f"{spent.price:,.2f}",
        ),
        (
            "planned, if no trial stops early",
            cost_text(dict(spent.planned)) if spent.planned else "",
        ),
    ]


def memory_table(
    plan: Mapping[str, Any],
    records: Sequence[TrialRecord],
    packs: Mapping[str, Any] | None,
    homes: Mapping[str, str],
) -> str:
    """Bytes of a worker as they were planned and as they were measured, and what the plan is made of."""
    headers = [
        ("worker group", False),
        ("trials", True),
        ("planned GB", True),
        ("measured peak GB", True),
        ("measured / planned", True),
    ]
    found = group_memory(plan, records, packs, homes)
    rows = [("bad" if (g.ratio or 0) > 1 else "", _memory_cells(g)) for g in found]
    note = (
        "Planned: a worker whose places are all taken, in its largest forward. Measured: the most at any evaluation, "
        "of the GPU's allocator, or of the whole process on a CPU (whose reservation the plan holds too)."
    )
    return table(headers, rows, note=note) + _parts(plan)


def _memory_cells(group: GroupMemory) -> list[str]:
    return [
        group.group or "all",
        str(group.num_trials),
        "not planned" if group.planned is None else f"{group.planned / GB:.3f}",
        "not measured" if group.peak is None else f"{group.peak / GB:.3f}",
        "" if group.ratio is None else f"{group.ratio:.0%}",
    ]


def _parts(plan: Mapping[str, Any]) -> str:
    parts = (plan.get("packs") or {}).get("bytes")
    if not parts:
        return ""
    text = ", ".join(
        f"{name} {value / GB:.3f}"
        for name, value in sorted(parts.items(), key=lambda item: -item[1])
        if value
    )
    return f'<p class="note">{html.escape(f"The plan in GB, before its margin: {text}.")}</p>'
