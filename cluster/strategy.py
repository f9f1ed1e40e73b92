"""Which of the ways to share GPUs a pack is trained in, decided from bytes: one worker, copies of the base on
several (DDP), or a base in parts (ZeRO-3); or why none of them fits, and the smallest change that would."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from cluster.gpus import GB
from cluster.inventory import Inventory
from cluster.placement import split_global_batch

Strategy = Literal["single", "ddp", "zero3"]
COMFORTABLE_TOKENS = {"cpu": 512, "gpu": 4096}
"""ASSUMPTION: layers are computed twice (a third more work) only where fewer tokens than these would
fit into a forward otherwise."""
CPU_SHARE = 0.8
"""Share of a machine's memory that workers on CPUs may plan with; the rest is Ray's, the driver's and the
system's."""
GPU_SIZES_GB = (16, 24, 40, 48, 80, 96, 141, 192, 288)
MOST_GPUS = 64
SHORTEST_ROW = 256


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to hold the base and to share a global batch.

    keep_dequantized: NF4 weights are held in the compute type: never in what `choose` gives.
    """

    strategy: Strategy
    num_workers: int
    gradient_checkpointing: bool
    keep_dequantized: bool = False


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a pack has to hold at its largest.

    Args:
        lora_rank: of the adapter with most parameters.
        row_tokens: of the longest row.
        global_batch_sizes: of all trials that share the workers.
        num_trials: >= 1.
        quantized: whether the base is held in NF4.
        dropout: whether an adapter drops inputs.
        magnitudes: whether an adapter is a DoRA.
    """

    lora_rank: int
    row_tokens: int
    global_batch_sizes: tuple[int, ...]
    num_trials: int
    quantized: bool
    dropout: bool = False
    magnitudes: bool = False


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user fixed; None: the plan decides."""

    num_workers: int | None = None
    strategy: Strategy | None = None
    gradient_checkpointing: bool | None = None


class Needs(Protocol):
    """Bytes that one worker needs, loading and slack included."""

    def __call__(self, way: Way, workload: Workload, *, num_slots: int, tokens: int) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A way that fits.

    Args:
        num_groups: packs that are trained beside each other.
        tokens: of the largest forward beside its adapters, at most those asked for.
        needed_bytes: of a worker that runs it.
        room_bytes: of a worker; None where nobody knows.
    """

    way: Way
    num_groups: int
    tokens: int
    needed_bytes: int
    room_bytes: int | None


class DoesNotFitError(ValueError):
    """No way to train this on that inventory; the message has the bytes and the smallest change.

    needed_bytes, room_bytes: of the way that came nearest; 0 where there is none.
    """

    def __init__(self, message: str, needed_bytes: int = 0, room_bytes: int = 0) -> None:
        super().__init__(message)
        self.needed_bytes, self.room_bytes = needed_bytes, room_bytes


def choose(
    needs: Needs, workload: Workload, inventory: Inventory, asked: Asked, *, wanted_tokens: int
) -> Fit:
    """The first way that fits, the simplest first.

    Args:
        wanted_tokens: of a forward, beyond which nothing is gained.

    Raises:
        DoesNotFitError: none does.
        ValueError: workers that cannot share every global batch.
    """
    tried: list[Fit] = []
    for way in ways(workload, inventory, asked):
        fit = _fit(needs, way, workload, inventory, wanted_tokens)
        if fit.tokens >= _least_tokens(way, workload, inventory, asked, wanted_tokens):
            return _spread(needs, fit, workload, inventory, asked, wanted_tokens)
        tried.append(fit)
    raise _refusal(needs, tried, workload, inventory, asked)


def ways(workload: Workload, inventory: Inventory, asked: Asked) -> Iterator[Way]:
    """The ways that an inventory has, the simplest first.

    Raises:
        ValueError: workers that cannot share every global batch.
    """
    for strategy, count in _shares(workload, inventory, asked):
        if asked.gradient_checkpointing is not None and strategy != "zero3":
            yield Way(
                strategy=strategy,
                num_workers=count,
                gradient_checkpointing=asked.gradient_checkpointing,
            )
            continue
        # A sharded base is always computed again: see trainers/sharding.py.
        for again in (True,) if strategy == "zero3" else (False, True):
            yield Way(strategy=strategy, num_workers=count, gradient_checkpointing=again)


