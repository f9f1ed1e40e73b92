"""The packs of a sweep, decided from a plan and an inventory. Imports neither torch nor ray."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.inventory import (
    Inventory,
    TrialDemand,
    local_inventory,
    max_concurrent_trials,
    room_per_worker,
)
from cluster.packing import FORWARD_TOKENS, PackPlan, WorkerMemory, pack_plan, worker_memory
from orchestration.config import SweepConfig
from orchestration.models import config_path
from orchestration.planning import epoch_examples
from trainers.paths import read_json
from trainers.speed import cpu_name, read_speed, speed_path

if TYPE_CHECKING:
    from orchestration.planning import Plan

DTYPE_BYTES = {"fp32": 4, "bf16": 2}


def trial_demand(config: SweepConfig, inventory: Inventory) -> TrialDemand:
    """What one worker group reserves on a cluster (engine solo: one trial)."""
    gpus = config.gpus_per_worker
    if gpus == "auto":
        gpus = 1 if inventory.num_gpus else 0
    return TrialDemand(
        num_workers=config.workers_per_trial,
        cpus_per_worker=config.cpus_per_worker,
        gpus_per_worker=gpus,
    )


def plan_packs(plan: "Plan", inventory: Inventory, max_tokens: int | None = None) -> PackPlan:
    """Groups and places of a sweep on a cluster.

    Args:
        max_tokens: of a forward, as a worker measured it; None: from an earlier measurement on this
            machine, else the default of its kind.

    Raises:
        ValueError: the cluster is too small for one group, or a worker for one adapter.
    """
    config, demand = plan.config, trial_demand(plan.config, inventory)
    max_groups = max_concurrent_trials(demand, inventory)
    measured = max_tokens or measured_tokens(plan, demand)
    num_trials = len(plan.pruned.admitted) + plan.num_proposed
    groups = min(max_groups, num_trials)
    kind = "gpu" if demand.gpus_per_worker else "cpu"
    return pack_plan(
        _memory(plan, demand, room_per_worker(demand, groups, inventory)),
        num_trials=num_trials,
        max_groups=max_groups,
        max_tokens=measured or FORWARD_TOKENS[kind],
        tokens_per_step=tokens_per_step(plan),
        measured=measured is not None,
        pack_size=config.pack_size,
    )


def _memory(plan: "Plan", demand: TrialDemand, room_bytes: int | None) -> WorkerMemory:
    config = plan.config
    default = "bf16" if demand.gpus_per_worker else "fp32"
    dtype = default if config.dtype == "auto" else config.dtype
    rank, target = largest_adapter(plan)
    return worker_memory(
        plan.shape,
        quantized=config.quantization == "nf4",
        dtype_bytes=DTYPE_BYTES[dtype],
        lora_rank=rank,
        target=target,
        room_bytes=room_bytes,
    )


def largest_adapter(plan: "Plan") -> tuple[int, tuple[str, ...]]:
    """lora_rank and target of the adapter with most parameters that the sweep may train."""
    asked = {(c.lora_rank, c.target) for c in plan.pruned.admitted}
    asked |= {(d.lora_ranks[-1], d.target) for d in plan.domains if d.admissible}
    return max(asked, key=lambda pair: plan.shape.lora_params(*pair))


def tokens_per_step(plan: "Plan") -> int:
    """Tokens of the smallest global batch of the sweep on one worker."""
    assert plan.audit is not None
    sizes = {candidate.global_batch_size for candidate in plan.pruned.admitted}
    smallest = min(sizes or set(plan.space.global_batch_size.options))
    rows = -(-smallest // plan.config.workers_per_trial)
    return max(1, rows * plan.audit.num_train_tokens // epoch_examples(plan.config, plan.audit))


def measurement(plan: "Plan", demand: TrialDemand) -> dict[str, Any]:
    """What a worker must know to measure its forward, or to find it measured."""
    assert plan.data_spec is not None
    assert plan.audit is not None
    config = plan.config
    gpus = demand.gpus_per_worker
    share = f" x {gpus:g}" if gpus < 1 else ""
    device = f"gpu{share}" if gpus else f"{cpu_name()} x {demand.cpus_per_worker}"
    seq_len = plan.data_spec.seq_len
    longest = seq_len if config.packing else min(plan.audit.max_row_tokens, seq_len)
    return {
        "path": str(
            speed_path(
                read_json(config_path(config.model, config.revision)),
                device=device,
                address=config.address,
                quantization=config.quantization,
                dtype=config.dtype,
                row_tokens=longest,
            )
        ),
        "lora_rank": largest_adapter(plan)[0],
        "row_tokens": longest,
    }


def measured_tokens(plan: "Plan", demand: TrialDemand) -> int | None:
    """Tokens of a forward as they were measured on this machine, if they were."""
    if plan.config.engine != "packed" or not is_trainable(plan):
        return None
    found = read_speed(Path(measurement(plan, demand)["path"]))
    return found["max_tokens"] if found else None


def is_trainable(plan: "Plan") -> bool:
    """Whether a plan has data and a base on this disk or in the hub's cache, not a bare config."""
    return plan.audit is not None and not Path(plan.config.model).is_file()


def local_packs(plan: "Plan") -> dict[str, Any] | None:
    """The packs that a sweep would have on this machine, or {"refused": why}; None where the plan has
    no data, the engine no packs, or the sweep another cluster."""
    config = plan.config
    if plan.audit is None or config.engine != "packed" or config.address is not None:
        return None
    inventory = local_inventory()
    try:
        packs = plan_packs(plan, inventory)
    except ValueError as error:
        return {"refused": str(error)}
    return vars(packs) | {"workers_per_group": config.workers_per_trial}


def packs_sentence(packs: dict[str, Any]) -> str:
    """The packs in one line."""
    if "refused" in packs:
        return f"packs: none on this machine: {packs['refused']}"
    kept = "; NF4 weights kept dequantized (same numbers, no repeated work)"
    return (
        f"packs: {packs['num_groups']} group(s) of {packs['workers_per_group']} worker(s), up to "
        f"{packs['places']} adapters each: {packs['reason']}{kept if packs['keep_dequantized'] else ''}"
    )
