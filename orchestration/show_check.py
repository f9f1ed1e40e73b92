"""What `tenfold check` found, as text."""

from collections.abc import Mapping
from typing import Any

from orchestration.measured import measured_text
from orchestration.show import bits_lines, pitfall_lines, retention_lines
from orchestration.show_audit import audit_lines, row
from trainers.terminal import is_coloured, printable

GREEN, FAINT, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
MARKS = ("⟦", "⟧")
"""Around trained text where there are no colours."""


def check_lines(found: Mapping[str, Any]) -> list[str]:
    """The whole text: audit, rows to look at, plan's part, refusals."""
    lines = audit_lines(found["data"], found["model"]) if "data" in found else []
    if "base_loss" in found:
        lines.append(row(("base", measured_text(found["base_loss"]))))
    lines = [printable(line) for line in lines]
    lines += [line for shown in found.get("shown", ()) for line in _shown_lines(shown)]
    if "dataset_bits" in found:
        plan = dict(found)
        facts = [*bits_lines(plan), *retention_lines(plan), *pitfall_lines(plan["pitfalls"])]
        lines += [printable(line) for line in facts]
    return lines


def _shown_lines(shown: Mapping[str, Any]) -> list[str]:
    kept = "" if shown["num_examples"] else "; left out: longer than seq_len"
    counts = f"{shown['num_loss_tokens']:,} of {shown['num_tokens']:,} tokens are trained"
    text = "".join(_painted(text, is_trained) for text, is_trained in shown["parts"])
    return [printable(f"--- {shown['place']}: {counts}{kept}"), text]


def _painted(text: str, is_trained: bool) -> str:
    text = printable(text)  # before the colours, which are escapes themselves
    if is_coloured():
        return f"{GREEN if is_trained else FAINT}{text}{PLAIN}"
    return f"{MARKS[0]}{text}{MARKS[1]}" if is_trained else text
