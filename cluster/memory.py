"""Bytes of one worker by part: its base, its adapters with their optimizer, and what a step needs beside.

Pure: a ModelShape and a few numbers in, bytes out. The parts are those of one moment, the one at which the
step holds most: a loss, a backward pass and an all-reduce never hold their buffers at once.
Source: the formulas follow trainers/ line by line and are proved by tests/trainers/test_memory_measured.py
(allocations by torch's MemTracker, within 10%); docs/memory.md stands them beside published points.
"""

import math
from dataclasses import asdict, dataclass, replace

from cluster.activation_bytes import FLOAT_BYTES, SCORES_NOT_COUNTED, blocks
from cluster.holding import BaseHolding, Forward
from cluster.nf4_bytes import is_quantizable, nf4_constant_bytes, nf4_weight_bytes
from cluster.step_moments import (
    DeviceType,
    Moment,
    Transient,
    layer_weight_bytes,
    step_moments,
)
from search_spaces.architecture import ModelShape, Target
from search_spaces.variants import DORA, PLAIN

STATE_ROWS = 4
"""fp32 numbers of an adapter's parameter: weight, gradient, two AdamW moments (trainers/store.py)."""
FLAT_BYTES = 16 << 20
"""Largest adapter whose gradients are summed over the workers in a flat copy; trainers/comm.py holds the
same number, and a test compares them."""
QUANTIZING_BYTES: dict[DeviceType, int] = {"cpu": 18, "cuda": 4}
"""Bytes a weight of the matrix that is being quantized, beside what is already held. Source: on a CPU
measured (docs/memory.md, a 0.5 B Llama loads, bitsandbytes 0.50); ASSUMPTION for a GPU, where one kernel
reads the checkpoint's 2 bytes and writes half of one."""
USABLE_SHARE = 0.9
"""Share of the planned memory that tensors get. ASSUMPTION: the rest is fragmentation, the caching
allocator's on a GPU (segments that no later request fits), malloc's arenas on a CPU."""
FIXED_BYTES: dict[DeviceType, int] = {"cpu": 800 << 20, "cuda": 800 << 20}
"""Bytes that no tensor of ours shows. Source: on a CPU a process that has imported all we need has 0.54 GB
resident (measured, torch 2.13). ASSUMPTION for a GPU: the CUDA context with its
kernels, cuBLAS's workspace and, with several workers, NCCL's buffers."""
SCORES_MARGIN = 1.25
"""On steps whose attention scores are not counted: measured on tiny models, 0.81 to 0.98 of them were
predicted (docs/NOTES.md)."""
OPTIMIZER_BYTES = {"adamw_fp32": 8.0, "adamw_8bit": 2.03125, "adamw_paged_32bit": 8.0}
OPTIMIZER_BYTES["adamw_paged_8bit"] = OPTIMIZER_BYTES["adamw_8bit"]


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """Bytes of a worker at the moment when its step holds most.

    Args:
        moment: which one that is.
        base: weights as they are held, this worker's part of them where sharded.
        quant_constants: NF4's, whole on every worker.
        gathered: weights of other workers that are here for a while.
        adapters, gradients, optimizer: the store's rows of weights, gradients and both moments.
        reduce_buffer: the flat copy of a small adapter's gradients that is summed over the workers.
        activations: kept for the backward pass.
        logits: of one chunk, with their gradients.
        workspace: what a backward pass needs beside: gradients of activations, a dequantized weight.
    """

    moment: Moment
    base: int
    quant_constants: int
    gathered: int
    adapters: int
    gradients: int
    optimizer: int
    reduce_buffer: int
    activations: int
    logits: int
    workspace: int

    def parts(self) -> dict[str, int]:
        """Bytes by the name of the part."""
        return {name: value for name, value in asdict(self).items() if name != "moment"}

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts().values())


