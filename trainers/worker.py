"""The Ray Train functions: one trial on the workers of its group, or a warm group that serves many."""

import math
import os
import time
import uuid
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from trainers.comm import Comm
from trainers.composition import CompositionLog
from trainers.credentials import masked
from trainers.metrics import DIVERGED_LOSS
from trainers.mirror import mirror_of
from trainers.object_store import StoreError
from trainers.pack_server import PackServer
from trainers.paths import RunPaths
from trainers.replay import Memory
from trainers.run_lock import hold_run
from trainers.sft_trainer import Station, TrialSpec, recorded_rows, train_trial

IDLE_WAIT_S = 1.0
"""How long an idle group waits for a command: its other workers wait in a collective meanwhile."""
POLL_WAIT_S = 20.0
"""How long the broker holds a question for commands of a busy group."""
LOOK_S = 2.0
"""How often a group asks whether its node will be taken away; the shortest notice of a cloud is 30 s."""
GRACE_S = 120.0
"""After a notice without a deadline Ray Train ends the workers so much later (its
DEFAULT_PREEMPTION_DEADLINE_S)."""


def train_worker(config: dict[str, Any]) -> dict[str, str]:
    """Runs on every worker of a solo trial's group. Each evaluation is one report; the row of the
    untouched base (0 examples) is not reported, as no scheduler may judge it."""
    _use_own_device()
    spec = TrialSpec.from_dict(config["trial"])
    with hold_run(spec.folder):
        return _train(spec, config["seen"])


def _train(spec: TrialSpec, num_seen: int) -> dict[str, str]:
    for row in recorded_rows(spec)[num_seen:]:
        ray.train.report({**row, "trial": spec.name})  # a driver died before it was judged

    def report(row: dict[str, Any]) -> bool:
        if row["steps"] > 0:
            ray.train.report({**row, "trial": spec.name})
        return True

    result = train_trial(spec, report)
    if result.status in ("diverged", "failed"):
        ray.train.report(
            {"eval_loss": DIVERGED_LOSS, "examples": spec.num_examples, "trial": spec.name}
        )
    return {"status": result.status, "reason": result.reason}


def serve_worker(config: dict[str, Any]) -> None:
    """Runs on every worker of a warm group until the broker says stop.

    config: {"broker": {"name", "namespace"}, "groups": names of the groups of this Train run (one, or one for
    each worker), "warm": the dict of a trial whose base
    and data are loaded before the group says that it is ready, "measure": {"path", "lora_rank",
    "row_tokens"}: see trainers/measure.py, "preemptible": whether the group must look for preemptions}.
    """
    _use_own_device()
    groups, context = config["groups"], ray.train.get_context()
    # Groups that share a run have a worker each, which shares nothing with the others.
    comm = Comm(alone=len(groups) > 1)
    group = groups[context.get_world_rank()] if len(groups) > 1 else groups[0]
    link = BrokerLink(config["broker"], group, preemptible=config["preemptible"])
    link.here()
    if not comm.share(link.begin() if comm.world_rank == 0 else None):
        return
    spec = TrialSpec.from_dict(config["warm"])
    with hold_run(spec.folder):
        _serve(link, comm, spec, config["measure"])


def _remembers(server: PackServer, spec: TrialSpec, group: str) -> None:
    """Lets a group do its forwards again after a death. On a GPU no two executions share their last bits, and
    a copy of a run on an object store dies with its process."""
    assert server.station is not None
    if server.station.model.device.type == "cpu" and mirror_of(spec.folder) is None:
        run = RunPaths(spec.folder.parents[1])
        server.memory = Memory(CompositionLog(run.composition(group)), server.comm)


def _serve(link: "BrokerLink", comm: Comm, warm: TrialSpec, measure: dict[str, Any]) -> None:
    began = time.perf_counter()
    server = PackServer(link, comm, Station)
    try:
        server.station = Station(warm, comm)
        coverage = server.station.coverage(warm.candidate)
        measured = server.station.measure(**measure)
        _remembers(server, warm, link.group)
    except Exception as error:  # the boundary: Train would start a group that cannot load for ever
        link.lose(f"{type(error).__name__}: {error}")
        return
    if comm.world_rank == 0:
        seconds = round(time.perf_counter() - began, 1)
        link.hello(server.station.facts() | coverage | measured | {"loaded_in_s": seconds})
    try:
        server.serve()
    except (
        OSError,
        StoreError,
    ) as error:  # no trial's fault: they go on elsewhere, or after a resume
        link.lose(f"the run's storage takes nothing more: {error}")


def _use_own_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())


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
