"""What counts in a trial's metrics rows; read by the worker that writes them and by the results."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DIVERGED_LOSS = 1e30
"""What a diverged or failed trial reports once as eval_loss, so that the report carries the metric and
a scheduler ranks it last. It never reaches the results: those are read from the trial's own files."""
REWARDED = ("eval_score", "eval_reward")
"""Keys of rows of which more is better."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """By what trials are judged, and which is chosen.

    Args:
        key: of a metrics row: eval_loss, eval_bits_per_byte, eval_score or eval_reward.
        max_forgetting: most that retention_loss may have risen over the base's in a row that is chosen, nats/token;
            None: whatever it has.
        lr_tolerance: of trials within this fraction of the best, the one with the lowest learning rate is chosen; 0:
            the best.
    """

    key: str = "eval_loss"
    max_forgetting: float | None = None
    lr_tolerance: float = 0.0

    def loss(self, row: dict[str, Any]) -> float:
        """What is minimised."""
        return -row[self.key] if self.key in REWARDED else row[self.key]

    def best_row(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """The row with the lowest finite loss after training began (the first of equals) of those that do not forget
        too much; the row at 0 examples is the untouched base. None when there is none."""
        usable = [row for row in rows if row["steps"] > 0 and math.isfinite(self.loss(row))]
        if self.max_forgetting is not None:
            usable = [row for row in usable if self._keeps(row, rows[0])]
        return min(usable, key=self.loss, default=None)

    def _keeps(self, row: dict[str, Any], base: dict[str, Any]) -> bool:
        """Whether a row forgets no more than it may; one whose retention_loss is not finite forgets all."""
        assert self.max_forgetting is not None
        losses = row["retention_loss"], base["retention_loss"]
        return None not in losses and losses[0] - losses[1] <= self.max_forgetting


BY_LOSS = Judge()
