"""The worker pool of a sweep: warm Ray Train groups and the broker that gives them trials.

The groups run in threads of the driver: when the driver dies, Ray ends them with it, and `tenfold
resume` starts new ones.
"""

import itertools
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from cluster.inventory import TrialDemand
from orchestration.board import GROUP_WAIT_S
from orchestration.environment import seconds_from
from orchestration.rungs import BY_SCHEDULER
from orchestration.silence import HANG_S
from orchestration.sweep import DRIVER_RESOURCE, DRIVER_SHARE

MAX_WAITING_TRIALS = 1000
GROUP_RESTARTS = -1
"""Train restarts a group whose worker died without limit; the board ends the trial that causes it."""
START_FAILURES = 2
"""Starts in which no node had room or the workers died before they ran, over the life of a Train run. A run that
served in between is followed by another."""
PREEMPTIONS = 100
"""Nodes that may be taken away from a Train run: it costs no trial more than the seconds since a save."""
POLL_S = 0.2
START_GRACE_S = 10.0
"""How long the end of a sweep waits for groups whose workers may be starting; the others end within 2 s."""
JOIN_S = 20.0
"""How long the end of a sweep waits for a group that never had workers; it ends with the driver."""
ALONE_S = 60.0
"""How long groups may take to end that have lost the broker: they ask it every few seconds."""
WAIT_VARIABLE = "TENFOLD_GROUP_WAIT_S"
"""Environment variable: another board.GROUP_WAIT_S, for clusters whose nodes come slower or never."""
HANG_VARIABLE = "TENFOLD_HANG_S"
"""Environment variable: another silence.HANG_S."""
LOOK_S = 10.0
"""How often somebody looks whether a group has fallen silent."""


