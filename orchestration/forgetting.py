"""What training costs the base of what it knew: the retention set in a plan, and its losses in results."""

from typing import Any

from orchestration.results import TrialRecord

KEY = "retention_loss"


def retention_sentence(facts: dict[str, Any]) -> str:
    """The retention set of a plan in one line."""
    return (
        f"retention: {facts['data']}: {facts['num_rows']:,} of {facts['num_all_rows']:,} rows, "
        f"{facts['num_loss_tokens']:,} of {facts['num_all_loss_tokens']:,} loss-bearing tokens, at "
        "every evaluation"
    )


def has_retention(records: list[TrialRecord]) -> bool:
    """Whether a sweep followed a retention set."""
    return any(KEY in row for record in records for row in record.rows)


def base_retention(record: TrialRecord) -> float | None:
    """retention_loss of the untouched base, nats/token."""
    return next((row.get(KEY) for row in record.rows if row["steps"] == 0), None)


def forgetting(record: TrialRecord) -> float | None:
    """retention_loss where a trial's eval_loss is lowest, over the base's, nats/token; None where
    either is missing or not finite."""
    loss, base = (record.best or {}).get(KEY), base_retention(record)
    return None if loss is None or base is None else loss - base


def retention_text(record: TrialRecord) -> str:
    """A trial's retention_loss at its lowest eval_loss, and what of it was forgotten."""
    if record.best is None:
        return ""
    loss, change = record.best.get(KEY), forgetting(record)
    if loss is None:
        return "not finite"
    return f"{loss:.4f}" if change is None else f"{loss:.4f} ({change:+.4f})"
