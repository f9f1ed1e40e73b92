"""What `tenfold check` found, as text."""

import os
import sys
from collections.abc import Mapping
from typing import Any

from orchestration.forgetting import retention_sentence
from orchestration.measured import capacity_sentence, measured_text
from orchestration.show import pitfall_lines
from orchestration.show_audit import audit_lines, row

GREEN, FAINT, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
MARKS = ("⟦", "⟧")
"""Around trained text where there are no colours."""


def check_lines(found: Mapping[str, Any]) -> list[str]:
    """The whole text: audit, rows to look at, plan's part, refusals."""
    lines = audit_lines(found["data"], found["model"]) if "data" in found else []
    if "base_loss" in found:
        lines.append(row(("base", measured_text(found["base_loss"]))))
    lines += [line for row in found.get("shown", ()) for line in _shown_lines(row)]
    if "dataset_bits" in found:
        lines.append(
            f"dataset: {found['dataset_tokens']:,} loss-bearing tokens ="
            f" {found['dataset_bits']:,} bits to hold"
        )
        lines.append(f"  {capacity_sentence(dict(found))}")
        lines += [retention_sentence(found["retention"])] if found["retention"] else []
        lines += pitfall_lines(found["pitfalls"])
    return lines


def _shown_lines(row: Mapping[str, Any]) -> list[str]:
    kept = "" if row["num_examples"] else "; left out: longer than seq_len"
    counts = f"{row['num_loss_tokens']:,} of {row['num_tokens']:,} tokens are trained"
    text = "".join(_painted(text, is_trained) for text, is_trained in row["parts"])
    return [f"--- {row['place']}: {counts}{kept}", text]


def _painted(text: str, is_trained: bool) -> str:
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return f"{GREEN if is_trained else FAINT}{text}{PLAIN}"
    return f"{MARKS[0]}{text}{MARKS[1]}" if is_trained else text
