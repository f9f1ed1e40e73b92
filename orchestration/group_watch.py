"""What Ray Train's controller does at once when workers have died. It lives in that controller."""

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import UserCallback

SETTLE_S = 1.0
"""The processes of a job that ends die within so long of each other (measured: 0.2 s)."""
ANSWER_S = 2.0
"""How long an actor that lives may take to say so; a dead one is known at once."""


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
        preempted, deaths = was_preempted(worker_exceptions), self._deaths(worker_exceptions)
        gone = broker.gone.remote(self.groups, preempted, controller, deaths)
        ray.get(gone)  # before the next workers begin
        require_alive(broker, "the sweep that they worked for")

    def _deaths(self, errors: Mapping[int, BaseException]) -> dict[str, str]:
        """Group -> what its workers died of. Groups that share a run have a worker each."""
        shared = len(self.groups) > 1
        return {self.groups[rank if shared else 0]: how_it_died(errors[rank]) for rank in errors}


class TrialWatch(UserCallback):
    """Starts no new workers for a trial whose own actor is gone. To be made in that actor."""

    def __init__(self) -> None:
        self.trial: Any = ray.get_runtime_context().current_actor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        require_alive(self.trial, "the trial that they worked for")


def require_alive(actor: Any, what: str) -> None:
    """Waits until what dies with the workers is dead, and looks.

    A controller that is about to be ended sees its workers die first. Would it ask for new ones then, their
    placement group would be registered after its creator and its job were struck off, and Ray (seen in
    2.60) would keep it for as long as the cluster lives: CPUs and GPUs that nobody can have any more.

    Raises:
        ValueError: the actor is dead. The Train run ends with it.
    """
    time.sleep(SETTLE_S)
    ready, _ = ray.wait([actor.__ray_ready__.remote()], timeout=ANSWER_S)
    try:
        ray.get(ready)
    except RayActorError as error:
        raise ValueError(f"no new workers: {what} has ended") from error


def how_it_died(error: BaseException) -> str:
    """A worker's death in one line, as Ray knows it."""
    cause = getattr(error, "health_check_failure", error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "exit" in line.lower()]
    return f"{type(cause).__name__}: {(telling or lines or [''])[-1]}"[:300]


def was_preempted(errors: Mapping[int, BaseException]) -> bool:
    """Whether a worker died because its node was taken away, as Ray says of a node that was drained for a
    preemption. What the others then die of does not count."""
    # Train wraps what it found when it asked the worker for its state.
    causes = [getattr(error, "health_check_failure", error) for error in errors.values()]
    return any(getattr(cause, "preempted", False) for cause in causes)
