"""The best candidate as a sweep of its own: what reruns it."""

from collections.abc import Mapping
from typing import Any

import yaml

from orchestration.config import SweepConfig
from orchestration.results import TrialRecord
from search_spaces.variants import PLAIN

OF_A_SEARCH = (
    "search",
    "num_candidates",
    "lr_prior",
    "scheduler",
    "grace_period",
    "confirm",
    "select",
    "time_budget",
    "max_cost",
)
"""Keys that say how the best is found among several: one candidate needs none of them."""
AS_TRAINED = (
    "lora_rank",
    "learning_rate",
    "global_batch_size",
    "lora_alpha",
    "target",
    "lr_schedule",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "dropout",
    "seed",
)
"""Keys that have the candidate's values, whatever ranges the sweep had."""


def best_config(name: str, resolved: Mapping[str, Any], best: TrialRecord) -> dict[str, Any]:
    """The keys of a sweep whose only candidate is the best of another; those at their defaults are left out.

    Args:
        name: of the run that found it.
        resolved: resolved.json of that run.
    """
    fields = SweepConfig.model_fields
    kept = {
        key: value
        for key, value in resolved["config"].items()
        if key not in (*OF_A_SEARCH, *AS_TRAINED, "variant")
        and (key not in fields or value != fields[key].default)
    }
    candidate = {key: best.candidate[key] for key in AS_TRAINED}
    variant = {} if best.settings.variant == PLAIN else {"variant": best.settings.variant}
    # One trial has nobody to be stopped for.
    return kept | {"name": f"{name}-best"} | candidate | variant | {"scheduler": "fifo"}


def best_yaml(name: str, resolved: Mapping[str, Any], best: TrialRecord) -> str:
    """`best_config` as a file."""
    config = best_config(name, resolved, best)
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, default_flow_style=None)
