"""The audit of data as text: whole for `tenfold check`, in short for plans and reports."""

from collections.abc import Iterable, Mapping
from typing import Any

BAR_WIDTH = 40
Cell = tuple[str, str]
"""Name and text of a line."""


def audit_lines(data: Mapping[str, Any], model: str) -> list[str]:
    """The whole audit of `tenfold check`."""
    cells = [*_content_cells(data), *_token_cells(data), *_histogram(data)]
    cells += [cell for cell, _ in _defects(data)]
    return [f"data: {data_text(data)}", f"tokenizer: {model}", *map(row, cells), *_remarks(data)]


def short_lines(data: Mapping[str, Any]) -> list[str]:
    """What a plan says of its data."""
    return [f"data: {data_text(data)}", *map(row, short_cells(data)), *_remarks(data)]


def short_cells(data: Mapping[str, Any]) -> list[Cell]:
    """Counts, and the defects that there are.

    Args:
        data: an audit's dict with "data" and "seq_len".
    """
    found = [cell for cell, count in _defects(data) if count]
    return [*_content_cells(data), *_token_cells(data), *found]


def row(cell: Cell) -> str:
    """A line of the table."""
    return f"  {cell[0].ljust(22)} {cell[1]}"


def data_text(data: Mapping[str, Any]) -> str:
    """What was given as data: one name, or several with their weights."""
    return data["data"] if isinstance(data["data"], str) else _counts(data["data"])


def _remarks(data: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if data["bad_rows"]:
        lines.append(f"{data['num_bad_rows']:,} bad rows, first:")
        lines += [f"  {line}" for line in data["bad_rows"]]
    return lines + [f"note: {note}" for note in data["notes"]]


def _counts(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items())


def _content_cells(data: Mapping[str, Any]) -> list[Cell]:
    cells = [("rows", f"{data['num_rows']:,}: {_counts(data['shapes'])}")]
    if data["roles"]:
        cells.append(("messages", _counts(data["roles"])))
    if data["num_tool_rows"] or data["num_tool_calls"]:
        text = f"{data['num_tool_rows']:,} rows offer tools, {data['num_tool_calls']:,} calls"
        cells.append(("tools", text))
    split = f"{data['num_train_rows']:,} trained, {data['num_eval_rows']:,} held out"
    cells.append(("examples", split))
    if data["num_unsampled"] or data["num_repeats"]:
        text = f"{data['num_unsampled']:,} rows left out, {data['num_repeats']:,} examples repeated"
        cells.append(("by weight", text))
    return cells


def _token_cells(data: Mapping[str, Any]) -> list[Cell]:
    cells = []
    for side, name in (("train", "an epoch trains"), ("eval", "held out")):
        tokens, loss = data[f"num_{side}_tokens"], data[f"num_{side}_loss_tokens"]
        percent = f" ({loss / tokens:.0%})" if tokens else ""
        cells.append((name, f"{loss:,} loss-bearing of {tokens:,} tokens{percent}"))
    sequences = data["num_train_sequences"]
    if sequences:
        filled = data["num_train_tokens"] / (sequences * data["seq_len"])
        text = f"{sequences:,} sequences of {data['seq_len']:,} tokens, {filled:.0%} full"
        cells.append(("packed they are", text))
    return cells


def _histogram(data: Mapping[str, Any]) -> list[Cell]:
    bins = data["length_histogram"]
    if not bins:
        return []
    percentiles = "".join(f", {p}% within {n:,}" for p, n in data["length_percentiles"].items())
    text = f"mean {data['mean_row_tokens']:,.1f}{percentiles}, longest {data['max_row_tokens']:,}"
    largest = max(count for _, count in bins)
    width = len(f"{bins[-1][0]:,}")
    bars = ((most, "█" * -(-BAR_WIDTH * count // largest), count) for most, count in bins)
    lines = (f"<= {most:{width},} {bar} {count:,}" for most, bar, count in bars)
    return [("tokens of a row", text), *(("", line) for line in lines)]


def _defects(data: Mapping[str, Any]) -> list[tuple[Cell, int]]:
    """A cell for each kind of defect, with its count; near-duplicates where they were looked for."""
    plain = {
        "lost end tokens": "num_lost_end",
        "empty completions": "num_empty",
        "blank texts": "num_blank",
    }
    found = [
        ((f"over {data['seq_len']:,} tokens", _too_long(data)), data["num_too_long"]),
        *(((name, f"{data[key]:,}"), data[key]) for name, key in plain.items()),
        _placed("duplicates", data["num_duplicates"], data["duplicates"], data),
        _placed("held out and trained", data["num_overlap"], data["overlaps"], data),
    ]
    if near := data.get("near_duplicates"):
        found.insert(-1, _placed("near-duplicates", near["num_train"], near["train"], data))
        found.append(_placed("nearly so", near["num_eval"], near["eval"], data))
    return found


def _too_long(data: Mapping[str, Any]) -> str:
    fates = {"left out": "num_dropped", "cut": "num_cut", "split": "num_split"}
    told = [f"{data[key]:,} {fate}" for fate, key in fates.items() if data[key]]
    count = f"{data['num_too_long']:,}"
    return f"{count}: {', '.join(told)}" if data["num_too_long"] else count


def _placed(
    name: str, count: int, shown: Iterable[str], data: Mapping[str, Any]
) -> tuple[Cell, int]:
    """The count and the first few; a single file need not be named again and again."""
    text = "; ".join(shown)
    if len(data["files"]) == 1:
        text = text.replace(f"{data['files'][0]}:", "line ")
    return (name, f"{count:,}: {text}" if text else f"{count:,}"), count
