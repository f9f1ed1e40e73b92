"""Results of a run as pandas frames, read from the trials' own files."""

from typing import Any

import pandas as pd

from orchestration.forgetting import KEY as RETENTION
from orchestration.results import TrialRecord, best_trial, read_trials
from trainers.paths import RunPaths

OF_BEST = ("examples", "steps", "eval_loss", "eval_bits_per_byte", RETENTION)
"""Keys of a trial's best evaluation that are columns of their own."""


def results_frame(run: RunPaths) -> pd.DataFrame:
    """A row for each trial that has begun or may, best first, by name.

    Columns: the candidate's keys, scale; status, reason, is_best, clone_of, repeats (the trial that it confirms on
    another seed); score, by which trials are judged, and what else its best evaluation has: OF_BEST; base_score;
    examples_seen and seconds at its last evaluation. What a trial does not have is missing (NaN).
    """
    records = read_trials(run)
    best = best_trial(records)
    rows = [_row(record) | {"is_best": record is best} for record in records]
    frame = pd.DataFrame(rows, columns=None if rows else ["trial", "status"])
    return frame.set_index("trial")


def _row(record: TrialRecord) -> dict[str, Any]:
    top, last, score = record.best or {}, (record.rows or ({},))[-1], record.objective
    candidate = record.candidate | {"target": "+".join(record.candidate["target"])}
    row: dict[str, Any] = {"trial": record.name, **candidate}
    row |= {"variant": record.settings.variant, "scale": record.settings.scale}
    row |= {"status": record.status, "reason": record.reason, "clone_of": record.clone_of}
    base = record.base_loss
    row |= {"score": score.of(record.best_loss) if top else None, "repeats": record.repeats}
    row |= {"base_score": None if base is None else score.of(base)}
    row |= {key: top.get(key) for key in OF_BEST}
    return row | {"examples_seen": last.get("examples", 0), "seconds": last.get("seconds", 0.0)}


def metrics_frame(run: RunPaths) -> pd.DataFrame:
    """A row for each evaluation of each trial, in the order of `results_frame`; the first of a trial (steps 0) is the
    untouched base. Columns: trial, then those of metrics.jsonl."""
    rows = [{"trial": r.name, **_values(row)} for r in read_trials(run) for row in r.rows]
    return pd.DataFrame(rows, columns=None if rows else ["trial", "examples", "eval_loss"])


def _values(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "crc"}
