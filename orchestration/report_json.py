"""`tenfold report --json`: what the report of a sweep shows, for a program."""

from typing import Any

from orchestration.choosing import choice_lines
from orchestration.forgetting import base_retention, forgetting
from orchestration.objective import Objective
from orchestration.results import TrialRecord, best_trial, objective_of_records, read_trials
from orchestration.run_folder import run_at
from orchestration.saved import study_command_of
from trainers.credentials import masked
from trainers.mirror import shown
from trainers.paths import RunPaths, read_json, read_state

OF_PLAN = (
    "method",
    "model",
    "data",
    "dataset_tokens",
    "dataset_bits",
    "capacity",
    "budget",
    "defaults",
    "discarded",
    "cut_ranks",
    "cut_values",
    "unfit_ranks",
    "pitfalls",
)
"""Keys of plan.json that the report shows; those of later versions are null in a run of an earlier one."""


def report_json(place: str) -> dict[str, Any]:
    """A sweep or study as its report shows it. place: folder or URL of one that has a report."""
    run = run_at(place)
    return study_json(run) if study_command_of(run) is not None else sweep_json(run)


def sweep_json(run: RunPaths) -> dict[str, Any]:
    """A sweep as it is on disk: trials best first, what was discarded before any, and the best one's name.

    "score" says what trials are judged by, and which way is better; "choice" why the best is the best, where that is
    not simply the best score; "repeats" of a trial which one it confirms on a new seed.
    """
    plan, resolved = read_state(run.plan), read_state(run.resolved)
    records = read_trials(run)
    best, score = best_trial(records), objective_of_records(records)
    return {
        "name": run.root.name,
        "kind": "sweep",
        "report": shown(run.report),
        "score": {
            "key": score.key,
            "unit": score.unit,
            "lower_is_better": score.best is min,
        },
        "base": _base(records, score),
        "best": best.name if best else None,
        "best_adapter": shown(run.best) if best else None,
        "choice": choice_lines(records, best),
        "trials": [_trial(record, score, run) for record in records],
        **{key: plan.get(key) for key in OF_PLAN},
        "versions": resolved["versions"],
    }


def _base(records: list[TrialRecord], score: Objective) -> dict[str, float | None]:
    """The untouched base, as the trials measured it before their first step."""
    loss = next((record.base_loss for record in records if record.base_loss is not None), None)
    kept = next((kept for kept in map(base_retention, records) if kept is not None), None)
    return {"score": None if loss is None else score.of(loss), "retention_loss": kept}


def _trial(record: TrialRecord, score: Objective, run: RunPaths) -> dict[str, Any]:
    best, settings = record.best, record.settings
    return {
        "name": record.name,
        "status": record.status,
        "reason": record.reason,
        "clone_of": record.clone_of or None,
        "repeats": record.repeats,
        "candidate": record.candidate,
        "scale": settings.scale,
        "scaled_learning_rate": settings.scaled_learning_rate,
        "score": score.of(record.best_loss) if best else None,
        "best_row": best,
        "last_row": record.rows[-1] if record.rows else None,
        "retention_change": forgetting(record),
        "notes": [masked(note) for note in record.notes],
        "folder": shown(run.trial(record.name).root),
    }


def study_json(run: RunPaths) -> dict[str, Any]:
    """A study: its results.json, and where its report is. "kind" is the study's."""
    return {**read_json(run.results), "report": shown(run.report)}
