"""PiSSA's start: A and B hold a weight's largest singular triplets, and the base keeps the rest.

The base of a pack is shared, so it is not changed. The start is subtracted by as many frozen ranks again:

    W - s B0 A0 + s B A  =  W + s [B, -B0] [A; A0]

which is a plain LoRA of twice the rank, the form in which PEFT itself converts a PiSSA for other bases
(`path_initial_model_for_weight_conversion`). An NF4 base keeps its own four bits: the rest W - s B0 A0 is not
quantized anew, as QPiSSA does, and the start is exactly the base.
"""

import torch

POWER_ITERATIONS = 16
"""Of the randomized singular value decomposition: PEFT's `pissa_niter_16`, the authors' choice."""
OVERSAMPLED = 10
"""Vectors beyond the rank: without them neighbouring singular values at its end are not told apart."""


@torch.no_grad()
def principal(
    weight_OI: torch.Tensor, rank: int, scaling: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, I] and B^T [r, O] with scaling B A = the largest `rank` triplets; r is less where a side is shorter.

    Args:
        seed: of the decomposition's random start: equal seeds give equal factors.
    """
    rank = min(rank, *weight_OI.shape)
    devices = [weight_OI.device] if weight_OI.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        q = min(rank + OVERSAMPLED, *weight_OI.shape)
        U_Oq, S_q, V_Iq = torch.svd_lowrank(weight_OI, q=q, niter=POWER_ITERATIONS)
    root_r = (S_q[:rank] / scaling).sqrt()
    return root_r[:, None] * V_Iq.T[:rank], root_r[:, None] * U_Oq.T[:rank]
