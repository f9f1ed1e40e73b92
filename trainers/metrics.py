"""What counts in a trial's metrics rows; read by the worker that writes them and by the results."""

import math
from collections.abc import Sequence
from typing import Any

DIVERGED_LOSS = 1e30
"""What a diverged or failed trial reports once as eval_loss, so that the report carries the metric and
a scheduler ranks it last. It never reaches the results: those are read from the trial's own files."""


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with the lowest finite eval_loss after training began (the first of equals); the row
    at 0 examples is the untouched base. None when there is none."""
    trained = [row for row in rows if row["steps"] > 0 and math.isfinite(row["eval_loss"])]
    return min(trained, key=lambda row: row["eval_loss"], default=None)