def fit_way(
    needs: Needs, way: Way, workload: Workload, inventory: Inventory, *, wanted_tokens: int
) -> Fit:
    """A way that was chosen before, for a forward of another size.

    Raises:
        DoesNotFitError: it does not fit any more.
    """
    fit = _fit(needs, way, workload, inventory, wanted_tokens)
    if not fit.tokens:
        raise _refusal(needs, [fit], workload, inventory, Asked())
    return fit


def _shares(
    workload: Workload, inventory: Inventory, asked: Asked
) -> Iterator[tuple[Strategy, int]]:
    given = asked.num_workers
    if given is not None:
        for size in workload.global_batch_sizes:
            split_global_batch(size, given, 1)
    whole = given or 1
    copies: Strategy = "single" if whole == 1 else "ddp"
    if asked.strategy in (None, copies):
        yield copies, whole
    if asked.strategy == "ddp" and whole == 1:
        for count in _even_counts(workload, inventory):
            yield "ddp", count
    # On CPUs the workers share one memory: parts of the base save nothing unless it is asked for.
    if asked.strategy == "zero3" or (asked.strategy is None and inventory.num_gpus):
        counts = _even_counts(workload, inventory) if given is None else [given]
        for count in counts:
            if count > 1:
                yield "zero3", count


def _even_counts(workload: Workload, inventory: Inventory) -> Iterator[int]:
    """Numbers of workers that share every global batch and fill machines evenly."""
    present = inventory.num_gpus or inventory.num_cpus
    node = present // inventory.num_nodes
    for count in range(2, min(present, *workload.global_batch_sizes) + 1):
        even = all(size % count == 0 for size in workload.global_batch_sizes)
        if even and (count <= node or count % node == 0):
            yield count


def _fit(
    needs: Needs, way: Way, workload: Workload, inventory: Inventory, wanted_tokens: int
) -> Fit:
    """The largest forward of a way, in whole rows; 0 tokens where not even one row fits. On CPUs, which
    share their memory, with as many groups as leave room for a row."""
    most = _most_groups(way, workload, inventory)
    fits = (
        _fit_of_groups(needs, way, workload, inventory, wanted_tokens, groups)
        for groups in ([most] if inventory.num_gpus else range(most, 0, -1))
    )
    last: Fit | None = None
    for last in fits:
        if last.tokens:
            break
    assert last is not None
    return last


