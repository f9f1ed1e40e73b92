"""results.json of a study: its model, data and arms, and where it is written."""

from typing import Any

from orchestration.config import SweepConfig
from orchestration.lr_curves import fit_dict
from orchestration.planning import Plan
from orchestration.results import TrialRecord
from orchestration.studies.agenda import records_of
from orchestration.studies.arms import Arm
from orchestration.studies.comparison import Comparison
from orchestration.studies.config import short_path
from search_spaces.architecture import ModelShape
from search_spaces.studies.optimum import ArmOptimum
from search_spaces.studies.points import Unsettled
from trainers.paths import RunPaths, write_json


def plan_facts(plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model, data) of a study on one set."""
    assert plan.audit is not None
    assert plan.data_spec is not None
    audit = plan.audit
    model = model_facts(plan.config, plan.shape)
    data = {
        "name": str(short_path(plan.config.data)),
        "num_train_rows": audit.num_train_rows,
        "num_eval_rows": audit.num_eval_rows,
        "num_train_loss_tokens": audit.num_train_loss_tokens,
        "seq_len": plan.data_spec.seq_len,
    }
    return model, data


def model_facts(config: SweepConfig, shape: ModelShape) -> dict[str, Any]:
    """The base in numbers."""
    return {
        "name": short_path(config.model),
        "num_params": shape.num_params,
        "hidden_size": shape.hidden_size,
        "num_layers": shape.num_layers,
    }


def arm_dict(arm: Arm, compared: Comparison) -> dict[str, Any]:
    """An arm with its points and its fit."""
    found, template = compared.optimum(arm), arm.template
    return {
        "label": arm.label,
        "method": "full" if arm.full_finetune else "lora",
        "lora_rank": template.lora_rank,
        "lora_alpha": template.lora_alpha,
        "target": list(template.target),
        "global_batch_size": template.global_batch_size,
        "trained_params": arm.trained_params,
        "points": [_point(record) for record in records_of(arm, compared.records)],
        "fit": fit_dict(found) if isinstance(found, ArmOptimum) else None,
        "unsettled": found.reason if isinstance(found, Unsettled) else None,
    }


def _point(record: TrialRecord) -> dict[str, Any]:
    last = record.rows[-1] if record.rows else {}
    return {
        "learning_rate": record.candidate["learning_rate"],
        "seed": record.candidate["seed"],
        "status": record.status,
        "reason": record.reason,
        "eval_loss": last["eval_loss"] if record.status == "finished" else None,
        "base_loss": record.base_loss,
        **{
            key: last.get(key)
            for key in ("examples", "steps", "loss_tokens", "seconds", "peak_bytes")
        },
        "trial": record.name,
    }


def write_results(run: RunPaths, results: dict[str, Any]) -> None:
    """Writes results.json, results.csv and report.html."""
    from orchestration.studies.report import write_study_report  # plotly

    write_json(run.results, results)
    write_study_report(run.root)
