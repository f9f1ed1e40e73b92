"""A worker group's end of the broker. Imports ray, and no torch: a stub worker needs no more than this."""

import math
import os
import time
import uuid
from typing import Any

import ray
import ray.train

from trainers.credentials import masked

IDLE_WAIT_S = 1.0
"""How long an idle group waits for a command: its other workers wait in a collective meanwhile."""
POLL_WAIT_S = 20.0
"""How long the broker holds a question for commands of a busy group."""
LOOK_S = 2.0
"""How often a group asks whether its node will be taken away; the shortest notice of a cloud is 30 s."""
GRACE_S = 120.0
"""After a notice without a deadline Ray Train ends the workers so much later (its
DEFAULT_PREEMPTION_DEADLINE_S)."""


def link_of(config: dict[str, Any], *, preemptible: bool = False) -> "BrokerLink":
    """The link of this worker's group.

    Args:
        config: a Train function's: {"broker": {"name", "namespace"}, "groups": names of the groups of this Train
            run (one, or one for each worker)}.
        preemptible: whether the group must look for preemptions.
    """
    groups, rank = config["groups"], ray.train.get_context().get_world_rank()
    group = groups[rank if len(groups) > 1 else 0]
    return BrokerLink(config["broker"], group, preemptible=preemptible)


class BrokerLink:
    """The link of a pack server over Ray. Neither telling nor asking waits while there is work."""

    def __init__(self, broker: dict[str, str], group: str, *, preemptible: bool = False) -> None:
        self.broker = ray.get_actor(**broker)
        self.next_look = time.monotonic() if preemptible else math.inf
        self.noticed: float | None = None
        self.group, self.incarnation = group, uuid.uuid4().hex
        self.asked: Any = None
        self.num_told = 0

    @property
    def attempt(self) -> str:
        """The start of the Train run. Each has a placement group of its own, and all its workers the same."""
        found = ray.get_runtime_context().get_placement_group_id()
        assert found is not None, "a Train worker must live in a placement group"
        return found

    def here(self) -> None:
        """Says where this worker lives, for the day on which it hangs. On every worker of the group."""
        node = ray.get_runtime_context().get_node_id()
        ray.get(self.broker.here.remote(self.group, self.attempt, node, os.getpid()))

    def begin(self) -> bool:
        """Says that the group starts; False: it must not."""
        return bool(ray.get(self.broker.begin.remote(self.group, self.attempt)))

    def lose(self, reason: str) -> None:
        """Says that the group cannot serve."""
        ray.get(self.broker.lose.remote(self.group, masked(reason)))

    def hello(self, info: dict[str, Any]) -> None:
        """Says that the group is ready, and what it measured."""
        where = {"pid": os.getpid(), "node_id": ray.get_runtime_context().get_node_id()}
        ray.get(self.broker.hello.remote(self.group, self.incarnation, info | where))

    def tell(self, event: dict[str, Any]) -> None:
        # Numbered: calls that nobody waits for may overtake each other.
        self.broker.tell.remote(self.group, self.incarnation, self.num_told, event)
        self.num_told += 1

    def commands(self, *, idle: bool) -> list[dict[str, Any]]:
        if self.asked is None:
            self.asked = self.broker.commands.remote(self.group, self.incarnation, POLL_WAIT_S)
        ready, _ = ray.wait([self.asked], timeout=IDLE_WAIT_S if idle else 0)
        looks = [{"kind": "look"}] if time.monotonic() >= self.next_look else []
        if looks:
            self.next_look = time.monotonic() + LOOK_S
        if not ready:
            return looks
        self.asked = None
        return [*ray.get(ready[0]), *looks]

    def deadline(self) -> float | None:
        info = ray.train.get_preemption_info()  # a collective of the whole Train run
        if info is None:
            return None
        self.noticed = self.noticed or time.time()
        return info.deadline_ms / 1000 if info.deadline_ms else self.noticed + GRACE_S
