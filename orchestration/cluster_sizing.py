"""What a sweep asks of a cluster: its plan on one node there, turned into counts. Imports neither torch nor ray."""

import argparse
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.object_store import CLIENTS, SECRETS, is_url, protocol_of

if TYPE_CHECKING:
    from cluster.inventory import Inventory
    from cluster.manifests.need import ClusterNeed
    from cluster.packing import PackPlan
    from cluster.strategy import Way
    from orchestration.config import SweepConfig
    from orchestration.planning import Plan

GPU_NAME = re.compile(r"^[A-Za-z][A-Za-z0-9_.+]*-([1-9][0-9]*)GB$")
MAX_GROUPS = 8
NODE_GPUS = (1, 2, 4, 8)
MIN_PYTHON = "3.11"
VOLUME_FOLDER = "/mnt/tenfold"
OWN_FOLDER = "/tmp"
"""Where a driver starts that reads nothing of a folder."""
GIB = 1 << 30
PROCESS_BYTES = 6 * GIB
"""ASSUMPTION: Python, torch and the CUDA context of one worker."""
DISK_BYTES = 150 * GIB
"""ASSUMPTION: image or libraries, and room for logs, beside the base."""
CHECKPOINT_BYTES = 2
"""Bytes of a parameter on disk and while it is loaded: bf16, as bases are published."""


def cluster_need(config: "SweepConfig", args: argparse.Namespace) -> "ClusterNeed":
    """What a sweep asks of a cluster, by the arithmetic that it will use there.

    Raises:
        ValueError: GPUs too small for the base, or counts that no cluster can have.
    """
    from importlib.metadata import version

    from cluster.manifests.need import ClusterNeed
    from orchestration.memory_rule import trial_demand

    gpu = _gpu_name(args, config)
    plan, packs = _placed(config, gpu, args.gpus_per_node)
    assert plan.inventory is not None
    demand = trial_demand(config, plan.inventory, packs.workers_per_group)
    gpus_per_group = math.ceil(round(demand.num_workers * demand.gpus_per_worker, 6))
    return ClusterNeed(
        name=plan.name,
        num_groups=_num_groups(plan, packs, args.groups),
        workers_per_group=demand.num_workers,
        cpus_per_worker=demand.cpus_per_worker,
        gpus_per_worker=demand.gpus_per_worker,
        gpu_name=gpu,
        gpus_per_node=args.gpus_per_node or min(NODE_GPUS[-1], gpus_per_group),
        worker_memory_bytes=host_bytes(plan, packs),
        disk_bytes=DISK_BYTES + CHECKPOINT_BYTES * plan.shape.num_params,
        spot=args.spot,
        work_folder=_work_folder(args, config),
        storage=config.storage,
        config_text=args.config.read_text(encoding="utf-8"),
        image=args.image,
        requirements=_requirements(args.pip or [], config.storage),
        min_python=MIN_PYTHON,
        ray_version=version("ray"),
        required_secrets=("WANDB_API_KEY",) if "wandb" in config.tracking else (),
        optional_secrets=("HF_TOKEN", *SECRETS.get(protocol_of(config.storage), ())),
    )


def _gpu_name(args: argparse.Namespace, config: "SweepConfig") -> str | None:
    gpu = args.gpu or _named_in(config)
    if config.gpus_per_worker == 0:
        if gpu or args.gpus_per_node is not None:
            flag = f"--gpu {gpu}" if gpu else f"--gpus-per-node {args.gpus_per_node}"
            raise ValueError(f"{flag}: gpus_per_worker is 0 in the sweep; take one of them out")
        return None
    if gpu is None:
        raise ValueError(
            "--gpu must name the GPUs of the cluster (as H100-80GB), or the sweep's inventory (as "
            "8xH100-80GB); for a cluster without GPUs set gpus_per_worker: 0 in the sweep"
        )
    if not GPU_NAME.fullmatch(gpu):
        raise ValueError(f"--gpu must be model and memory, as H100-80GB, got {gpu!r}")
    if args.gpus_per_node is not None and args.gpus_per_node < 1:
        raise ValueError(f"--gpus-per-node must be at least 1, got {args.gpus_per_node}")
    return gpu


def _named_in(config: "SweepConfig") -> str | None:
    """The GPU that the sweep's own inventory names, as NAME-SIZEGB."""
    from cluster.gpus import GB, parse_inventory

    found = parse_inventory(config.inventory) if config.inventory else None
    if found is None or found.gpu_name is None or found.gpu_bytes is None:
        return None
    return f"{found.gpu_name}-{found.gpu_bytes / GB:g}GB"