def _most_groups(way: Way, workload: Workload, inventory: Inventory) -> int:
    present, count = inventory.num_gpus or inventory.num_cpus, way.num_workers
    node = max(1, present // inventory.num_nodes)
    # A group that fits one machine stays in one.
    most = inventory.num_nodes * (node // count) if count <= node else present // count
    return max(1, min(workload.num_trials, most))


def _fit_of_groups(
    needs: Needs,
    way: Way,
    workload: Workload,
    inventory: Inventory,
    wanted_tokens: int,
    num_groups: int,
) -> Fit:
    row, room = workload.row_tokens, _room(inventory, num_groups * way.num_workers)

    def needed(tokens: int, num_slots: int = 1) -> int:
        return needs(way, workload, num_slots=num_slots, tokens=tokens)

    def most_tokens(num_slots: int) -> int:
        if room is None:
            return max(row, wanted_tokens)
        low, high = 0, max(1, wanted_tokens // row)
        while low < high:  # bytes grow with the rows
            rows = (low + high + 1) // 2
            fits = needed(rows * row, num_slots) <= room
            low, high = (rows, high) if fits else (low, rows - 1)
        return low * row

    # Beside two adapters, of which one trains while the other is judged, unless that halves the forward.
    alone, beside = most_tokens(1), most_tokens(2) if workload.num_trials > 1 else 0
    tokens = beside if 2 * beside >= alone else alone
    return Fit(
        way=way,
        num_groups=num_groups,
        tokens=tokens,
        needed_bytes=needed(max(tokens, row)),
        room_bytes=room,
    )


def _room(inventory: Inventory, num_workers: int) -> int | None:
    if inventory.num_gpus:
        return inventory.gpu_bytes
    memory = inventory.memory_bytes
    return None if memory is None else int(memory * CPU_SHARE) // num_workers


def _least_tokens(
    way: Way, workload: Workload, inventory: Inventory, asked: Asked, wanted_tokens: int
) -> int:
    if way.gradient_checkpointing or asked.gradient_checkpointing is False:
        return workload.row_tokens
    comfortable = COMFORTABLE_TOKENS["gpu" if inventory.num_gpus else "cpu"]
    rows = max(1, min(comfortable, wanted_tokens) // workload.row_tokens)
    return rows * workload.row_tokens


def _spread(
    needs: Needs,
    fit: Fit,
    workload: Workload,
    inventory: Inventory,
    asked: Asked,
    wanted_tokens: int,
) -> Fit:
    """The same on several GPUs a pack, where there are more of them than trials."""
    if asked != Asked() or fit.way.strategy != "single" or not inventory.num_gpus:
        return fit
    idle = inventory.num_gpus // workload.num_trials
    counts = [n for n in _even_counts(workload, inventory) if n <= idle]
    if not counts:
        return fit
    way = replace(fit.way, strategy="ddp", num_workers=max(counts))
    spread = _fit(needs, way, workload, inventory, wanted_tokens)
    return spread if spread.tokens >= fit.tokens else fit


def _refusal(
    needs: Needs, tried: list[Fit], workload: Workload, inventory: Inventory, asked: Asked
) -> DoesNotFitError:
    if not tried:
        return DoesNotFitError(_no_way(workload, inventory, asked))
    nearest = min(tried, key=lambda fit: fit.needed_bytes - (fit.room_bytes or 0))
    kind = "GPU" if inventory.num_gpus else "worker's share of the memory"
    changes = list(_changes(needs, nearest.way, workload, inventory, asked))
    found = f"; what would fit: {', or '.join(changes)}" if changes else ""
    room = nearest.room_bytes or 0
    return DoesNotFitError(
        f"rank {workload.lora_rank} with one row of {workload.row_tokens:,} tokens needs "
        f"{nearest.needed_bytes / GB:.1f} GB a worker ({described(nearest.way)}), a {kind} of "
        f"{inventory.where} has {room / GB:.1f} GB{found}",
        nearest.needed_bytes,
        room,
    )


def _no_way(workload: Workload, inventory: Inventory, asked: Asked) -> str:
    sizes = ", ".join(map(str, sorted(set(workload.global_batch_sizes))))
    return (
        f"strategy {asked.strategy} needs workers that share every global_batch_size ({sizes}) evenly, "
        f"no number of them up to {inventory.num_gpus or inventory.num_cpus} on {inventory.where} does; "
        "choose batches with a common factor, or another strategy"
    )


def described(way: Way) -> str:
    """A way in words."""
    names = {
        "single": "whole base on one worker",
        "ddp": f"whole base on each of {way.num_workers} workers",
        "zero3": f"ZeRO-3 over {way.num_workers} workers",
    }
    return names[way.strategy] + (", layers recomputed" if way.gradient_checkpointing else "")


def _changes(
    needs: Needs, way: Way, workload: Workload, inventory: Inventory, asked: Asked
) -> Iterator[str]:
    """The smallest change of each kind that makes it fit, the user's own settings first."""

    def fits(changed: Workload, present: Inventory, by: Asked = asked) -> bool:
        found = (
            _fit(needs, way, changed, present, changed.row_tokens)
            for way in ways(changed, present, by)
        )
        return any(fit.tokens for fit in found)

    for rank in _smaller(workload.lora_rank, 1):
        if fits(replace(workload, lora_rank=rank), inventory):
            yield f"lora_rank {rank}"
            break
    for tokens in _smaller(workload.row_tokens, SHORTEST_ROW):
        if fits(replace(workload, row_tokens=tokens), inventory):
            yield f"seq_len {tokens}"
            break
    if not workload.quantized and fits(replace(workload, quantized=True), inventory):
        yield "quantization: nf4"
    if inventory.num_gpus:
        yield from _more_gpus(fits, workload, inventory)


class _Fits(Protocol):
    def __call__(self, changed: Workload, present: Inventory, by: Asked = ...) -> bool: ...


def _more_gpus(fits: _Fits, workload: Workload, inventory: Inventory) -> Iterator[str]:
    count = 2 * inventory.num_gpus
    while count <= MOST_GPUS:
        nodes = max(1, count // max(8, inventory.gpus_per_node))
        if fits(workload, replace(inventory, num_gpus=count, num_nodes=nodes), Asked()):
            yield f"{count} such GPUs"
            break
        count *= 2
    for size in GPU_SIZES_GB:
        bigger = size * GB
        if bigger > (inventory.gpu_bytes or 0) and fits(
            workload, replace(inventory, gpu_bytes=bigger)
        ):
            yield f"GPUs of {size} GB"
            break


def _smaller(value: int, least: int) -> Iterator[int]:
    """Powers of two below a value, the largest first."""
    power = 1 << (value - 1).bit_length() - 1 if value > 1 else 0
    while power >= least:
        yield power
        power //= 2
