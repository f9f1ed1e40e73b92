"""Runs the admitted candidates of a plan on Ray and leaves the results in runs/NAME."""

import logging
import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.inventory import Inventory, local_inventory, smallest_gpu_bytes
from orchestration import signals
from orchestration.local_ray import begin_alone, end_alone, is_api_server, tell_api_server
from orchestration.mending import choose
from orchestration.results import TrialRecord
from orchestration.runtime_env import host_and_port, worker_environment
from orchestration.serving import ADAPTER_CONFIG, portable_config
from orchestration.verbosity import is_verbose, ray_options, tune_level
from trainers.integrity import seal_folder
from trainers.paths import (
    RunPaths,
    read_state,
    replace_folder,
    storage_problem,
    temporary_folder,
    write_json,
)

# Every report of a worker waits for its controller's next poll: 2 s by default.
HEALTH_CHECK_INTERVAL_S = "0.2"
DRIVER_RESOURCE, DRIVER_SHARE = "node:__internal_head__", 0.001
"""What keeps an actor on the head: Ray gives it there alone, 1.0 of it."""
STARTS = 3
"""Times that a local Ray is started: another program may take the port of its dashboard in between."""
ACTOR_FAILURES = 2
"""Deaths of its own actor that a trial survives; the worker's are the engine's matter."""


SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": HEALTH_CHECK_INTERVAL_S,
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # We resume from our own files; Tune's state is saved at the end alone.
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    # The raylet warns on the driver's terminal at 4 starting processes a core; a trial starts three.
    "RAY_worker_maximum_startup_concurrency": "32",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # libgomp's threads wait for each other in a loop that holds their CPU for milliseconds. Where anything else wants
    # it (a second sweep, the driver), the thread they wait for is the one that does not run: benchmarks/busy_cpus.py.
    "GOMP_SPINCOUNT": "1000",
}
"""Variables by which Ray and its workers are set up for a sweep, unless its user set them."""


class _Settings:
    """What of this process is a sweep's while it runs: a notebook has other uses for its environment."""

    def __init__(self) -> None:
        self.set_here: list[str] = []
        self.is_users_ray = False

    def begin(self, settings: Mapping[str, str]) -> None:
        """Sets variables that are not set."""
        new = {name: value for name, value in settings.items() if name not in os.environ}
        self.set_here += new
        os.environ.update(new)

    def end(self) -> bool:
        """Takes them back; True: the Ray is the user's."""
        for name in self.set_here:
            os.environ.pop(name, None)
        was_users, self.is_users_ray = self.is_users_ray, False
        self.set_here = []
        return was_users


_settings = _Settings()


def start_ray(address: str | None) -> None:
    """Joins a cluster, whose workers get our packages, or starts a local one that listens on loopback alone. In a
    process that is connected to a Ray already that one is used, and stays.

    Raises:
        ValueError: no cluster answers at the address, or one with another Python or Ray; variables with secrets
            that its dashboard would show; no place for the token of a local one; a Ray of this process that is
            another, or of several machines without an address.
    """
    # A process less for every trial; a machine of one's own is not preempted.
    alone = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"} if address is None else {}
    _settings.begin(SETTINGS | alone)
    import ray
    from ray._private import auto_init_hook

    if ray.is_initialized():
        _settings.is_users_ray = True
        require_usable(address, ray.nodes(), ray.get_runtime_context().gcs_address)
        return
    # A thread that asks Ray for something after its end would start another, one of Ray's own choice.
    auto_init_hook.enable_auto_connect = False
    options = ray_options()
    if address is None:
        _start_local(options | begin_alone())
        return
    try:
        _probe(address)
        with signals.kept():
            ray.init(address=address, runtime_env=worker_environment(address), **options)
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise ValueError(
            f"address {address}: the cluster must run the Python and the Ray of this process, it does not "
            f"({' '.join(str(error).split())}); use one image, or one environment, for both"
        ) from error
    except OSError as error:  # ConnectionError is one
        raise ValueError(
            f"address {address}: no Ray cluster answers ({str(error).splitlines()[0]}); "
            "start one with `ray start --head`, or leave --address out"
        ) from error


def require_usable(address: str | None, nodes: Sequence[Mapping[str, Any]], gcs: str) -> None:
    """The Ray that this process is connected to is one that a sweep can use.

    Args:
        gcs: its address.

    Raises:
        ValueError: it is not at the address that the config names; it has several machines and the config names none,
            so that its paths would be this machine's.
    """
    known, own = host_and_port(address or ""), host_and_port(gcs)
    if known and own and known != own:
        raise ValueError(
            f"address {address}: this process is connected to the Ray at {gcs} already; give that, or leave Ray to "
            "the sweep (ray.shutdown())"
        )
    num_nodes = sum(bool(node["Alive"]) for node in nodes)
    if address is None and num_nodes > 1:
        raise ValueError(
            f"address must be given where this process is connected to a Ray of several machines ({num_nodes}): set "
            f"address: {gcs}, and storage: to what all of them reach"
        )


def _start_local(options: Mapping[str, Any]) -> None:
    import ray

    for _ in range(STARTS):
        # Without address="local", init joins whatever cluster it finds on this machine.
        with signals.kept():
            found = ray.init(address="local", **tell_api_server(), **options)
        if is_api_server(found.dashboard_url or ""):
            return
        with signals.kept(leaving=True):
            ray.shutdown()
    raise ValueError(
        f"Ray's dashboard must have a port of its own, {STARTS} times another program took the one that was free; "
        "start again"
    )


def _probe(address: str) -> None:
    """Ray itself waits two minutes for a host:port at which nobody listens."""
    if found := host_and_port(address):
        socket.create_connection(found, timeout=5).close()


