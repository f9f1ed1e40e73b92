"""Trials of sweeps that never ran, as the report reads them: ranks x learning rates x batches on known curves."""

import itertools
import math
import random
from typing import Any

from orchestration.results import TrialRecord
from tests.orchestration.sweeps import candidate_dict

BASE_LOSS, EXAMPLES = 3.3, 640
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BEST_LOG10 = -2.6
"""Where every curve of `grid_records` is best, but for what its rank adds."""


def record(
    learning_rate: float,
    loss: float | None,
    *,
    lora_rank: int = 8,
    batch: int = 16,
    status: str = "finished",
    reason: str = "",
    num_rows: int = 5,
    **candidate: Any,
) -> TrialRecord:
    """A trial whose eval_loss falls from BASE_LOSS to `loss`; None: it wrote no row."""
    values = {"learning_rate": learning_rate, "lora_rank": lora_rank, "global_batch_size": batch}
    values |= {"target": ["attn", "mlp", "unembed"]} | candidate
    rows = () if loss is None else tuple(_row(i, loss, batch) for i in range(num_rows))
    seed = values.get("seed", 0)
    return TrialRecord(
        name=f"r{lora_rank}-lr{learning_rate:.1e}-b{batch}-attn+mlp+unembed-{seed:08d}",
        candidate=candidate_dict(**values),
        status=status,
        reason=reason,
        rows=rows,
    )


def _row(number: int, loss: float, batch: int) -> dict[str, Any]:
    examples = number * EXAMPLES // 4
    left = math.exp(-1.2 * number) if number < 4 else 0.0
    now = loss + (BASE_LOSS - loss) * left
    row = {"examples": examples, "steps": examples // batch, "tokens": examples * 100}
    row |= {"eval_loss": now, "eval_bits_per_byte": now / 2.2, "seconds": examples / 40}
    return row | {"peak_bytes": 700_000_000 + 1_000_000 * number, "train_loss": now}


def grid_records() -> list[TrialRecord]:
    """3 ranks x 7 learning rates x 2 batches: parabolas whose highest rate diverges, the worst stopped early."""
    noise, found = random.Random(7), []
    for rank, rate, batch in itertools.product((1, 8, 64), RATES, (16, 32)):
        away = math.log10(rate) - BEST_LOG10 - 0.1 * math.log2(batch / 16)
        loss = 3.0 - 0.04 * math.log10(rank) + 0.02 * (batch == 32) + 0.09 * away**2
        loss += noise.gauss(0, 0.003)
        status, reason, num_rows = "finished", "", 5
        if rate == RATES[-1]:
            status, reason, num_rows = "diverged", "train_loss nan at step 17", 2
        elif rate == RATES[0]:
            status, reason, num_rows = "stopped", "stopped by its scheduler", 2
        one = record(
            rate, loss, lora_rank=rank, batch=batch, status=status, reason=reason, num_rows=num_rows
        )
        found.append(one)
    return sorted(found, key=lambda r: (r.status == "diverged", r.rows[-1]["eval_loss"]))
