"""What a config asks of memory, and the rule that discards what cannot fit. Imports neither torch nor ray."""

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from cluster.inventory import Inventory, TrialDemand, workers_per_gpu
from cluster.packing import FORWARD_TOKENS, PackPlan, worker_needs
from cluster.strategy import Asked, DoesNotFitError, Needs, Workload, choose
from orchestration.choice_config import asks_answers
from orchestration.config import SweepConfig
from orchestration.rl_config import generations_of
from search_spaces.architecture import ModelShape
from search_spaces.candidate import Candidate
from search_spaces.domains import SearchSpace
from search_spaces.pruner import MEMORY, SHARDED_SAMPLING, SHARDED_VARIANT, Verdict
from search_spaces.variants import DORA, WHOLE_WEIGHTS, parts_of, stored_rank

DTYPE_BYTES = {"fp32": 4, "bf16": 2}


def trial_demand(
    config: SweepConfig, inventory: Inventory, num_workers: int | None = None
) -> TrialDemand:
    """What one worker group reserves on a cluster (engine solo: one trial).

    Args:
        num_workers: as the plan of packs has it; None: what the config says, else 1.
    """
    gpus = config.gpus_per_worker
    if gpus == "auto":
        gpus = 1 if inventory.num_gpus else 0
    asked = 1 if config.workers_per_trial == "auto" else config.workers_per_trial
    return TrialDemand(
        num_workers=num_workers or asked,
        cpus_per_worker=config.cpus_per_worker,
        gpus_per_worker=gpus,
    )


def worker_places(demand: TrialDemand, inventory: Inventory) -> Inventory:
    """The inventory counted in workers: how many can stand, and the memory of each."""
    by_cpu = inventory.num_cpus // demand.cpus_per_worker
    if not demand.gpus_per_worker:
        return replace(inventory, num_cpus=by_cpu, num_gpus=0, gpu_bytes=None)
    share = min(1.0, demand.gpus_per_worker)
    on_gpus = inventory.num_gpus * workers_per_gpu(share)
    gpu_bytes = inventory.gpu_bytes
    return replace(
        inventory,
        num_gpus=min(by_cpu, on_gpus),
        gpu_bytes=None if gpu_bytes is None else int(gpu_bytes * share),
    )


def asked_of(config: SweepConfig) -> Asked:
    """What of the placement the user fixed."""
    workers, again = config.workers_per_trial, config.gradient_checkpointing
    share = config.gpus_per_worker
    shared = share != "auto" and 0 < share < 1
    return Asked(
        num_workers=(1 if shared else None) if workers == "auto" else workers,
        strategy=None if config.strategy == "auto" else config.strategy,
        gradient_checkpointing=None if again == "auto" else again,
    )


def needs_of(
    config: SweepConfig, shape: ModelShape, target: tuple[str, ...], *, on_gpu: bool
) -> Needs:
    """Bytes of a worker.

    Args:
        target: of the adapter with most parameters.
    """
    return worker_needs(
        shape,
        target=target,
        compute_bytes=compute_bytes(config, on_gpu=on_gpu),
        on_gpu=on_gpu,
        packing=config.packing,
    )


def compute_bytes(config: SweepConfig, *, on_gpu: bool) -> int:
    """Bytes of a number of the compute type, as workers will resolve dtype: auto."""
    default = "bf16" if on_gpu else "fp32"
    return DTYPE_BYTES[default if config.dtype == "auto" else config.dtype]


def rows_of_batches(config: SweepConfig, global_batch_sizes: Iterable[int]) -> tuple[int, ...]:
    """Rows that steps train on, in order: of reinforcement learning the episodes of their prompts."""
    return tuple(sorted(size * generations_of(config) for size in global_batch_sizes))


