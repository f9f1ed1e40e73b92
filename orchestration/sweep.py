"""Runs the admitted candidates of a plan on Ray and leaves the results in runs/NAME."""

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

from cluster.inventory import Inventory, TrialDemand
from orchestration.progress import Progress
from orchestration.results import TrialRecord, best_trial, read_trials
from orchestration.tracking import Tracker
from trainers.paths import RunPaths, replace_folder, temporary_folder, write_json

# Every report of a worker waits for its controller's next poll: 2 s by default.
HEALTH_CHECK_INTERVAL_S = "0.2"
DRIVER_RESOURCE = "node:__internal_head__"


def start_ray(address: str | None) -> None:
    """Joins a cluster, or starts a local one that listens on loopback alone.

    Raises:
        ValueError: no cluster answers at the address.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_INTERVAL_S)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # The raylet warns on the driver's terminal at 4 starting processes a core; a trial starts three.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "32")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if address is None:
        # A process less for every trial; a machine of one's own is not preempted.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray

    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "error",
        "configure_logging": True,
    }
    if address is None:
        # Without address="local", init joins whatever cluster it finds on this machine.
        ray.init(address="local", include_dashboard=True, dashboard_host="127.0.0.1", **options)
        return
    try:
        _probe(address)
        ray.init(address=address, **options)
    except OSError as error:  # ConnectionError is one
        raise ValueError(
            f"address {address}: no Ray cluster answers ({str(error).splitlines()[0]}); "
            "start one with `ray start --head`, or leave --address out"
        ) from error


def _probe(address: str) -> None:
    """Ray itself waits two minutes for a host:port at which nobody listens."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=5).close()


def cluster_inventory() -> Inventory:
    """What the connected Ray cluster has."""
    import ray

    resources = ray.cluster_resources()
    return Inventory(
        num_cpus=int(resources.get("CPU", 0)),
        num_gpus=int(resources.get("GPU", 0)),
        where="the Ray cluster",
    )


def run_trials(
    trials: list[dict[str, Any]],
    demand: TrialDemand,
    max_concurrent: int,
    run: RunPaths,
    *,
    scheduler: dict[str, Any],
    progress: Progress,
    trackers: list[Tracker],
) -> None:
    """Runs trials to their ends on the connected cluster.

    Args:
        trials: each trial's dict (see `run.trial_dict`), in the order in which they start.
        scheduler: {"kind": fifo | asha | median, "grace_period", "max_t", "reduction_factor"},
            all in examples.
        max_concurrent: trials at once, from `max_concurrent_trials` of this cluster.
    """
    from ray import tune

    from orchestration.ledger import Ledger
    from orchestration.solo import solo_trial

    workers = {
        "num_workers": demand.num_workers,
        "cpus_per_worker": demand.cpus_per_worker,
        "gpus_per_worker": demand.gpus_per_worker,
        "storage": str((run.tune / "train").resolve()),
    }
    for trial in trials:
        write_json(run.trial(trial["name"]).config, trial)
    tuner = tune.Tuner(
        # The thin driver of a trial takes no CPU from the workers: with 1 CPU each, two trials would
        # fill a 2-core machine with drivers and their workers would wait for ever.
        tune.with_resources(solo_trial, {DRIVER_RESOURCE: 0.001}),
        param_space={"trial": tune.grid_search(trials), "workers": workers},
        tune_config=tune.TuneConfig(
            metric="eval_loss",
            mode="min",
            scheduler=make_scheduler(**scheduler),
            max_concurrent_trials=max_concurrent,
            trial_dirname_creator=lambda trial: trial.config["trial"]["name"],
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(run.root.resolve()),
            callbacks=[Ledger(run, progress, trackers)],
            verbose=0,
        ),
    )
    with progress:
        tuner.fit()


def make_scheduler(kind: str, grace_period: int, max_t: int, reduction_factor: int) -> Any:
    """Ray Tune's scheduler with examples seen as its clock.

    Raises:
        ValueError: a grace period above the budget (Ray only asserts it: under -O nothing would stop).
    """
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

    if kind == "fifo":
        return FIFOScheduler()
    if grace_period > max_t:
        raise ValueError(
            f"grace_period must be at most the budget ({max_t} examples), got {grace_period}"
        )
    if kind == "median":
        return MedianStoppingRule(time_attr="examples", grace_period=grace_period)
    return ASHAScheduler(
        time_attr="examples",
        grace_period=grace_period,
        max_t=max_t,
        reduction_factor=reduction_factor,
    )


def finish(run: RunPaths, extra_files: list[Path]) -> tuple[list[TrialRecord], TrialRecord | None]:
    """Reads all trials back and puts the best adapter into runs/NAME/best."""
    records = read_trials(run)
    best = best_trial(records)
    if best is not None:
        folder = temporary_folder(run.best)
        for path in [*run.trial(best.name).best.iterdir(), *extra_files]:
            shutil.copy2(path, folder / path.name)
        replace_folder(folder, run.best)
    return records, best


def stop_ray() -> None:
    """Leaves the cluster (and ends it, when it was started here)."""
    import ray

    if "ray" in sys.modules and ray.is_initialized():
        ray.shutdown()
