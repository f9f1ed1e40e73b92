"""Tells the broker at once when the workers of a group have died. It lives in Ray Train's controller."""

from collections.abc import Mapping
from typing import Any

import ray
from ray.train import UserCallback


class GroupWatch(UserCallback):
    """Without it a group's death would be known when its next workers start, and that may be never: Ray Train
    waits for a node with room for them.

    Args:
        broker: {"name", "namespace"}.
        groups: the groups of the Train run.
    """

    def __init__(self, broker: dict[str, str], groups: list[str]) -> None:
        self.broker, self.groups = broker, groups

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        broker = ray.get_actor(**self.broker)
        controller = ray.get_runtime_context().current_actor
        gone = broker.gone.remote(self.groups, was_preempted(worker_exceptions), controller)
        ray.get(gone)  # before the next workers begin


def was_preempted(errors: Mapping[int, BaseException]) -> bool:
    """Whether a worker died because its node was taken away, as Ray says of a node that was drained for a
    preemption. What the others then die of does not count."""
    # Train wraps what it found when it asked the worker for its state.
    causes = [getattr(error, "health_check_failure", error) for error in errors.values()]
    return any(getattr(cause, "preempted", False) for cause in causes)