class MemoryRule:
    """Discards what no worker of an inventory can hold, alone and in the shortest forward.

    Args:
        space: of the sweep, for `by_rank`.
        row_tokens: of the longest row.
    """

    def __init__(
        self,
        config: SweepConfig,
        shape: ModelShape,
        space: SearchSpace | None,
        row_tokens: int,
        inventory: Inventory,
    ) -> None:
        self.config, self.shape, self.space = config, shape, space
        demand = trial_demand(config, inventory)
        self.on_gpu, self.places = bool(demand.gpus_per_worker), worker_places(demand, inventory)
        self.row_tokens, self.asked = row_tokens, asked_of(config)
        self._verdict = lru_cache(maxsize=None)(self._work_out)

    def by_candidate(self, candidate: Candidate) -> Verdict | None:
        """Why a candidate has no room, or None; full fine-tuning is the studies' matter."""
        if candidate.full_finetune:
            return None
        sizes, dropout = (candidate.global_batch_size,), candidate.dropout > 0
        return self._verdict(
            candidate.lora_rank, candidate.target, sizes, dropout, candidate.variant
        )

    def by_rank(self, lora_rank: int, target: tuple[str, ...]) -> Verdict | None:
        """Why an adapter has no room in any batch of the space, or None."""
        assert self.space is not None
        dropout = any(rate > 0 for rate in self.space.dropout.options)
        sizes = tuple(self.space.global_batch_size.options)
        # A rank is cut for all variants: that which needs least decides, as the smallest batch does.
        kinds = self.space.variant.options
        variant = min(kinds, key=lambda v: (stored_rank(lora_rank, v), DORA in parts_of(v)))
        return self._verdict(lora_rank, target, sizes, dropout, variant)

    def in_packs(self, candidate: Candidate, packs: PackPlan) -> Verdict | None:
        """Why packs that were planned for other candidates cannot have one in a place, or None."""
        if packs.room_bytes is None:
            return None
        needs = needs_of(self.config, self.shape, candidate.target, on_gpu=self.on_gpu)
        sizes, dropout = (candidate.global_batch_size,), candidate.dropout > 0
        workload = self._workload(candidate.lora_rank, sizes, dropout, candidate.variant)
        needed = needs(packs.way, workload, num_slots=packs.places, tokens=packs.max_tokens)
        room = max(packs.room_bytes, packs.needed_bytes)
        if needed <= room:
            return None
        return Verdict(
            rule=MEMORY,
            reason=f"OUT OF MEMORY: {'+'.join(candidate.target)}: {packs.places} adapters of rank "
            f"{candidate.lora_rank} in a pack need {needed:,} bytes, a worker has {room:,}; lower lora_rank",
            numbers={
                "lora_rank": candidate.lora_rank,
                "needed_bytes": needed,
                "room_bytes": room,
            },
        )

    def _workload(
        self, lora_rank: int, sizes: tuple[int, ...], dropout: bool, variant: str
    ) -> Workload:
        return Workload(
            lora_rank=stored_rank(lora_rank, variant),
            row_tokens=self.row_tokens,
            global_batch_sizes=rows_of_batches(self.config, sizes),
            num_trials=1,
            quantized=self.config.quantization == "nf4",
            dropout=dropout,
            magnitudes=DORA in parts_of(variant),
        )

    def _work_out(
        self,
        lora_rank: int,
        target: tuple[str, ...],
        sizes: tuple[int, ...],
        dropout: bool,
        variant: str,
    ) -> Verdict | None:
        workload = self._workload(lora_rank, sizes, dropout, variant)
        needs = needs_of(self.config, self.shape, target, on_gpu=self.on_gpu)
        wanted = FORWARD_TOKENS["gpu" if self.on_gpu else "cpu"]
        try:
            fit = choose(needs, workload, self.places, self.asked, wanted_tokens=wanted)
        except DoesNotFitError as error:
            numbers = {
                "lora_rank": lora_rank,
                "needed_bytes": error.needed_bytes,
                "room_bytes": error.room_bytes,
            }
            return Verdict(
                rule=MEMORY, reason=f"OUT OF MEMORY: {'+'.join(target)}: {error}", numbers=numbers
            )
        if fit.way.strategy == "zero3" and (lost := parts_of(variant) & WHOLE_WEIGHTS):
            return Verdict(
                rule=SHARDED_VARIANT,
                reason=f"variant {variant}: {' and '.join(sorted(lost))} needs whole weights on each worker, and "
                "the base is sharded (strategy zero3); set variant: lora or rslora",
                numbers={},
            )
        if fit.way.strategy == "zero3" and (asker := _asker(self.config)):
            return Verdict(
                rule=SHARDED_SAMPLING,
                reason=f"{asker} needs a whole base on each worker, which samples token by token, and it fits only "
                "in parts (strategy zero3); give larger GPUs",
                numbers={"lora_rank": lora_rank},
            )
        return None


def _asker(config: SweepConfig) -> str:
    """What of a sweep samples completions; empty: nothing."""
    if config.method == "rl":
        return "method rl"
    return "a metric of answers" if asks_answers(config) else ""
