"""Full fine-tuning: the same loop over a pack of one slot that holds every parameter of the model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from trainers.adapters import Pack
from trainers.base_model import nf4_layer_names
from trainers.slots import Slot


def unfreeze(model: PreTrainedModel) -> Pack:
    """All parameters trainable, as a pack of one slot; a tied head is one parameter.

    Raises:
        ValueError: a quantized model, or bf16 weights: AdamW's small updates vanish in bf16 and would
            make every full-fine-tuning learning rate look too low.
    """
    if nf4_layer_names(model):
        raise ValueError(
            "full fine-tuning needs quantization: none; a 4-bit base cannot be trained"
        )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if torch.bfloat16 in dtypes:
        raise ValueError(
            "full fine-tuning needs dtype: fp32; updates below bf16's precision are lost"
        )
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    pack = Pack(model)
    pack.slots[0] = _slot(parameters)
    return pack


def _slot(parameters: dict[str, torch.nn.Parameter]) -> Slot:
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in gradients.items()}
    return Slot(
        spec=None,
        parameters=dict(parameters),
        gradients=gradients,
        moments=moments,
        weights=list(parameters.values()),
        grads=list(gradients.values()),
        exp_avgs=[first for first, _ in moments.values()],
        exp_avg_sqs=[second for _, second in moments.values()],
        lr_factors=[1.0] * len(gradients),
        rows=list(parameters.values()),
        grad_rows=list(gradients.values()),
    )


class BaseWeights:
    """A copy of a base's weights, so that a warm worker can train all of them and give them back."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.copies = {name: p.detach().clone() for name, p in model.named_parameters()}

    @contextmanager
    def in_place_of(self, model: PreTrainedModel) -> Iterator[None]:
        """The model computes as the base did, within."""
        trained = {name: p.data for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.data = self.copies[name]
        try:
            yield
        finally:
            for name, parameter in model.named_parameters():
                parameter.data = trained[name]

    @torch.no_grad()
    def restore(self, model: PreTrainedModel) -> None:
        """The model as it was: weights bit for bit, frozen, no gradients held."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.copies[name])
            parameter.grad = None
            parameter.requires_grad_(False)