class Pool:
    """Warm worker groups. Use as a context manager; leaving it ends every group.

    Args:
        demand: workers, CPUs and GPUs of one group.
        num_groups: how many.
        warm: the dict of a trial; its base and data are loaded before a group is ready.
        measure: see packs.measurement.
        storage: folder for Ray Train's own state.
        one_run: all groups are one Ray Train run, each of one worker. A run costs about 18 CPU-seconds of
            Ray's own processes, which count on a laptop; but the death of one worker restarts all
            workers of its run, which counts on a cluster.
        serve: the Train function of a group; default: trainers.worker.serve_worker with its link to the broker.
    """

    def __init__(
        self,
        demand: TrialDemand,
        num_groups: int,
        warm: dict[str, Any],
        measure: dict[str, Any],
        storage: str,
        *,
        one_run: bool = False,
        serve: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        assert not one_run or demand.num_workers == 1
        self.serve, self.one_run = serve or _serve, one_run
        self.demand, self.num_groups, self.storage = demand, num_groups, storage
        self.config = {"warm": warm, "measure": measure}
        # A namespace of its own: two sweeps may share a cluster.
        self.address = {"name": "broker", "namespace": f"tenfold-{uuid.uuid4().hex[:12]}"}
        self.broker: Any = None
        self.wait_s = seconds_from(WAIT_VARIABLE, GROUP_WAIT_S)
        self.hang_s = seconds_from(HANG_VARIABLE, HANG_S)
        self.threads: list[tuple[list[str], threading.Thread]] = []
        self.ending = False
        self.over = threading.Event()
        self.watch = threading.Thread(target=self._end_the_hung, daemon=True)

    def __enter__(self) -> "Pool":
        import ray

        from orchestration.broker import Broker

        # On the head, as the trials' drivers: a GPU node that is taken away takes workers alone.
        head = {"num_cpus": 0, "resources": {DRIVER_RESOURCE: DRIVER_SHARE}}
        options = {"max_concurrency": MAX_WAITING_TRIALS, **head, **self.address}
        self.broker = (
            ray.remote(Broker)
            .options(**options)
            .remote(self.num_groups, self.one_run, self.wait_s, self.hang_s)
        )
        # One wait for a node, not several that each count as a failed start.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(self.wait_s))
        os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")  # of 30 s, 5 are much
        names = [f"group-{number}" for number in range(self.num_groups)]
        ray.get(self.broker.gone.remote(names))  # they have no workers yet
        for groups in [names] if self.one_run else [[name] for name in names]:
            thread = threading.Thread(target=self._run_groups, args=(groups,), daemon=True)
            thread.start()
            self.threads.append((groups, thread))
        self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        import ray
        from ray.exceptions import RayActorError

        self.ending = True
        try:
            ray.get(self.broker.stop.remote())
            self._end_groups()
            ray.kill(self.broker)
        except RayActorError:  # without it every group ends by itself
            self._join(ALONE_S)
        finally:
            # Joined, not left: a call to Ray after its end would start another.
            self.over.set()
            self.watch.join()

    def _end_groups(self) -> None:
        """Waits for the groups that were told to stop; those that hang meanwhile are still ended."""
        import ray

        # Workers that just start hear it too, and end as they should: a controller that is killed leaves
        # its placement group behind until the driver ends.
        self._join(START_GRACE_S)
        waiting: Any = ray.get(self.broker.waiting.remote())
        for controller in filter(None, waiting.values()):
            ray.kill(controller)  # it waits for a node, and hears nothing
        loading: Any = ray.get(self.broker.loading.remote())
        for node, pid in loading:
            end_process(node, pid)  # it hears nothing for minutes, and nobody waits for its base
        for groups, thread in self.threads:
            thread.join(JOIN_S if waiting.keys() & groups else None)

    def _join(self, wait_s: float) -> None:
        until = time.monotonic() + wait_s
        for _groups, thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _end_the_hung(self) -> None:
        """Ends workers whose group has fallen silent, as long as the pool lives."""
        import ray
        from ray.exceptions import RayError

        while not self.over.wait(min(LOOK_S, self.hang_s / 4)):
            try:
                for node, pid in ray.get(self.broker.hung.remote()):
                    end_process(node, pid)
            except RayError:  # the broker is gone: who waits for it says so
                return

    def _run_groups(self, groups: list[str]) -> None:
        from ray.exceptions import RayActorError

        try:
            self._serve_groups(groups)
        except RayActorError:  # the broker is gone: who waits for it says so
            return

    def _serve_groups(self, groups: list[str]) -> None:
        """Ray Train runs, one after the other as long as each one served: their limits on failed starts and
        preemptions count over a run's whole life, and a pool that lives for days must not use them up."""
        import ray

        for number in itertools.count():
            served = self._num_ready(groups)
            try:
                self._trainer(groups, f"{groups[0]}-{number}").fit()
                reason = "it was told to stop"
            except Exception as error:  # the boundary of a thread: the trials must hear of any end
                reason = _telling_line(error)
            if self.ending:
                return
            if self._num_ready(groups) == served:
                ray.get([self.broker.lose.remote(name, reason) for name in groups])
                return
            ray.get(self.broker.gone.remote(groups))

    def _num_ready(self, groups: list[str]) -> int:
        import ray

        return ray.get(self.broker.num_ready.remote(groups))

    def _trainer(self, groups: list[str], name: str) -> Any:
        import ray.train
        from ray.train.torch import TorchTrainer

        from orchestration.group_watch import GroupWatch

        watched = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"
        resources: dict[str, float] = {"CPU": self.demand.cpus_per_worker}
        if self.demand.gpus_per_worker:
            resources["GPU"] = self.demand.gpus_per_worker
        return TorchTrainer(
            self.serve,
            train_loop_config={
                "broker": self.address,
                "groups": groups,
                # A look is a collective of the run, whose groups do not keep step with each other.
                "preemptible": watched and not self.one_run,
                **self.config,
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.demand.num_workers * len(groups),
                use_gpu=bool(self.demand.gpus_per_worker),
                resources_per_worker=resources,
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=self.storage,
                callbacks=[GroupWatch(self.address, groups)],
                failure_config=ray.train.FailureConfig(
                    max_failures=GROUP_RESTARTS,
                    max_preemption_failures=PREEMPTIONS,
                    controller_failure_limit=START_FAILURES,
                ),
            ),
        )

    def groups(self) -> dict[str, dict[str, Any]]:
        """What each group says of itself (`Station.facts`), or {"lost": reason}.

        Raises:
            ValueError: the broker is dead, and with it what the sweep knew of its groups.
        """
        import ray
        from ray.exceptions import RayActorError

        try:
            return ray.get(self.broker.groups.remote())
        except RayActorError as error:
            raise ValueError(
                "the broker between trials and workers has died; `tenfold resume` goes on from the last checkpoints"
            ) from error

    def packs(self) -> dict[str, list[str]]:
        """Group that is ready -> the trials that share its forwards now; nothing where the broker does not answer,
        which whoever waits for it says."""
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(self.broker.packs.remote(), timeout=LOOK_S)
        except RayError:
            return {}

    def first_group(self) -> dict[str, Any]:
        """Waits for the first group that is ready; the others come when they come.

        Raises:
            ValueError: no group can start.
        """
        while True:
            groups = self.groups()
            ready = [info for info in groups.values() if info and "lost" not in info]
            if ready:
                return ready[0]
            if len(groups) == self.num_groups:
                raise ValueError(f"no worker group could start: {_reasons(groups)}")
            time.sleep(POLL_S)

    def require_group(self) -> None:
        """Returns while a group is there or may still come.

        Raises:
            ValueError: every group is lost.
        """
        groups = self.groups()
        if len(groups) == self.num_groups and all("lost" in info for info in groups.values()):
            raise ValueError(
                f"no worker group is left: {_reasons(groups)}; `tenfold resume` goes on from the last "
                "checkpoints"
            )

    def open(
        self,
        places: int,
        trials: list[tuple[dict[str, Any], int]],
        homes: dict[str, str] | None = None,
    ) -> None:
        """Lets trials in, so many at once in each group; these first, in their order (see Board.enlist)."""
        import ray

        ray.get(self.broker.enlist.remote(trials, homes))
        ray.get(self.broker.open.remote(places))

    def put_ahead(self, trial: dict[str, Any]) -> None:
        """Lets in a trial that was not planned; see Board.put_ahead."""
        import ray

        ray.get(self.broker.put_ahead.remote(trial))  # before it is asked for

    def cancel(self, trial: str, reason: str = BY_SCHEDULER) -> None:
        """Ends a trial; its place is free at once."""
        self.broker.cancel.remote(trial, reason)

    def put_off(self, trial: str) -> None:
        """Frees the place of a trial that nobody asks for now; see Board.put_off."""
        import ray

        ray.get(self.broker.put_off.remote(trial))  # before it is asked for again


def end_process(node: str, pid: int) -> None:
    """Kills a process of a node. A worker that hangs does not hear what Ray would tell it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    kill = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=strategy)
    kill.remote(pid)  # nobody waits: the node may be gone, and the process with it


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _serve(config: dict[str, Any]) -> None:
    from orchestration.broker_link import link_of
    from trainers.worker import serve_worker  # torch is imported in the worker alone

    serve_worker(config, link_of(config, preemptible=config["preemptible"]))


def _reasons(groups: dict[str, dict[str, Any]]) -> str:
    return "; ".join(sorted({info["lost"] for info in groups.values()}))


def _telling_line(error: Exception) -> str:
    """The innermost error of what Ray Train wraps, in one line."""
    failures = getattr(error, "worker_failures", {})
    cause = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(cause).strip().splitlines() if line.strip()]
    return (lines[-1] if lines else type(cause).__name__)[:300]
