"""The packs of a sweep, decided from a plan and an inventory. Imports neither torch nor ray."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.inventory import Inventory, TrialDemand, max_concurrent_trials
from cluster.packing import FORWARD_TOKENS, PackPlan, pack_plan
from cluster.placement import split_global_batch
from cluster.strategy import Way, Workload
from orchestration.memory_rule import (
    asked_of,
    needs_of,
    rows_of_batches,
    trial_demand,
    worker_places,
)
from orchestration.models import config_path
from orchestration.planning import batch_sizes, epoch_examples, row_tokens
from orchestration.rl_config import completion_length_of, generations_of
from search_spaces.variants import DORA, parts_of, stored_rank
from trainers.paths import read_json
from trainers.speed import cpu_name, read_speed, speed_path

if TYPE_CHECKING:
    from orchestration.planning import Plan


def plan_packs(
    plan: "Plan",
    inventory: Inventory,
    max_tokens: int | None = None,
    way: Way | None = None,
    *,
    elsewhere: bool = False,
) -> PackPlan:
    """Groups and places of a sweep on a cluster.

    Args:
        max_tokens: of a forward, as a worker measured it; None: from an earlier measurement on this
            machine, else the default of its kind.
        way: how the base is held and shared, where that was decided before.
        elsewhere: the machines are not here: what was measured on this one says nothing of them.

    Raises:
        ValueError: the cluster is too small for one group, or a worker for one adapter.
    """
    config, demand = plan.config, trial_demand(plan.config, inventory)
    max_concurrent_trials(demand, inventory)  # told in these words before any bytes
    sharded = config.strategy == "zero3" or (way is not None and way.strategy == "zero3")
    look = not elsewhere and not sharded
    measured = max_tokens or (measured_tokens(plan, demand) if look else None)
    kind = "gpu" if demand.gpus_per_worker else "cpu"
    places = worker_places(demand, inventory)
    rank, target = largest_adapter(plan)
    return pack_plan(
        needs_of(config, plan.shape, target, on_gpu=bool(demand.gpus_per_worker)),
        workload_of(plan, rank),
        places,
        asked_of(config),
        max_groups=places.num_gpus or places.num_cpus,
        max_tokens=measured or FORWARD_TOKENS[kind],
        tokens_per_row=tokens_per_row(plan),
        measured=measured is not None,
        pack_size=config.pack_size,
        way=way,
    )


def workload_of(plan: "Plan", lora_rank: int) -> Workload:
    """What a pack of the plan holds at its largest."""
    return Workload(
        lora_rank=lora_rank,
        row_tokens=longest_row(plan),
        global_batch_sizes=rows_of_batches(plan.config, batch_sizes_of(plan)),
        num_trials=len(plan.pruned.admitted) + plan.num_proposed,
        quantized=plan.config.quantization == "nf4",
        dropout=any(rate > 0 for rate in plan.space.dropout.options),
        magnitudes=any(DORA in parts_of(variant) for variant in plan.space.variant.options),
    )


def batch_sizes_of(plan: "Plan") -> set[int]:
    """Every global batch size that a trial of the plan may have."""
    return batch_sizes(plan.space, plan.config, plan.pruned)


def longest_row(plan: "Plan") -> int:
    """Tokens of the longest row."""
    return row_tokens(plan.config, plan.shape, plan.data_spec, plan.audit)


def largest_adapter(plan: "Plan") -> tuple[int, tuple[str, ...]]:
    """Rank as it is held, and target, of the adapter with most parameters that the sweep may train."""
    asked = {(stored_rank(c.lora_rank, c.variant), c.target) for c in plan.pruned.admitted}
    asked |= {
        (stored_rank(d.lora_ranks[-1], variant), d.target)
        for d in plan.domains
        if d.admissible
        for variant in d.variants
    }
    return max(asked, key=lambda pair: plan.shape.lora_params(*pair))


def adapter_params(plan: "Plan") -> list[int]:
    """Parameters that every trial's adapter holds; each that Optuna will propose counts as the largest."""
    params = [
        plan.shape.lora_params(stored_rank(c.lora_rank, c.variant), c.target)
        for c in plan.pruned.admitted
    ]
    return params + [plan.shape.lora_params(*largest_adapter(plan))] * plan.num_proposed


def tokens_per_row(plan: "Plan") -> float:
    """Mean tokens of a training row; of a plan without data its longest, and of an episode at most."""
    if plan.audit is None:
        return longest_row(plan)
    mean = plan.audit.num_train_tokens / epoch_examples(plan.config, plan.audit)
    return mean + completion_length_of(plan.config)


def batch_splits(plan: "Plan", packs: PackPlan) -> list[dict[str, int]]:
    """How each global batch size is cut at the longest row: micro-batch x accumulation x workers is it
    exactly. Shorter rows go into fewer forwards."""
    rows = max(1, packs.max_tokens // longest_row(plan))
    most = min(rows, plan.config.micro_batch_size or rows)
    splits = []
    for size in sorted(batch_sizes_of(plan)):
        split = split_global_batch(
            size * generations_of(plan.config), packs.workers_per_group, most
        )
        splits.append({"global_batch_size": size, **vars(split)})
    return splits


def measurement(plan: "Plan", demand: TrialDemand, *, recomputed: bool = False) -> dict[str, Any]:
    """What a worker must know to measure its forward, or to find it measured.

    Args:
        recomputed: with gradient checkpointing.
    """
    assert plan.data_spec is not None
    assert plan.audit is not None
    config = plan.config
    gpus = demand.gpus_per_worker
    share = f" x {gpus:g}" if gpus < 1 else ""
    device = f"gpu{share}" if gpus else f"{cpu_name()} x {demand.cpus_per_worker}"
    longest = longest_row(plan)
    again = {"gradient_checkpointing": True} if recomputed else {}
    return {
        "path": str(
            speed_path(
                read_json(config_path(config.model, config.revision)),
                device=device,
                address=config.address,
                quantization=config.quantization,
                dtype=config.dtype,
                row_tokens=longest,
                **again,
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
