"""batch: the gap between LoRA and full fine-tuning by global batch, each arm at its own best rate."""

from typing import Any

from orchestration.studies.comparison import Comparison
from orchestration.studies.figures import figure, series
from search_spaces.studies.points import Unsettled
from search_spaces.studies.ratio import Gap, Ratio, loss_gap, lr_ratio


def conclusion(compared: Comparison) -> dict[str, Any]:
    """Verdict on "LoRA falls behind as the batch grows", table and picture."""
    rows = [_row(compared, arm) for arm in compared.lora_arms]
    return {
        "verdict": _verdict(rows),
        "tables": [_table(rows)],
        "figures": [_picture(rows)],
        "limits": [
            "Equal examples: a larger batch takes fewer optimizer steps, in both arms.",
        ],
    }


def _row(compared: Comparison, arm: Any) -> dict[str, Any]:
    full, own = compared.points(compared.full_of(arm)), compared.points(arm)
    assert compared.plan.budget is not None
    batch = arm.template.global_batch_size
    return {
        "arm": arm,
        "batch": batch,
        "steps": -(-compared.plan.budget.num_examples // batch),
        "gap": loss_gap(full, own),
        "ratio": lr_ratio(full, own),
    }


def _verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compares the smallest batch's gap with the largest one's."""
    first, last = rows[0], rows[-1]
    gaps: list[Gap | Unsettled] = [first["gap"], last["gap"]]
    unsettled = [gap.reason for gap in gaps if isinstance(gap, Unsettled)]
    if unsettled or len(rows) < 2:
        why = "; ".join(unsettled) or "one batch alone"
        return {
            "status": "undecided",
            "sentence": f"The gap cannot be compared over batches ({why}).",
            "would_decide": "two batches whose arms all have an optimum",
        }
    small, large = first["gap"], last["gap"]
    grows, shrinks = large.low > small.high, large.high < small.low
    status = "supported" if grows else "contradicted" if shrinks else "undecided"
    said = "grows" if grows else "shrinks" if shrinks else "does not change beyond its intervals"
    return {
        "status": status,
        "sentence": f"LoRA's best loss over full fine-tuning's {said} from batch {first['batch']} "
        f"({_text(small)} nats/token) to batch {last['batch']} ({_text(large)}).",
        "would_decide": None if status != "undecided" else "more seeds, or a batch further away",
    }


def _text(gap: Gap) -> str:
    return f"{gap.estimate:+.4f}, {gap.low:+.4f} to {gap.high:+.4f}"


def _table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    cells = []
    for row in rows:
        gap, ratio = row["gap"], row["ratio"]
        loss = _text(gap) if isinstance(gap, Gap) else f"none: {gap.reason}"
        rates = (
            f"{ratio.estimate:.3g} ({ratio.low:.3g} to {ratio.high:.3g})"
            if isinstance(ratio, Ratio)
            else f"none: {ratio.reason}"
        )
        cells.append([str(row["batch"]), f"{row['steps']:,}", loss, rates])
    headers = [["global_batch_size", True], ["steps", True]]
    headers += [["LoRA's best loss over FullFT's (95%)", False], ["LR ratio (95%)", False]]
    return {
        "title": "LoRA against full fine-tuning by batch",
        "note": "Each arm at its own best learning rate.",
        "headers": headers,
        "rows": cells,
    }


def _picture(rows: list[dict[str, Any]]) -> dict[str, Any]:
    drawn = [(row["batch"], row["gap"]) for row in rows if isinstance(row["gap"], Gap)]
    gaps = series(
        "gap, 95% interval",
        [batch for batch, _ in drawn],
        [gap.estimate for _, gap in drawn],
        low=[gap.low for _, gap in drawn],
        high=[gap.high for _, gap in drawn],
    )
    return figure(
        "LoRA's best loss over full fine-tuning's",
        "global_batch_size",
        "nats/token",
        [gaps],
        x_log=True,
        hlines=[{"y": 0.0, "text": "equal"}],
    )
