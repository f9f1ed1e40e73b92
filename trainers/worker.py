"""The Ray Train functions: one trial on the workers of its group, or a warm group that serves many."""

import time
from typing import Any, Protocol

import ray.train
import ray.train.torch
import torch

from trainers.comm import Comm
from trainers.composition import CompositionLog
from trainers.metrics import DIVERGED_LOSS
from trainers.mirror import mirror_of
from trainers.object_store import StoreError
from trainers.pack_server import Link, PackServer
from trainers.paths import RunPaths
from trainers.replay import Memory
from trainers.run_lock import hold_run
from trainers.sft_trainer import Station, TrialSpec, recorded_rows, train_trial


def train_worker(config: dict[str, Any]) -> dict[str, str]:
    """Runs on every worker of a solo trial's group. Each evaluation is one report; the row of the
    untouched base (0 examples) is not reported, as no scheduler may judge it."""
    _use_own_device()
    spec = TrialSpec.from_dict(config["trial"])
    with hold_run(spec.folder):
        return _train(spec, config["seen"])


def _train(spec: TrialSpec, num_seen: int) -> dict[str, str]:
    for row in recorded_rows(spec)[num_seen:]:
        ray.train.report(_judged(spec, row))  # a driver died before it was judged

    def report(row: dict[str, Any]) -> bool:
        if row["steps"] > 0:
            ray.train.report(_judged(spec, row))
        return True

    result = train_trial(spec, report)
    if result.status in ("diverged", "failed"):
        ray.train.report(
            {"eval_loss": DIVERGED_LOSS, "examples": spec.num_examples, "trial": spec.name}
        )
    return {"status": result.status, "reason": result.reason}


def _judged(spec: TrialSpec, row: dict[str, Any]) -> dict[str, Any]:
    """A row as Tune is told it, which minimises eval_loss whatever a trial is judged by."""
    return {**row, "eval_loss": spec.judge.loss(row), "trial": spec.name}


class GroupLink(Link, Protocol):
    """What a group hears and says before it serves."""

    group: str

    def here(self) -> None:
        """Says where this worker lives. On every worker of the group."""
        ...

    def begin(self) -> bool:
        """Says that the group starts; False: it must not."""
        ...

    def lose(self, reason: str) -> None:
        """Says that the group cannot serve."""
        ...

    def hello(self, info: dict[str, Any]) -> None:
        """Says that the group is ready, and what it measured."""
        ...


def serve_worker(config: dict[str, Any], link: GroupLink) -> None:
    """Runs on every worker of a warm group until it is told to stop.

    config: {"groups": names of the groups of this Train run (one, or one for each worker), "warm": the dict of
    a trial whose base and data are loaded before the group says that it is ready, "measure": {"path",
    "lora_rank", "row_tokens"}: see trainers/measure.py}.
    """
    _use_own_device()
    # Groups that share a run have a worker each, which shares nothing with the others.
    comm = Comm(alone=len(config["groups"]) > 1)
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


def _serve(link: GroupLink, comm: Comm, warm: TrialSpec, measure: dict[str, Any]) -> None:
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
