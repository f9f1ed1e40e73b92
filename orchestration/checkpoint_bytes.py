"""Bytes that the checkpoints of a run take on its storage, which a plan bounds. Imports neither torch nor ray."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from orchestration.packs import adapter_params

if TYPE_CHECKING:
    from orchestration.planning import Plan

FP32_BYTES = 4
CHECKPOINT_COPIES, BEST_COPIES = 3, 1
"""Weights and two AdamW moments of a checkpoint; the weights of the best evaluation."""
MORE_WHILE_RUNNING = 2
"""Checkpoints of a trial that runs beside its last: the one before, and the next while it is written."""


def ended_bytes(num_params: Iterable[int]) -> int:
    """Of trials that have ended: the last checkpoint and the best weights of each.

    Args:
        num_params: trained parameters of each trial.
    """
    return sum(num_params) * FP32_BYTES * (CHECKPOINT_COPIES + BEST_COPIES)


def running_bytes(num_params: Iterable[int]) -> int:
    """What trials take beyond that while they run, at most."""
    return sum(num_params) * FP32_BYTES * CHECKPOINT_COPIES * MORE_WHILE_RUNNING


def checkpoint_bytes(plan: "Plan") -> dict[str, Any]:
    """plan.json's "checkpoints": once every trial has ended, and beyond that for each that runs."""
    params = adapter_params(plan)
    return {
        "ended_bytes": ended_bytes(params),
        "running_trial_bytes": running_bytes([max(params, default=0)]),
    }


def checkpoints_line(checkpoints: dict[str, Any]) -> str:
    """Both in words."""
    return (
        f"checkpoints: at most {checkpoints['ended_bytes']:,} bytes when all trials have ended (the last and the "
        f"best of each), and {checkpoints['running_trial_bytes']:,} more for each that runs"
    )
