"""Full fine-tuning: the same loop over a pack of one slot that holds every parameter of the model."""

import torch
from transformers import PreTrainedModel

from trainers.adapters import Pack, PackContext, Slot
from trainers.base_model import nf4_layer_names


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
    return Pack(model=model, slots=[Slot(parameters=parameters, spec=None)], ctx=PackContext())
