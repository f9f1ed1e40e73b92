"""The Ray Train function: one trial on the workers of its group."""

from typing import Any

import ray.train
import ray.train.torch
import torch

from trainers.sft_trainer import TrialSpec, train_trial

DIVERGED_LOSS = 1e30
"""What a diverged trial reports once as eval_loss, so that the report carries the metric and a
scheduler ranks it last. It never reaches the results: those are read from the trial's own files."""


def train_worker(config: dict[str, Any]) -> dict[str, str]:
    """Runs on every worker of the group. Each evaluation is one report; the row of the untouched
    base (0 examples) is not reported, as no scheduler may judge it."""
    if torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())
    spec = TrialSpec.from_dict(config["trial"])

    def report(row: dict[str, Any]) -> bool:
        if row["steps"] > 0:
            ray.train.report({**row, "trial": spec.name})
        return True

    result = train_trial(spec, report)
    if result.status == "diverged":
        ray.train.report(
            {"eval_loss": DIVERGED_LOSS, "examples": spec.num_examples, "trial": spec.name}
        )
    return {"status": result.status, "reason": result.reason}
