"""The audit of data as text: whole for `tenfold check`, in short for a plan."""

from collections.abc import Iterable, Mapping
from typing import Any

BAR_WIDTH = 40


def audit_lines(data: Mapping[str, Any], model: str) -> list[str]:
    """The whole audit of `tenfold check`."""
    table = [*_content_rows(data), *_token_rows(data), *_histogram(data)]
    table += [line for line, _ in _defects(data)]
    return [_title(data), f"tokenizer: {model}", *table, *_remarks(data)]


def short_lines(data: Mapping[str, Any]) -> list[str]:
    """What a plan says of its data: counts, and the defects that there are."""
    found = [line for line, count in _defects(data) if count]
    return [_title(data), *_content_rows(data), *_token_rows(data), *found, *_remarks(data)]


def _title(data: Mapping[str, Any]) -> str:
    named = data["data"] if isinstance(data["data"], str) else _counts(data["data"])
    return f"data: {named}"


def _remarks(data: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if data["bad_rows"]:
        lines.append(f"{data['num_bad_rows']:,} bad rows, first:")
        lines += [f"  {line}" for line in data["bad_rows"]]
    return lines + [f"note: {note}" for note in data["notes"]]


def row(name: str, text: str) -> str:
    return f"  {name.ljust(22)} {text}"


def _counts(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items())


def _content_rows(data: Mapping[str, Any]) -> list[str]:
    rows = [row("rows", f"{data['num_rows']:,}: {_counts(data['shapes'])}")]
    if data["roles"]:
        rows.append(row("messages", _counts(data["roles"])))
    if data["num_tool_rows"] or data["num_tool_calls"]:
        text = f"{data['num_tool_rows']:,} rows offer tools, {data['num_tool_calls']:,} calls"
        rows.append(row("tools", text))
    split = f"{data['num_train_rows']:,} trained, {data['num_eval_rows']:,} held out"
    rows.append(row("examples", split))
    if data["num_unsampled"] or data["num_repeats"]:
        text = f"{data['num_unsampled']:,} rows left out, {data['num_repeats']:,} examples repeated"
        rows.append(row("by weight", text))
    return rows


def _token_rows(data: Mapping[str, Any]) -> list[str]:
    rows = []
    for side, name in (("train", "an epoch trains"), ("eval", "held out")):
        tokens, loss = data[f"num_{side}_tokens"], data[f"num_{side}_loss_tokens"]
        percent = f" ({loss / tokens:.0%})" if tokens else ""
        rows.append(row(name, f"{loss:,} loss-bearing of {tokens:,} tokens{percent}"))
    sequences = data["num_train_sequences"]
    if sequences:
        filled = data["num_train_tokens"] / (sequences * data["seq_len"])
        text = f"{sequences:,} sequences of {data['seq_len']:,} tokens, {filled:.0%} full"
        rows.append(row("packed they are", text))
    return rows


def _histogram(data: Mapping[str, Any]) -> list[str]:
    bins = data["length_histogram"]
    if not bins:
        return []
    percentiles = "".join(f", {p}% within {n:,}" for p, n in data["length_percentiles"].items())
    text = f"mean {data['mean_row_tokens']:,.1f}{percentiles}, longest {data['max_row_tokens']:,}"
    largest = max(rows for _, rows in bins)
    width = len(f"{bins[-1][0]:,}")
    lines = [row("tokens of a row", text)]
    for most, rows in bins:
        bar = "█" * -(-BAR_WIDTH * rows // largest)
        lines.append(row("", f"<= {most:{width},} {bar} {rows:,}"))
    return lines


def _defects(data: Mapping[str, Any]) -> list[tuple[str, int]]:
    """A line for each kind of defect, with its count; near-duplicates where they were looked for."""
    names = data["files"]

    def placed(name: str, count: int, shown: Iterable[str]) -> tuple[str, int]:
        """The count and the first few; a single file need not be named again and again."""
        text = "; ".join(shown)
        if len(names) == 1:
            text = text.replace(f"{names[0]}:", "line ")
        return row(name, f"{count:,}: {text}" if text else f"{count:,}"), count

    too_long = f"{data['num_too_long']:,}"
    if data["num_too_long"]:
        fates = {"left out": "num_dropped", "cut": "num_cut", "split": "num_split"}
        told = [f"{data[key]:,} {fate}" for fate, key in fates.items() if data[key]]
        too_long += f": {', '.join(told)}"
    plain = {
        "lost end tokens": "num_lost_end",
        "empty completions": "num_empty",
        "blank texts": "num_blank",
    }
    found = [
        (row(f"over {data['seq_len']:,} tokens", too_long), data["num_too_long"]),
        *((row(name, f"{data[key]:,}"), data[key]) for name, key in plain.items()),
        placed("duplicates", data["num_duplicates"], data["duplicates"]),
        placed("held out and trained", data["num_overlap"], data["overlaps"]),
    ]
    if near := data.get("near_duplicates"):
        found.insert(-1, placed("near-duplicates", near["num_train"], near["train"]))
        found.append(placed("nearly so", near["num_eval"], near["eval"]))
    return found
