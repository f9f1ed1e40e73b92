"""What a cluster has, and whether it can ever serve what a trial asks for."""

import os
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """CPUs and GPUs of a cluster (or of this machine). memory_bytes: of all its nodes; gpu_bytes: of
    its smallest GPU; None where it does not say. gpu_name: its model, None where nobody said."""

    num_cpus: int
    num_gpus: int
    where: str
    memory_bytes: int | None = None
    gpu_bytes: int | None = None
    gpu_name: str | None = None
    num_nodes: int = 1

    @property
    def gpus_per_node(self) -> int:
        """GPUs that stand in one machine, as far as they are spread evenly."""
        return self.num_gpus // self.num_nodes


@dataclass(frozen=True, kw_only=True)
class TrialDemand:
    """What one trial reserves: its workers, each with CPUs and GPUs (a share of one where below 1)."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: float


def local_inventory() -> Inventory:
    """This machine, without importing torch or ray: the CPUs this process may use and the GPUs that
    nvidia-smi lists (cut by CUDA_VISIBLE_DEVICES)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_gpus = _local_gpus()
    models = gpu_models() if num_gpus else []
    return Inventory(
        num_cpus=cpus,
        num_gpus=num_gpus,
        where="this machine",
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu_bytes=min((size for _, size in models), default=None),
        gpu_name=models[0][0] if len({name for name, _ in models}) == 1 else None,
    )


def gpu_models() -> list[tuple[str, int]]:
    """Name and bytes of every GPU that nvidia-smi lists."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (FileNotFoundError, subprocess.SubprocessError):
        return []
    parts = [line.rpartition(",") for line in listing.stdout.splitlines()]
    return [(n.strip(), int(size) << 20) for n, _, size in parts if size.strip().isdigit()]


def smallest_gpu_bytes() -> int | None:
    """Memory of the smallest GPU that nvidia-smi lists; None where there is none."""
    return min((size for _, size in gpu_models()), default=None)


def room_per_worker(demand: TrialDemand, num_groups: int, inventory: Inventory) -> int | None:
    """Bytes that one worker may use: its GPU's or its share of one, or its share of the nodes' memory."""
    if demand.gpus_per_worker:
        share = min(1.0, demand.gpus_per_worker)
        return None if inventory.gpu_bytes is None else int(inventory.gpu_bytes * share)
    if inventory.memory_bytes is None:
        return None
    return inventory.memory_bytes // (num_groups * demand.num_workers)


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


def workers_per_gpu(share: float) -> int:
    """Workers that take a share of one GPU each, 0 < share <= 1."""
    return int(round(1 / share, 6))  # rounded: 1 // 0.1 is 9


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
                f"a trial needs {needed:g} {kind}s (workers_per_trial {demand.num_workers} x {per_worker:g} per "
                f"worker), {inventory.where} has {present}; lower workers_per_trial or join a larger "
                "cluster with --address"
            )
    limits = [inventory.num_cpus // (demand.cpus_per_worker * demand.num_workers)]
    if demand.gpus_per_worker:
        if demand.gpus_per_worker < 1:
            limits.append(inventory.num_gpus * workers_per_gpu(demand.gpus_per_worker))
        else:
            limits.append(int(inventory.num_gpus // (demand.gpus_per_worker * demand.num_workers)))
    return min(limits)
