"""How many warm worker groups a sweep gets, and how many adapters each of them holds.

A group holds as many adapters as fill its forward (the measured number of tokens above which a forward
gains nothing) and one more, which trains while another's result is being judged; fewer where memory or
the number of trials says so. Bytes are estimates to within about a tenth, for this decision alone.
"""

import math
from dataclasses import dataclass

from search_spaces.architecture import ModelShape
from search_spaces.linear_shape import LinearShape

NF4_BITS = 4.127
"""Bits of a weight in NF4 with double quantization. Source: QLoRA, arXiv 2305.14314, section 3."""
ADAPTER_BYTES = 16
"""Bytes of an adapter's parameter: weight, gradient and two AdamW moments in fp32."""
USABLE_SHARE = 0.8
"""Share of a worker's memory that is planned; the rest is the allocator's and the libraries'."""
SAVED_PER_HIDDEN, SAVED_PER_MLP = 14, 5
"""ASSUMPTION: numbers kept for the backward pass for each token and layer, in units of hidden_size and
of the MLP's width (inputs of the projections, norms, queries, keys, values, the MLP's products)."""
FORWARD_TOKENS = {"cpu": 2048, "gpu": 16384}
"""Tokens of a forward where nothing was measured yet."""
SPARE_PLACES = 1


@dataclass(frozen=True, kw_only=True)
class WorkerMemory:
    """Bytes of one worker.

    Args:
        room_bytes: what it may use; None where nobody knows (a cluster that does not say).
        base_bytes: the frozen base as it is loaded.
        dequantized_bytes: what the base's 4-bit layers weigh when they are kept dequantized; 0 for a
            base that is not quantized.
        adapter_bytes: of the largest adapter, with gradients and moments.
        token_bytes: activations of one token in flight.
    """

    room_bytes: int | None
    base_bytes: int
    dequantized_bytes: int
    adapter_bytes: int
    token_bytes: int

    def places(self, max_tokens: int, *, dequantized: bool) -> int | None:
        """Adapters that fit beside base and activations; None where the room is not known."""
        if self.room_bytes is None:
            return None
        used = self.base_bytes + max_tokens * self.token_bytes
        used += self.dequantized_bytes if dequantized else 0
        return max(0, int((self.room_bytes * USABLE_SHARE - used) // self.adapter_bytes))


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """What the pool of a sweep is made of. places: adapters of one group."""

    num_groups: int
    places: int
    max_tokens: int
    keep_dequantized: bool
    reason: str


def worker_memory(
    shape: ModelShape,
    *,
    quantized: bool,
    dtype_bytes: int,
    lora_rank: int,
    target: tuple[str, ...],
    room_bytes: int | None,
) -> WorkerMemory:
    """Bytes of a worker that holds this base.

    Args:
        quantized: NF4; embeddings, head, norms and fused experts stay in the compute type.
        dtype_bytes: of the compute type.
        lora_rank, target: of the largest adapter.
    """
    nf4 = sum(linear.num_params for linear in shape.linears if _is_quantizable(linear))
    weights = nf4 if quantized else 0
    base = int(weights * NF4_BITS / 8) + (shape.num_params - weights) * dtype_bytes
    widths = [linear.out_features for linear in shape.linears if linear.component == "mlp"]
    mlp = max(widths, default=shape.hidden_size)
    saved = shape.num_layers * (SAVED_PER_HIDDEN * shape.hidden_size + SAVED_PER_MLP * mlp)
    return WorkerMemory(
        room_bytes=room_bytes,
        base_bytes=base,
        dequantized_bytes=weights * dtype_bytes,
        adapter_bytes=ADAPTER_BYTES * shape.lora_params(lora_rank, target),
        token_bytes=saved * dtype_bytes,
    )


def _is_quantizable(linear: LinearShape) -> bool:
    return linear.component in ("attn", "mlp")


def pack_plan(
    memory: WorkerMemory,
    *,
    num_trials: int,
    max_groups: int,
    max_tokens: int,
    tokens_per_step: int,
    measured: bool,
    pack_size: int | None = None,
) -> PackPlan:
    """Groups and places of a sweep.

    Args:
        num_trials: trials of the sweep, >= 1.
        max_groups: groups that the cluster holds, >= 1.
        max_tokens: of one forward.
        tokens_per_step: of one adapter's global batch on one worker (the smallest of the sweep's).
        measured: whether max_tokens was measured on this machine.
        pack_size: places that the user asks for.

    Raises:
        ValueError: not even one adapter fits, or not as many as the user asks for.
    """
    keep = bool(memory.dequantized_bytes) and (memory.places(max_tokens, dequantized=True) or 0) > 1
    most = memory.places(max_tokens, dequantized=keep)
    _require_room(memory, most, pack_size or 1)
    groups = min(max_groups, num_trials)
    fill = math.ceil(max_tokens / tokens_per_step)
    wanted = pack_size or fill + SPARE_PLACES
    per_group = math.ceil(num_trials / groups)
    places = min(wanted, per_group, wanted if most is None else most)
    return PackPlan(
        num_groups=groups,
        places=places,
        max_tokens=max_tokens,
        keep_dequantized=keep,
        reason=_reason(most, fill, max_tokens, measured, pack_size, per_group),
    )


def _require_room(memory: WorkerMemory, most: int | None, wanted: int) -> None:
    if most is None or most >= wanted:
        return
    raise ValueError(
        f"a worker must hold the base ({memory.base_bytes:,} bytes) and {wanted} adapter(s) of "
        f"{memory.adapter_bytes:,} bytes, {USABLE_SHARE:.0%} of its {memory.room_bytes:,} bytes hold {most}; "
        "lower lora_rank or pack_size, or use a larger machine"
    )


def _reason(
    most: int | None,
    fill: int,
    max_tokens: int,
    measured: bool,
    pack_size: int | None,
    per_group: int,
) -> str:
    memory = "memory not known" if most is None else f"memory holds {most:,}"
    if pack_size:
        return f"pack_size {pack_size}; {memory}"
    how = "measured" if measured else "not measured here yet"
    return (
        f"{fill} fill a forward of {max_tokens:,} tokens ({how}) and {SPARE_PLACES} trains while "
        f"another is judged; {memory}; {per_group} trial(s) a group"
    )
