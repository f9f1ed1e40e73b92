"""DoRA's magnitudes over a pack's layers: each output of W + s B A gets a length of its own, which is trained.

Shape legend: n segments of the batch, N tokens of a segment, S slots, R rank, I/O a layer's in/out features.

    y = g z + b,  z = (W + s B A) x,  g = m / |W + s B A|  by rows

|.| takes no part in the gradient (arXiv 2402.09353, section 4.3). Dropout drops inputs of A alone, as for
LoRA; PEFT drops those of W too.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

LEAST_NORM = 1e-12
"""Of a row that is all zeros, so that its quotient is one."""


class Magnitudes(NamedTuple):
    """A layer's magnitudes of all slots in the store [S, O], and their gradients."""

    m_SO: torch.Tensor
    grad_m_SO: torch.Tensor


@torch.no_grad()
def dense_weight(layer: nn.Module) -> torch.Tensor:
    """A frozen layer's weight as it multiplies, [O, I] in float32 (float64 of a float64 model); of a 4-bit
    layer dequantized."""
    weight: Any = layer.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, state)
    weight = weight.detach().mT if isinstance(layer, Conv1D) else weight.detach()
    return weight if weight.dtype == torch.float64 else weight.float()


def row_norms(layer: nn.Module) -> torch.Tensor:
    """|W| by rows, [O]."""
    return dense_weight(layer).norm(dim=1).clamp_min(LEAST_NORM)


@torch.no_grad()
def adapted_norms(
    layer: nn.Module, norms_O: torch.Tensor, A_RI: torch.Tensor, B_RO: torch.Tensor, scaling: float
) -> torch.Tensor:
    """|W + s B A| by rows, [O], without that matrix: |w|^2 + 2 s b (A w) + s^2 b (A A^T) b.

    Args:
        layer: the frozen one; its product with A's rows is A W^T whatever its weights are stored in.
        norms_O: |W| by rows.
    """
    bias: Any = getattr(layer, "bias", None)
    weight: Any = layer.weight
    in_four_bits = getattr(weight, "quant_state", None) is not None
    AW_RO = layer(A_RI if in_four_bits else A_RI.to(weight.dtype))
    AW_RO = (AW_RO if bias is None else AW_RO - bias).to(A_RI.dtype)
    inner_RO = 2 * AW_RO + scaling * ((A_RI @ A_RI.T) @ B_RO)
    squares_O = norms_O.square() + scaling * (B_RO * inner_RO).sum(0)
    return squares_O.clamp_min(LEAST_NORM**2).sqrt()


class Scaled(torch.autograd.Function):
    """g (out - b) + b by segments, where g is 1 for the slots that are no DoRA.

    forward(out [..., O], bias [O] or None, gains_nO = g - 1, per_norm_nO = 1 / |.| (0 for others),
    magnitudes, index): the magnitudes' gradients are added to the store, as lowrank.py does its own.
    """

    @staticmethod
    def forward(ctx: Any, out, bias, gains_nO, per_norm_nO, magnitudes, index):
        n = len(gains_nO)
        z = out if bias is None else out - bias
        gains = gains_nO[:, None].to(out.dtype)
        y_nNO = torch.addcmul(out.view(n, -1, out.shape[-1]), z.view(n, -1, out.shape[-1]), gains)
        ctx.save_for_backward(z, gains, per_norm_nO)
        ctx.magnitudes, ctx.index = magnitudes, index
        return y_nNO.view(out.shape)

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        z, gains, per_norm_nO = ctx.saved_tensors
        n, width = len(per_norm_nO), grad.shape[-1]
        grad_nNO, z_nNO = grad.reshape(n, -1, width), z.view(n, -1, width)
        stored = ctx.magnitudes.grad_m_SO
        summed_nO = torch.einsum("nto,nto->no", grad_nNO, z_nNO).to(stored.dtype)
        found_nO = summed_nO * per_norm_nO
        if isinstance(ctx.index, slice):
            stored[ctx.index] += found_nO
        else:
            stored.index_add_(0, ctx.index, found_nO)
        return torch.addcmul(grad_nNO, grad_nNO, gains).view(grad.shape), *[None] * 5