def cluster_inventory(local: bool) -> Inventory:
    """What the connected Ray cluster has.

    Args:
        local: it was started here, so that its memory is this machine's.
    """
    import ray

    resources = ray.cluster_resources()
    here, has_gpus = local_inventory() if local else None, bool(resources.get("GPU"))
    return Inventory(
        num_cpus=int(resources.get("CPU", 0)),
        num_gpus=int(resources.get("GPU", 0)),
        where="the Ray cluster",
        memory_bytes=here.memory_bytes if here else int(resources.get("memory", 0)) or None,
        gpu_bytes=here.gpu_bytes if here else _gpu_bytes_there(resources),
        gpu_name=here.gpu_name if here else _gpu_name_there(resources),
        num_nodes=1 if here else _worker_nodes(ray.nodes(), "GPU" if has_gpus else "CPU"),
    )


def _gpu_name_there(resources: Mapping[str, float]) -> str | None:
    """The model of a cluster's GPUs, as Ray found it; None where there are several, or none."""
    prefix = "accelerator_type:"
    names = {key.removeprefix(prefix) for key in resources if key.startswith(prefix)}
    return names.pop() if len(names) == 1 else None


def _worker_nodes(nodes: Sequence[Mapping[str, Any]], resource: str) -> int:
    """Nodes on which workers can stand, at least 1."""
    return max(1, sum(bool(n["Alive"] and n["Resources"].get(resource)) for n in nodes))


def _gpu_bytes_there(resources: Mapping[str, float]) -> int | None:
    """Memory of a GPU of a cluster that was joined, asked on a node that has one."""
    import ray

    if not resources.get("GPU"):
        return None
    return ray.get(ray.remote(smallest_gpu_bytes).options(num_cpus=0, num_gpus=0.001).remote())


def run_trials(
    trainable: Any,
    searcher: Any,
    scheduler: Any,
    run: RunPaths,
    *,
    max_concurrent: int,
    callback: Any,
    stopper: Any = None,
    reuse_actors: bool = True,
) -> None:
    """Runs what a searcher suggests to its ends on the connected cluster.

    Args:
        trainable: solo.solo_trial or thin.ThinTrial.
        max_concurrent: trials at once.
        callback: the sweep's ledger.Ledger.
        stopper: a ray.tune.Stopper; None: the trials alone decide.
        reuse_actors: the process of a trial that was stopped serves another. Not where it waits for workers of its
            own: they would hold their CPUs as long as it lives.

    Raises:
        ValueError: what the callback's check raised, or storage that takes nothing more.
        KeyboardInterrupt: a signal came before; one that comes meanwhile ends Tune's loop.
    """
    from ray.tune import TuneError

    # A trial's failure is told in a line and kept in error.txt; Tune would print its traceback as well.
    if not is_verbose():
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    tuner = _tuner(
        trainable,
        searcher,
        scheduler,
        run,
        max_concurrent,
        callback,
        stopper,
        reuse_actors=reuse_actors,
    )
    try:
        with signals.ended_by_tune():
            tuner.fit()
    except TuneError as error:
        # Tune packs what a callback or a scheduler raises into the text of an error of its own.
        cause = error.__context__
        if type(cause) is ValueError:
            raise cause from None
        if isinstance(cause, OSError) and (line := storage_problem(cause)):
            raise ValueError(line) from cause
        raise


def _tuner(
    trainable: Any,
    searcher: Any,
    scheduler: Any,
    run: RunPaths,
    max_concurrent: int,
    callback: Any,
    stopper: Any,
    *,
    reuse_actors: bool,
) -> Any:
    from ray import tune

    attempt = sum(path.is_dir() for path in run.tune.glob("attempt-*")) + 1
    return tune.Tuner(
        # The thin driver of a trial takes no CPU from the workers: with 1 CPU each, two trials would
        # fill a 2-core machine with drivers and their workers would wait for ever.
        tune.with_resources(trainable, {DRIVER_RESOURCE: DRIVER_SHARE}),
        tune_config=tune.TuneConfig(
            metric="eval_loss",
            mode="min",
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=max_concurrent,
            reuse_actors=reuse_actors,
            trial_dirname_creator=lambda trial: trial.config["trial"]["name"],
        ),
        run_config=tune.RunConfig(
            name=f"attempt-{attempt}",
            storage_path=str(run.tune.resolve()),
            callbacks=[callback],
            stop=stopper,
            # What a trial is lies in its own folder; a thin trial's actor has nothing to save.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=ACTOR_FAILURES),
            verbose=tune_level(),
        ),
    )


def finish(
    run: RunPaths, extra_files: Mapping[str, Path], say: Callable[[str], None]
) -> tuple[list[TrialRecord], TrialRecord | None]:
    """Reads all trials back and puts the best adapter into runs/NAME/best.

    Args:
        extra_files: name in best/ -> file to copy, beside the adapter's own.
        say: is told of weights that are damaged.
    """
    records, best = choose(run, say)
    if best is not None:
        folder = temporary_folder(run.best)
        own = {path.name: path for path in run.trial(best.name).best.iterdir()}
        for name, path in (own | dict(extra_files)).items():
            shutil.copy2(path, folder / name)
        write_json(
            folder / ADAPTER_CONFIG, portable_config(folder, read_state(run.resolved)["config"])
        )
        seal_folder(folder)
        replace_folder(folder, run.best)
    return records, best


def stop_ray() -> None:
    """Leaves the cluster (and ends it, when it was started here); a Ray that was there before stays."""
    import ray

    if signals.is_broken_off():
        return  # its processes are killed as the command ends
    if _settings.end():
        return
    if "ray" in sys.modules and ray.is_initialized():
        with signals.kept(leaving=True):
            ray.shutdown()
    end_alone()
