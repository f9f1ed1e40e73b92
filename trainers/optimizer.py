"""AdamW over a slot: torch's own fused step on one row of the store, or on all parameters of a model."""

import torch
from torch.optim.adamw import adamw

from trainers.slots import Slot

ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8


@torch.no_grad()
def adamw_step(slot: Slot, steps_done: int, *, lr: float, weight_decay: float) -> None:
    """One AdamW step of a slot's weights from its gradients.

    Args:
        steps_done: optimizer steps before this one, for the bias correction.
        lr: of each part times its factor (LoRA+).
    """
    device = slot.weights[0].device
    everything = list(
        zip(slot.weights, slot.grads, slot.exp_avgs, slot.exp_avg_sqs, slot.lr_factors, strict=True)
    )
    for factor in dict.fromkeys(slot.lr_factors):
        parts = zip(*(part[:4] for part in everything if part[4] == factor), strict=True)
        weights, grads, exp_avgs, exp_avg_sqs = map(list, parts)
        # The call counts each of them up, so they must not be one tensor.
        state_steps = [torch.full((), float(steps_done), device=device) for _ in weights]
        adamw(
            weights,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            state_steps,
            fused=True,
            amsgrad=False,
            beta1=ADAM_BETAS[0],
            beta2=ADAM_BETAS[1],
            lr=lr * factor,
            weight_decay=weight_decay,
            eps=ADAM_EPS,
            maximize=False,
        )


@torch.no_grad()
def grad_norm(slot: Slot) -> torch.Tensor:
    """2-norm of a slot's gradients, a scalar on the device."""
    return torch.nn.utils.get_total_norm(slot.grads)


@torch.no_grad()
def clip_gradients(slot: Slot, norm: torch.Tensor, max_norm: float) -> None:
    """Scales the gradients down to max_norm where they are longer, as torch's clip_grad_norm_."""
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(slot.grads, scale)