def _placed(
    config: "SweepConfig", gpu: str | None, gpus_per_node: int | None
) -> tuple["Plan", "PackPlan"]:
    """The plan on one node of the cluster (on more, where a group asks for more), and its packs.

    Where nobody says how many GPUs a node has, the fewest with which memory discards no candidate.

    Raises:
        ValueError: as `make_plan` and `plan_packs`.
    """
    from cluster.strategy import DoesNotFitError
    from search_spaces.pruner import NothingAdmittedError

    sizes = (0,) if gpu is None else (gpus_per_node,) if gpus_per_node else NODE_GPUS
    for size in sizes:
        try:
            plan, packs = _planned_on(config, gpu, size)
        except (NothingAdmittedError, DoesNotFitError):
            if size == sizes[-1]:
                raise
            continue
        if size == sizes[-1] or not _discards_by_memory(plan):
            return plan, packs
    raise AssertionError("the last size returns or raises")


def _planned_on(config: "SweepConfig", gpu: str | None, size: int) -> tuple["Plan", "PackPlan"]:
    from orchestration.planning import make_plan

    inventory = node_inventory(config, gpu, size)
    plan = make_plan(config, inventory=inventory)
    return plan, _packs(plan, inventory)


def _packs(plan: "Plan", inventory: "Inventory", way: "Way | None" = None) -> "PackPlan":
    from orchestration.packs import plan_packs

    return plan_packs(plan, inventory, way=way, elsewhere=True)


def _discards_by_memory(plan: "Plan") -> bool:
    from search_spaces.pruner import MEMORY

    return any(item.rule == MEMORY for item in plan.pruned.discarded) or any(
        domain.unfit_lora_ranks for domain in plan.domains
    )


def node_inventory(config: "SweepConfig", gpu: str | None, num_gpus: int) -> "Inventory":
    """A node of the cluster, as many of them as the workers of one group ask for.

    Args:
        num_gpus: of a node; 0 without.
    """
    from cluster.gpus import parse_inventory
    from cluster.inventory import Inventory, workers_per_gpu

    workers = 1 if config.workers_per_trial == "auto" else config.workers_per_trial
    cpus = config.cpus_per_worker
    if gpu is None:
        return Inventory(num_cpus=workers * cpus, num_gpus=0, where="a node of one group")
    share = 1.0 if config.gpus_per_worker == "auto" else config.gpus_per_worker
    nodes = math.ceil(workers * math.ceil(share) / num_gpus)
    places = nodes * num_gpus * workers_per_gpu(share)
    named = parse_inventory(f"{nodes}x{num_gpus}x{gpu}")
    return replace(named, num_cpus=places * cpus, memory_bytes=None)


def _num_groups(plan: "Plan", packs: "PackPlan", asked: int | None) -> int:
    """Groups at once: as asked, else enough for every trial to have a place, at most MAX_GROUPS.

    Raises:
        ValueError: none, or more than there are trials.
    """
    num_trials = len(plan.pruned.admitted) + plan.num_proposed
    if asked is not None:
        if not 1 <= asked <= num_trials:
            raise ValueError(f"--groups must be from 1 to the trials ({num_trials}), got {asked}")
        return asked
    if plan.config.engine != "packed":
        return min(MAX_GROUPS, num_trials)
    assert plan.inventory is not None
    workers = packs.workers_per_group
    alone = replace(
        plan.inventory,
        num_cpus=workers * plan.config.cpus_per_worker,
        num_gpus=workers if plan.inventory.num_gpus else 0,
        num_nodes=1,
    )
    return min(MAX_GROUPS, math.ceil(num_trials / _packs(plan, alone, packs.way).places))


def host_bytes(plan: "Plan", packs: "PackPlan") -> int:
    """Host memory of one worker at its peak.

    Before a GPU worker's base is on its GPU, the host holds it as it lies on disk; of a sharded base its
    part and a layer: that is the peak. ASSUMPTION: all of it; what goes tensor by tensor needs less.
    A CPU worker trains in the same memory.
    """
    num_params = plan.shape.num_params
    if packs.strategy == "zero3":
        num_params = num_params // packs.workers_per_group + num_params // plan.shape.num_layers
    loading = CHECKPOINT_BYTES * num_params
    assert plan.inventory is not None
    training = 0 if plan.inventory.num_gpus else packs.needed_bytes
    return max(loading, training) + PROCESS_BYTES


def _requirements(pip: list[str], storage: str) -> tuple[str, ...]:
    """What installs Tenfold, with the Ray that the sweep was planned with (nodes of two Rays do not talk) and
    the client of its storage."""
    from importlib.metadata import version

    if not pip:
        return ()
    client = CLIENTS.get(protocol_of(storage))
    return (*pip, f"ray[default,train,tune]=={version('ray')}", *([client] if client else []))


def _work_folder(args: argparse.Namespace, config: "SweepConfig") -> str:
    from orchestration.config import local_files, local_inputs

    if args.work_folder:
        return args.work_folder
    if args.kind == "slurm":
        return str(Path.cwd())
    if args.kind == "ray" and not args.nfs:
        if is_url(config.storage) and not [*local_files([config.model]), *local_inputs(config)]:
            return OWN_FOLDER
        raise ValueError(
            "ray needs a folder that all nodes share: --nfs SERVER:/EXPORT mounts one, or "
            "--work-folder names one that the machines have already; without one the storage must be a URL, "
            "model and data hub ids"
        )
    return VOLUME_FOLDER
