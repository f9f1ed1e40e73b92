"""Where a plan would run, what a worker holds there, how long it takes and what it costs: the part of
plan.json that people compare machines by. Imports neither torch nor ray."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.gpus import GB, parse_inventory
from cluster.hours import flops_per_token, sweep_cost
from cluster.inventory import Inventory, local_inventory
from cluster.packing import PackPlan, worker_parts
from orchestration.config import SweepConfig
from orchestration.memory_rule import compute_bytes, trial_demand
from orchestration.packs import (
    adapter_params,
    batch_splits,
    largest_adapter,
    plan_packs,
    tokens_per_row,
    workload_of,
)
from orchestration.plan_json import plan_to_dict
from orchestration.planning import Plan, make_plan
from orchestration.rl_config import generations_of
from search_spaces.pruner import NothingAdmittedError


def asked_inventory(config: SweepConfig) -> Inventory | None:
    """The machines that the user plans for: GPUs that he names, or a running cluster's; None: this machine.

    Raises:
        ValueError: both, or no cluster at the address.
    """
    if config.inventory is not None and config.address is not None:
        raise ValueError(
            f"inventory and address must not both say where to run, got {config.inventory!r} and "
            f"{config.address!r}; leave one out"
        )
    if config.address is None:
        return parse_inventory(config.inventory) if config.inventory else None
    from orchestration import sweep  # Ray is needed to ask its cluster

    sweep.start_ray(config.address)
    try:
        return sweep.cluster_inventory(local=False)
    finally:
        sweep.stop_ray()


def placed_plan(config: SweepConfig, elsewhere: Inventory | None) -> dict[str, Any]:
    """plan.json as `tenfold plan` shows it.

    Where nobody said otherwise it is what a sweep on this machine would do; a model for which this
    machine is too small is planned without its memory, and the packs say so.

    Raises:
        ValueError: as `make_plan`.
    """
    plan = make_plan(config, inventory=elsewhere) if elsewhere else _plan_here(config)
    return plan_to_dict(plan, shown_packs(plan, elsewhere))


def _plan_here(config: SweepConfig) -> Plan:
    if config.data is None or Path(config.model).is_file():
        return make_plan(config)
    try:
        return make_plan(config, inventory=local_inventory())
    except NothingAdmittedError:
        return make_plan(config)  # raises it again, unless memory was the reason


def shown_packs(plan: Plan, elsewhere: Inventory | None = None) -> dict[str, Any] | None:
    """The packs that a sweep would have, with bytes, batches, hours and cost, or {"refused": why}; None
    where nobody can say.

    Args:
        elsewhere: the machines to plan for; None: this one.
    """
    config = plan.config
    if config.engine != "packed":
        return None
    if elsewhere is None and (plan.audit is None or config.address is not None):
        return None
    inventory = elsewhere or plan.inventory or local_inventory()
    try:
        packs = plan_packs(plan, inventory, elsewhere=elsewhere is not None)
    except ValueError as error:
        return {"refused": str(error), "where": inventory.where}
    return {**vars(packs), "where": inventory.where, **_facts(plan, packs, inventory)}


def _facts(plan: Plan, packs: PackPlan, inventory: Inventory) -> dict[str, Any]:
    rank, target = largest_adapter(plan)
    on_gpu = bool(trial_demand(plan.config, inventory).gpus_per_worker)
    parts = worker_parts(
        plan.shape,
        packs.way,
        workload_of(plan, rank),
        target=target,
        num_slots=packs.places,
        tokens=packs.max_tokens,
        compute_bytes=compute_bytes(plan.config, on_gpu=on_gpu),
        on_gpu=on_gpu,
        packing=plan.config.packing,
    )
    confirming = [plan.shape.lora_params(rank, target)] * CONFIRMATION_TRIALS
    return {
        "bytes": parts,
        "batches": batch_splits(plan, packs),
        "cost": trials_cost(plan, packs, inventory, adapter_params(plan)),
        "confirmation_cost": trials_cost(plan, packs, inventory, confirming)
        if plan.space.prior.interval
        else None,
    }


def trials_cost(
    plan: Plan, packs: PackPlan, inventory: Inventory, params_of_trials: list[int]
) -> dict[str, Any] | None:
    """Hours and price of trials that run to their ends; None where no GPU's speed is known.

    Args:
        params_of_trials: parameters of each trial's adapter.
    """
    if not inventory.num_gpus:
        return None
    tokens, again = trial_tokens(plan), packs.gradient_checkpointing
    flops = sum(
        tokens * flops_per_token(plan.shape, params, recomputed=again)
        for params in params_of_trials
    )
    groups = min(packs.num_groups, len(params_of_trials))
    cost = sweep_cost(
        flops,
        gpu_name=inventory.gpu_name,
        num_gpus=groups * packs.workers_per_group,
        price_per_gpu_hour=plan.config.price_per_gpu_hour,
    )
    return asdict(cost) if cost else None


def trial_tokens(plan: Plan) -> float:
    """Tokens that a trial trains on; of a plan without data the loss-bearing ones alone, which is fewer, and of
    reinforcement learning at most."""
    generations = generations_of(plan.config)
    if plan.config.method == "rl" and plan.budget is None:
        return (plan.config.examples or 0) * generations * tokens_per_row(plan)
    if plan.budget is None:
        return plan.dataset_tokens * (plan.config.epochs or 1)
    return plan.budget.num_examples * generations * tokens_per_row(plan)


CONFIRMATION_TRIALS = 3
WAYS = {
    "single": "the whole base on one worker",
    "ddp": "the whole base on each worker, gradients summed (DDP)",
    "zero3": "a part of the base on each worker (ZeRO-3)",
}


def packs_sentence(packs: dict[str, Any]) -> str:
    """The packs in one line."""
    where = packs.get("where", "this machine")
    if "refused" in packs:
        hint = "; --inventory 8xH100-80GB plans for GPUs that are elsewhere"
        return (
            f"packs: none on {where}: {packs['refused']}{hint if where == 'this machine' else ''}"
        )
    kept = "; NF4 weights kept dequantized (same numbers, no repeated work)"
    return (
        f"packs: {packs['num_groups']} group(s) of {packs['workers_per_group']} worker(s), up to "
        f"{packs['places']} adapters each: {packs['reason']}{kept if packs['keep_dequantized'] else ''}"
    )


def packs_lines(packs: dict[str, Any]) -> list[str]:
    """The packs of a plan with their bytes, batches and cost."""
    if "refused" in packs:
        return [packs_sentence(packs)]
    return [
        packs_sentence(packs),
        way_line(packs),
        *_bytes_line(packs),
        *_batches_line(packs),
        *_cost_line(packs),
    ]


def way_line(packs: dict[str, Any]) -> str:
    """How the workers of a group hold the base."""
    again = (
        ", layers computed again in the backward pass" if packs["gradient_checkpointing"] else ""
    )
    return f"  {packs['strategy']} on {packs['where']}: {WAYS[packs['strategy']]}{again}"


def _bytes_line(packs: dict[str, Any]) -> list[str]:
    parts = sorted(packs["bytes"].items(), key=lambda item: -item[1])
    text = ", ".join(f"{name} {value / GB:.2f}" for name, value in parts if value)
    room = "" if packs["room_bytes"] is None else f" of {packs['room_bytes'] / GB:.2f}"
    return [f"  memory of a worker: {packs['needed_bytes'] / GB:.2f}{room} GB planned ({text})"]


def _batches_line(packs: dict[str, Any]) -> list[str]:
    splits = [
        f"{s['global_batch_size']} = {s['micro_batch_size']} x {s['grad_accum_steps']} x {s['num_workers']}"
        for s in packs["batches"]
    ]
    return [
        f"  global batch = micro x accumulation x workers: {'; '.join(splits)} (at the longest row)"
    ]


def _cost_line(packs: dict[str, Any]) -> list[str]:
    if (cost := packs["cost"]) is None:
        return []
    return [f"  {cost_text(cost)}: an estimate from FLOPs, nothing stopped early"]


def cost_text(cost: dict[str, Any]) -> str:
    """Hours, GPU-hours and price in words."""
    price = "" if cost["price"] is None else f", about {cost['price']:,.2f} at the price given"
    return (
        f"about {cost['hours']:.1f} hours ({cost['low']:.1f} to {cost['high']:.1f}), "
        f"{cost['gpu_hours']:.1f} GPU-hours{price}"
    )