def base_bytes(shape: ModelShape, holding: BaseHolding) -> tuple[int, int]:
    """Bytes of the base on one worker: weights (its part of them), and NF4's constants.

    Not counted: rotary tables and padding of the parts (a few kB).
    Source: QLoRA, arXiv 2305.14314, section 3: 4.127 bits a quantized weight.
    """
    if not holding.holds_nf4:
        return -(-shape.num_params * holding.compute_bytes // holding.num_shards), 0
    quantized = [linear for linear in shape.linears if is_quantizable(linear)]
    plain = shape.num_params - sum(linear.num_params for linear in quantized)
    weights = plain * holding.compute_bytes + sum(map(nf4_weight_bytes, quantized))
    return -(-weights // holding.num_shards), sum(map(nf4_constant_bytes, quantized))


def adapter_row_bytes(
    shape: ModelShape, target: Target, lora_rank: int, *, magnitudes: bool = False
) -> int:
    """Bytes of one slot's weights alone, at the rank and over the layers that the store reserves: the
    largest rank of the pack and the union of its targets, with magnitudes where any of it is a DoRA."""
    variant = DORA if magnitudes else PLAIN
    return FLOAT_BYTES * shape.trained_params(lora_rank, target, variant)


def adapter_bytes(shape: ModelShape, target: Target, lora_rank: int) -> int:
    """Bytes of one slot: weights, gradients and both moments in fp32, whole on every worker."""
    return STATE_ROWS * adapter_row_bytes(shape, target, lora_rank)


def optimizer_bytes(num_params: int, optimizer: str = "adamw_fp32") -> int:
    """Bytes of an optimizer's moments.

    The trainer uses adamw_fp32; the others are what published points were measured with. A paged one may
    be moved to the host: its bytes are needed somewhere, not always on the GPU.

    Raises:
        ValueError: an unknown optimizer.
    Source: bitsandbytes' optimizers: two fp32 moments (8 bytes), or two of a byte each and an fp32
        constant for each 256 of both, in blocks of 256 (2 + 8 / 256 bytes).
    """
    if optimizer not in OPTIMIZER_BYTES:
        raise ValueError(
            f"optimizer must be one of {', '.join(OPTIMIZER_BYTES)}, got {optimizer!r}"
        )
    return round(OPTIMIZER_BYTES[optimizer] * num_params)


def step_bytes(
    shape: ModelShape,
    holding: BaseHolding,
    forward: Forward,
    *,
    target: Target,
    num_slots: int,
    device_type: DeviceType = "cuda",
) -> StepBytes:
    """Bytes of a worker at the moment when an optimizer step holds most, by part.

    Args:
        target: layers that the pack's adapters train, of all of them together.
        num_slots: adapters in the store, >= forward.num_adapters.

    Raises:
        ValueError: fewer slots than adapters, an unknown target, or a shape without layers.
    """
    if num_slots < forward.num_adapters:
        raise ValueError(
            f"num_slots must be at least num_adapters ({forward.num_adapters}), got {num_slots}"
        )
    base, constants = base_bytes(shape, holding)
    row = adapter_row_bytes(shape, target, forward.lora_rank, magnitudes=forward.magnitudes)
    moments = step_moments(shape, holding, forward, shape.resolve_target(target), device_type)
    if holding.num_workers > 1:
        moments["all-reduce"] = Transient(reduce_buffer=row if row <= FLAT_BYTES else 0)
    worst = max(moments, key=lambda name: moments[name].total)
    return StepBytes(
        moment=worst,
        base=base,
        quant_constants=constants,
        adapters=num_slots * row,
        gradients=num_slots * row,
        optimizer=2 * num_slots * row,
        **asdict(moments[worst]),
    )


def load_peak_bytes(
    shape: ModelShape,
    holding: BaseHolding,
    *,
    device_type: DeviceType = "cuda",
    checkpoint_bytes: int = 2,
) -> int:
    """Most bytes of a worker while it loads its base.

    Whole, transformers quantizes one tensor after another: the base and the one in work. Sharded
    (trainers/sharded_loading.py), first everything outside the layers and one layer, whole; in the end
    this worker's part and one layer.

    Args:
        checkpoint_bytes: of a number in the checkpoint.

    Not counted: pages of the checkpoint's files, which the system can drop.
    """
    weights, constants = base_bytes(shape, holding)
    in_work = _in_work_bytes(shape, holding, device_type, checkpoint_bytes)
    if not holding.sharded:
        return weights + constants + in_work
    whole = replace(holding, num_workers=1, sharded=False)
    all_weights, _ = base_bytes(shape, whole)
    layers = sum(layer_weight_bytes(block, holding, shape) * n for block, n in blocks(shape))
    layer = max(layer_weight_bytes(block, holding, shape) for block, _ in blocks(shape))
    outside = all_weights - layers
    return max(outside + layer, weights + constants + layer) + in_work


def _in_work_bytes(
    shape: ModelShape, holding: BaseHolding, device_type: DeviceType, checkpoint_bytes: int
) -> int:
    """A matrix that is being quantized, or a layer's experts that are being put together."""
    matrices = [lin.in_features * lin.out_features for lin in shape.linears if is_quantizable(lin)]
    largest = max(matrices, default=0) if holding.quantized else 0
    experts = sum(
        lin.num_params * shape.num_experts // lin.count
        for lin in shape.linears
        if lin.component == "experts"
    )
    return max(QUANTIZING_BYTES[device_type] * largest, checkpoint_bytes * experts)


def planned_bytes(
    shape: ModelShape,
    holding: BaseHolding,
    forward: Forward,
    *,
    target: Target,
    num_slots: int,
    device_type: DeviceType = "cuda",
) -> int:
    """Bytes that a worker must have: the larger of step and loading, over the share that tensors get,
    and what no tensor shows (`USABLE_SHARE`, `FIXED_BYTES`).

    Raises:
        ValueError: as `step_bytes`.
    """
    step = step_bytes(
        shape, holding, forward, target=target, num_slots=num_slots, device_type=device_type
    )
    margin = SCORES_MARGIN if shape.model_type in SCORES_NOT_COUNTED else 1.0
    most = max(margin * step.total, load_peak_bytes(shape, holding, device_type=device_type))
    return math.ceil(most / USABLE_SHARE) + FIXED_BYTES[device_type]
