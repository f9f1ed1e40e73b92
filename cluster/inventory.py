"""What a cluster has, and whether it can ever serve what a trial asks for."""

import os
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """CPUs and GPUs of a cluster (or of this machine)."""

    num_cpus: int
    num_gpus: int
    where: str


@dataclass(frozen=True, kw_only=True)
class TrialDemand:
    """What one trial reserves: its workers, each with CPUs and GPUs."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: int


def local_inventory() -> Inventory:
    """This machine, without importing torch or ray: the CPUs this process may use and the GPUs that
    nvidia-smi lists (cut by CUDA_VISIBLE_DEVICES)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Inventory(num_cpus=cpus, num_gpus=_local_gpus(), where="this machine")


def _local_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return _listed_gpus()
    num_visible = len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return min(num_visible, _listed_gpus()) if num_visible else 0


def _listed_gpus() -> int:
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True
        )
    except (FileNotFoundError, subprocess.SubprocessError):
        return 0  # no driver, no GPU
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def max_concurrent_trials(demand: TrialDemand, inventory: Inventory) -> int:
    """How many trials the cluster can run at once. More would leave coordinators waiting for
    workers that never come: Ray reserves for a trial's driver and its workers separately.

    Raises:
        ValueError: not even one trial fits; Ray would wait for ever.
    """
    for kind, per_worker, present in (
        ("GPU", demand.gpus_per_worker, inventory.num_gpus),
        ("CPU", demand.cpus_per_worker, inventory.num_cpus),
    ):
        needed = per_worker * demand.num_workers
        if needed > present:
            raise ValueError(
                f"a trial needs {needed} {kind}s (workers_per_trial {demand.num_workers} x {per_worker} per worker), "
                f"{inventory.where} has {present}; lower workers_per_trial or join a larger cluster with --address"
            )
    limits = [inventory.num_cpus // (demand.cpus_per_worker * demand.num_workers)]
    if demand.gpus_per_worker:
        limits.append(inventory.num_gpus // (demand.gpus_per_worker * demand.num_workers))
    return min(limits)
