"""The optimizer step over a slot's memory, against torch's own AdamW and gradient clip."""

import pytest
import torch

from tests.trainers.packs import adapter
from tests.trainers.tiny import tiny_model
from trainers.adapters import inject
from trainers.full import unfreeze
from trainers.optimizer import adamw_step, clip_gradients, grad_norm
from trainers.slots import Slot


def adapter_slot() -> Slot:
    """The adapter of rank 4 beside one of rank 8: half of its row is padding."""
    model = tiny_model()
    return inject(model, [adapter(model, "a"), adapter(model, "c")]).slots[0]


def full_slot() -> Slot:
    return unfreeze(tiny_model()).slots[0]


def randomise(slot: Slot, generator: torch.Generator, scale: float = 1.0) -> None:
    """New gradients of all sizes."""
    with torch.no_grad():
        for gradient in slot.gradients.values():
            gradient.copy_(scale * torch.randn(gradient.shape, generator=generator).double() ** 3)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("build", [adapter_slot, full_slot])
def test_adamw_step_ten_steps_equal_torch_adamw(build, weight_decay):
    slot = build()
    names = list(slot.gradients)
    copies = [torch.nn.Parameter(slot.parameters[name].detach().clone()) for name in names]
    optimizer = torch.optim.AdamW(copies, lr=1.0, weight_decay=weight_decay, foreach=False)
    generator = torch.Generator().manual_seed(0)
    for step in range(10):
        randomise(slot, generator)
        optimizer.param_groups[0]["lr"] = lr = 0.01 * (step + 1)
        for name, copy in zip(names, copies, strict=True):
            copy.grad = slot.gradients[name].clone()
        optimizer.step()
        adamw_step(slot, step, lr=lr, weight_decay=weight_decay)
    for name, copy in zip(names, copies, strict=True):
        torch.testing.assert_close(slot.parameters[name], copy, atol=1e-12, rtol=0)
        state = optimizer.state[copy]
        for own, key in zip(slot.moments[name], ("exp_avg", "exp_avg_sq"), strict=True):
            torch.testing.assert_close(own, state[key], atol=1e-12, rtol=1e-12)


def test_adamw_step_leaves_the_padding_of_a_lower_rank_at_zero():
    slot = adapter_slot()
    randomise(slot, torch.Generator().manual_seed(0))
    adamw_step(slot, 0, lr=0.1, weight_decay=0.1)
    (row,) = slot.weights
    num_weights = sum(view.numel() for view in slot.parameters.values())
    assert num_weights < row.numel()
    assert int(row.count_nonzero()) == num_weights


@pytest.mark.parametrize("build", [adapter_slot, full_slot])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_clip_gradients_equals_torch_clip_grad_norm(build, scale):
    slot = build()
    randomise(slot, torch.Generator().manual_seed(0), scale)
    copies = [torch.nn.Parameter(torch.zeros_like(g)) for g in slot.gradients.values()]
    for copy, gradient in zip(copies, slot.gradients.values(), strict=True):
        copy.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(copies, max_norm=1.0)
    own = grad_norm(slot)
    torch.testing.assert_close(own, norm, atol=0, rtol=1e-12)
    clip_gradients(slot, own, 1.0)
    for copy, gradient in zip(copies, slot.gradients.values(), strict=True):
        torch.testing.assert_close(gradient, copy.grad, atol=1e-15, rtol=1e-12)


def test_clip_gradients_of_no_gradient_stays_zero():
    slot = adapter_slot()
    clip_gradients(slot, grad_norm(slot), 1.0)
    assert all(gradient.eq(0).all() for gradient in slot.gradients.values())
