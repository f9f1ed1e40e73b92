"""What a terminal shows of a running sweep. It fits the terminal's height, whatever the number of trials."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from orchestration.durations import duration
from orchestration.trial_states import SweepState, TrialState
from trainers.terminal import printable

LEAST_ROWS = 3
"""Trials that are shown in however low a terminal."""
MOST_ENDED = 5
"""Ended trials that are listed, the best of them."""
FRAME_LINES = 4
"""What of a table is no row: head, rules, and a line below it for the cursor."""
ENDED = ("finished", "stopped", "diverged", "failed")
SPINNER = "|/-\\"
WIDE = 100
"""Columns of a terminal that has room for every column of the table."""
OTHERS, OTHERS_WIDE = 56, 84
"""What the table's columns but that of the names take, characters."""


def view(state: SweepState, now: float, width: int, height: int) -> Any:
    """Headline, trials that run with the best of those that ended, and what is not listed.

    Args:
        now: seconds of the clock that the state was told in.
        width, height: of the terminal, characters.
    """
    above = [_line(line) for line in _headlines(state, now)]
    below = [_line(line) for line in _below(state)]
    if state.is_over:
        return Group(*above, *below)
    above += [_line(line) for line in _loading(state, now)]
    if state.last_line:
        below.append(_line(state.last_line, "dim"))
    room = height - FRAME_LINES - len(above) - len(below)
    shown = _listed(state, max(LEAST_ROWS, room))
    table = [_table(state, shown, width)] if shown else []
    return Group(*above, *table, *below)


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style, no_wrap=True, overflow="ellipsis")


def _headlines(state: SweepState, now: float) -> list[str]:
    score, best, rate = state.objective, state.best, state.rate(now)
    parts = [f"{state.num_ended}/{state.num_trials} trials ended", duration(now - state.began)]
    if rate is not None:
        parts.append(f"{rate:,.1f} examples/s")
    left = state.left_s(now)
    if left and not state.is_over:
        parts.append(f"about {duration(left)} left at most")
    lines = [", ".join(parts)]
    if best is not None and best.best is not None:
        so_far = "" if state.is_over else " so far"
        lines.append(f"best{so_far}: {score.key} {score.text(best.best)}, {best.name}")
    return lines


def _loading(state: SweepState, now: float) -> list[str]:
    """A spinner while no group has loaded the base. How far it is nobody knows: workers load it themselves."""
    if state.num_groups is None or state.packs or state.num_ended == state.num_trials:
        return []
    waited = duration(now - state.began)
    text = f"loading the base: 0 of {state.num_groups} worker group(s) ready after {waited}"
    return [f"{SPINNER[int(2 * (now - state.began)) % len(SPINNER)]} {text}"]


def _listed(state: SweepState, room: int) -> list[TrialState]:
    """Trials that run, then the best of those that ended; as many as there is room for."""
    running = [t for t in state.trials.values() if t.status in ("running", "starting")]
    running.sort(key=lambda trial: (trial.status != "running", not state.pack_of(trial.name)))
    ended = [t for t in state.trials.values() if not t.is_open and t.best is not None]
    ended.sort(key=lambda trial: (trial.status not in ("finished", "stopped"), trial.best))
    return [*running[:room], *ended[:MOST_ENDED]][:room]


def _table(state: SweepState, shown: Sequence[TrialState], width: int) -> Table:
    score = state.objective
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    is_wide = width >= WIDE
    names = max(12, width - (OTHERS_WIDE if is_wide else OTHERS))
    table.add_column("trial", no_wrap=True, overflow="ellipsis", max_width=names)
    table.add_column("status", no_wrap=True)
    numbers = ["rung", "examples", *(["ex/s"] if is_wide else []), score.key, "best"]
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    if state.packs and is_wide:
        table.add_column("pack", no_wrap=True)
    for trial in shown:
        table.add_row(*(Text(printable(cell)) for cell in _cells(state, trial, width)))
    return table


def _cells(state: SweepState, trial: TrialState, width: int) -> list[str]:
    def text(loss: float | None) -> str:
        return "" if loss is None else state.objective.text(loss)

    rate = "" if trial.rate is None or not trial.is_open else f"{trial.rate:,.1f}"
    examples = f"{trial.examples:,}" if trial.last is not None else ""
    cells = [trial.name, trial.status, state.rung(trial), examples]
    cells += [rate] if width >= WIDE else []
    cells += [text(trial.last), text(trial.best)]
    return [*cells, state.pack_of(trial.name)] if state.packs and width >= WIDE else cells


def _below(state: SweepState) -> list[str]:
    """The groups with their K, and how many trials and candidates are not listed, and why."""
    counts, lines = state.counts, []
    if state.num_groups is not None and state.packs and not state.is_over:
        packs = ", ".join(f"{name} K={len(names)}" for name, names in sorted(state.packs.items()))
        lines.append(f"{len(state.packs)} of {state.num_groups} worker group(s) ready: {packs}")
    open_or_ended = [
        f"{counts[status]} {status}" for status in ("waiting", *ENDED) if counts[status]
    ]
    if open_or_ended:
        lines.append(", ".join(open_or_ended))
    lines += [
        f"{number:,} discarded before any trial by the rule {rule}"
        for rule, number in sorted(state.discarded.items())
    ]
    if state.num_discarded and not state.discarded:
        lines.append(f"{state.num_discarded:,} candidates discarded before any trial")
    return lines
