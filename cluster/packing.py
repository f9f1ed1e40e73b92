"""How many warm worker groups a sweep gets, and how many adapters each of them holds.

A group holds as many adapters as fill its forward (the measured number of tokens above which a forward
gains nothing) and one more, which trains while another's result is being judged; fewer where memory or
the number of trials says so. How its workers share the base is strategy.py's decision, the bytes are
memory.py's.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from cluster.holding import BaseHolding, Forward
from cluster.inventory import Inventory
from cluster.memory import planned_bytes, step_bytes
from cluster.strategy import Asked, Fit, Needs, Strategy, Way, Workload, choose, fit_way
from search_spaces.architecture import ModelShape

FORWARD_TOKENS = {"cpu": 2048, "gpu": 16384}
"""Tokens of a forward where nothing was measured yet."""
SEARCHED_PLACES = 1 << 14
"""More adapters than any sweep puts into a pack: from here on memory is no limit."""
SPARE_PLACES = 1


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """What the pool of a sweep is made of.

    Args:
        num_groups: worker groups beside each other.
        workers_per_group: workers that train a pack together.
        strategy: how they share the base.
        places: adapters of one group.
        max_tokens: of a forward on one worker.
        keep_dequantized: see BaseSpec.
        gradient_checkpointing: layers are computed again.
        needed_bytes: of a worker with all its places taken; room_bytes: what it may use, None where
            nobody knows.
        reason: why so many places.
    """

    num_groups: int
    places: int
    max_tokens: int
    keep_dequantized: bool
    reason: str
    workers_per_group: int = 1
    strategy: Strategy = "single"
    gradient_checkpointing: bool = False
    needed_bytes: int = 0
    room_bytes: int | None = None

    @property
    def way(self) -> Way:
        """How the base is held and shared."""
        return Way(
            strategy=self.strategy,
            num_workers=self.workers_per_group,
            gradient_checkpointing=self.gradient_checkpointing,
            keep_dequantized=self.keep_dequantized,
        )


def worker_needs(
    shape: ModelShape, *, target: tuple[str, ...], compute_bytes: int, on_gpu: bool, packing: bool
) -> Needs:
    """Bytes of a worker as `strategy.choose` asks for them, every position bearing loss.

    Args:
        target: layers that the largest adapter trains.
        compute_bytes: of the compute type.
        packing: rows hold several examples.
    """

    @cache
    def needed(way: Way, workload: Workload, *, num_slots: int, tokens: int) -> int:
        return planned_bytes(
            shape,
            _holding(way, workload, compute_bytes),
            _forward(workload, num_slots, tokens, packing),
            target=target,
            num_slots=num_slots,
            device_type="cuda" if on_gpu else "cpu",
        )

    return needed


def worker_parts(
    shape: ModelShape,
    way: Way,
    workload: Workload,
    *,
    target: tuple[str, ...],
    num_slots: int,
    tokens: int,
    compute_bytes: int,
    on_gpu: bool,
    packing: bool,
) -> dict[str, int]:
    """Bytes of a worker by part at the moment when its step holds most; args as `worker_needs`."""
    step = step_bytes(
        shape,
        _holding(way, workload, compute_bytes),
        _forward(workload, num_slots, tokens, packing),
        target=target,
        num_slots=num_slots,
        device_type="cuda" if on_gpu else "cpu",
    )
    return step.parts()


def _holding(way: Way, workload: Workload, compute_bytes: int) -> BaseHolding:
    return BaseHolding(
        quantized=workload.quantized,
        compute_bytes=compute_bytes,
        num_workers=way.num_workers,
        sharded=way.strategy == "zero3",
        gradient_checkpointing=way.gradient_checkpointing,
        keep_dequantized=way.keep_dequantized,
    )


def _forward(workload: Workload, num_slots: int, tokens: int, packing: bool) -> Forward:
    tokens = max(
        tokens, workload.row_tokens
    )  # a forward that was measured may be shorter than a row
    return Forward(
        num_adapters=max(1, min(num_slots, tokens // workload.row_tokens)),
        tokens=tokens,
        row_tokens=workload.row_tokens,
        loss_tokens=tokens,
        lora_rank=workload.lora_rank,
        dropout=workload.dropout,
        magnitudes=workload.magnitudes,
        packed=packing,
    )


def pack_plan(
    needs: Needs,
    workload: Workload,
    inventory: Inventory,
    asked: Asked,
    *,
    max_groups: int,
    max_tokens: int,
    tokens_per_row: float,
    measured: bool,
    pack_size: int | None = None,
    way: Way | None = None,
) -> PackPlan:
    """Groups and places of a sweep.

    Args:
        max_groups: groups that the cluster can hold beside each other, >= 1.
        max_tokens: of one forward, beyond which nothing is gained.
        tokens_per_row: mean tokens of a row.
        measured: whether max_tokens was measured on this machine.
        pack_size: places that the user asks for.
        way: what was decided before; None: it is decided here.

    Raises:
        DoesNotFitError: not even one adapter fits, or not as many as the user asks for.
        ValueError: workers that cannot share every global batch.
    """
    fit = (
        choose(needs, workload, inventory, asked, wanted_tokens=max_tokens)
        if way is None
        else fit_way(needs, way, workload, inventory, wanted_tokens=max_tokens)
    )
    groups = max(1, min(fit.num_groups, max_groups))
    tokens = max_tokens if measured and fit.way.strategy != "zero3" else fit.tokens
    keep = fit.way.keep_dequantized if way else _keeps_dequantized(needs, fit, workload, tokens)
    fit = replace(fit, way=replace(fit.way, keep_dequantized=keep))
    bytes_of = _bytes_of(needs, fit, workload, tokens)
    most = _most_places(bytes_of, fit.room_bytes)
    smallest = min(workload.global_batch_sizes)
    per_step = max(1, int(-(-smallest // fit.way.num_workers) * tokens_per_row))
    fill, per_group = math.ceil(tokens / per_step), math.ceil(workload.num_trials / groups)
    wanted = pack_size or fill + SPARE_PLACES
    if pack_size is not None and most is not None and pack_size > most:
        raise ValueError(
            f"pack_size must be what a worker holds: {most} adapters of rank {workload.lora_rank} "
            f"({bytes_of(most):,} of {fit.room_bytes:,} bytes), got {pack_size}; lower it or lora_rank"
        )
    places = min(wanted, per_group, wanted if most is None else most)
    return PackPlan(
        num_groups=groups,
        places=places,
        max_tokens=tokens,
        keep_dequantized=keep,
        reason=_reason(most, fill, tokens, _how(fit.way, measured), pack_size, per_group),
        workers_per_group=fit.way.num_workers,
        strategy=fit.way.strategy,
        gradient_checkpointing=fit.way.gradient_checkpointing,
        needed_bytes=bytes_of(places),
        room_bytes=fit.room_bytes,
    )


def _bytes_of(needs: Needs, fit: Fit, workload: Workload, tokens: int) -> Callable[[int], int]:
    return lambda slots: needs(fit.way, workload, num_slots=slots, tokens=tokens)


def _keeps_dequantized(needs: Needs, fit: Fit, workload: Workload, tokens: int) -> bool:
    """Where two adapters still fit beside it, NF4 is decoded once."""
    if not workload.quantized or fit.way.strategy == "zero3" or fit.room_bytes is None:
        return False
    kept = replace(fit.way, keep_dequantized=True)
    return needs(kept, workload, num_slots=2, tokens=tokens) <= fit.room_bytes


def _most_places(bytes_of: Callable[[int], int], room_bytes: int | None) -> int | None:
    """Adapters that fit, at least the one for which the way was chosen.

    Searched, not extrapolated: a slot more can take bytes away, where the rows of a forward divide worse.
    """
    if room_bytes is None:
        return None
    too_many = 2
    while too_many < SEARCHED_PLACES and bytes_of(too_many) <= room_bytes:
        too_many *= 2
    return max(1, bisect_right(range(1, too_many), room_bytes, key=bytes_of))


def _how(way: Way, measured: bool) -> str:
    if way.strategy == "zero3":
        return "as many as fit"
    return "measured" if measured else "not measured here yet"


def _reason(
    most: int | None,
    fill: int,
    max_tokens: int,
    how: str,
    pack_size: int | None,
    per_group: int,
) -> str:
    memory = "memory not known" if most is None else f"memory holds {most:,}"
    if pack_size:
        return f"pack_size {pack_size}; {memory}"
    return (
        f"{fill} fill a forward of {max_tokens:,} tokens ({how}) and {SPARE_PLACES} trains while "
        f"another is judged; {memory}; {per_group} trial(s) a group"
    )
