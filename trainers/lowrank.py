"""The low-rank products of a pack: one batched product per layer, whatever the number of adapters.

Shape legend: n segments of the batch (each belongs to one slot), N tokens of a segment, S slots, R
largest lora_rank among the segments, I/O a layer's in/out features.

The adapters' gradients are added to the store by the backward pass itself: autograd would build a
gradient for all slots of the store at every micro-step, also for those that are not in the batch.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Segments:
    """Which slot each of the n equal segments of a batch belongs to.

    Args:
        slots: slot of each segment; a slot may come more than once.
        index: the same for indexing: a slice where the slots are consecutive (no copies), else
            int64 [n] on the device.
        max_rank: largest lora_rank among them.
        anchor: a tensor that requires grad: an adapted layer whose input does not (the first one)
            must still be part of the backward pass.
    """

    slots: tuple[int, ...]
    index: "slice | torch.Tensor"
    max_rank: int
    anchor: torch.Tensor


def make_segments(
    slots: tuple[int, ...], max_rank: int, anchor: torch.Tensor, device: torch.device
) -> Segments:
    """Segments of the given slots."""
    first = slots[0]
    if slots == tuple(range(first, first + len(slots))):
        return Segments(slots, slice(first, first + len(slots)), max_rank, anchor)
    return Segments(slots, torch.tensor(slots, device=device), max_rank, anchor)


class Matrices(NamedTuple):
    """A layer's matrices of all slots in the store: A [S, R, I], B [S, R, O] (B is stored transposed,
    so that lower ranks are a prefix of both), their gradients, and lora_alpha / lora_rank [S]."""

    A_SRI: torch.Tensor
    B_SRO: torch.Tensor
    grad_A_SRI: torch.Tensor
    grad_B_SRO: torch.Tensor
    scaling_S: torch.Tensor


def _picked(stored: torch.Tensor, segments: Segments, dtype: torch.dtype) -> torch.Tensor:
    """The segments' matrices [n, R, ...] in the type of the activations."""
    ranks = stored[:, : segments.max_rank]
    if isinstance(segments.index, slice):
        return ranks[segments.index].to(dtype)
    return ranks.index_select(0, segments.index).to(dtype)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    # A batch of one is a plain product, which uses all threads.
    return torch.mm(left[0], right[0])[None] if len(left) == 1 else torch.bmm(left, right)


def _add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if len(into) == 1:
        into[0].addmm_(left[0], right[0])
    else:
        into.baddbmm_(left, right)


def _accumulate(
    grad: torch.Tensor, segments: Segments, left: torch.Tensor, right: torch.Tensor
) -> None:
    """grad[slot of each segment] += left^T right."""
    ranks, left = grad[:, : segments.max_rank], left.transpose(1, 2)
    if isinstance(segments.index, slice) and grad.dtype == left.dtype:
        _add_product(ranks[segments.index], left, right)
        return
    product = _product(left, right).to(grad.dtype)
    if isinstance(segments.index, slice):
        ranks[segments.index] += product
    else:
        ranks.index_add_(0, segments.index, product)


def _low(
    x_nNI: torch.Tensor, matrices: Matrices, segments: Segments, scaling_n: torch.Tensor
) -> torch.Tensor:
    A_nRI = _picked(matrices.A_SRI, segments, x_nNI.dtype)
    return _product(x_nNI, A_nRI.transpose(1, 2)).mul_(scaling_n)


def _backward(ctx: Any, grad_nNO: torch.Tensor, grad_x_nNI: torch.Tensor | None) -> None:
    """Adds the adapters' gradients to the store, and their part of x's gradient to grad_x."""
    x_nNI, low_nNR, keep_nNI = ctx.saved_tensors
    matrices, segments = ctx.matrices, ctx.segments
    if keep_nNI is not None:
        x_nNI = x_nNI * keep_nNI
    B_nRO = _picked(matrices.B_SRO, segments, grad_nNO.dtype)
    _accumulate(matrices.grad_B_SRO, segments, low_nNR, grad_nNO)
    grad_low_nNR = _product(grad_nNO, B_nRO.transpose(1, 2)).mul_(ctx.scaling_n)
    _accumulate(matrices.grad_A_SRI, segments, grad_low_nNR, x_nNI)
    if grad_x_nNI is None:
        return
    A_nRI = _picked(matrices.A_SRI, segments, grad_nNO.dtype)
    if keep_nNI is None:
        _add_product(grad_x_nNI, grad_low_nNR, A_nRI)
    else:
        grad_x_nNI += _product(grad_low_nNR, A_nRI).mul_(keep_nNI)


def _setup(
    ctx: Any,
    x: torch.Tensor,
    out_nNO: torch.Tensor,
    matrices: Matrices,
    segments: Segments,
    keep_nNI: torch.Tensor | None,
) -> None:
    """Adds the low-rank products to out in place and saves what the backward pass needs."""
    x_nNI = x.reshape(len(segments.slots), -1, x.shape[-1])
    scaling_n = matrices.scaling_S[segments.index].to(x.dtype)[:, None, None]
    dropped = x_nNI if keep_nNI is None else x_nNI * keep_nNI
    low_nNR = _low(dropped, matrices, segments, scaling_n)
    _add_product(out_nNO, low_nNR, _picked(matrices.B_SRO, segments, x.dtype))
    ctx.save_for_backward(x_nNI, low_nNR, keep_nNI)
    ctx.matrices, ctx.segments, ctx.scaling_n = matrices, segments, scaling_n


class AdaptedLinear(torch.autograd.Function):
    """A frozen linear layer with its adapters: x W^T + b + scaling (x A^T) B^T, one node of the graph.

    forward(x, weight, bias, anchor, matrices, segments, keep): keep is a dropout mask over x, already
    divided by 1 - rate, [n, N, I], or None.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, bias, anchor, matrices, segments, keep):
        out = F.linear(x, weight, bias)
        _setup(ctx, x, out.view(len(segments.slots), -1, out.shape[-1]), matrices, segments, keep)
        ctx.weight, ctx.x_shape = weight, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        count = len(ctx.segments.slots)
        grad_nNO = grad.reshape(count, -1, grad.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_nNO.view(-1, grad.shape[-1]), ctx.weight)
        _backward(
            ctx, grad_nNO, None if grad_x is None else grad_x.view(count, -1, grad_x.shape[-1])
        )
        grad_x = None if grad_x is None else grad_x.view(ctx.x_shape)
        return grad_x, None, None, None, None, None, None


class LowRankAdded(torch.autograd.Function):
    """out + scaling (x A^T) B^T for a layer whose own product is not a plain frozen Linear (4-bit
    weights, Conv1D). forward(x, out, anchor, matrices, segments, keep)."""

    @staticmethod
    def forward(ctx: Any, x, out, anchor, matrices, segments, keep):
        total = out.clone(memory_format=torch.contiguous_format)
        _setup(ctx, x, total.view(len(segments.slots), -1, out.shape[-1]), matrices, segments, keep)
        ctx.x_shape = x.shape
        return total

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        count = len(ctx.segments.slots)
        grad_nNO = grad.reshape(count, -1, grad.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.new_zeros(ctx.x_shape)
        _backward(
            ctx, grad_nNO, None if grad_x is None else grad_x.view(count, -1, ctx.x_shape[-1])
        )
        return grad_x, grad, None, None, None, None
