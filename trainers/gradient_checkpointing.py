"""Gradient checkpointing: what a decoder layer computes is thrown away and computed again in the backward
pass, so that a token in flight costs one hidden state for each layer and the insides of one layer.

transformers has its own, which works in training mode only; our base stays in eval mode, where its
dropout is off.
"""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's layers.

    Raises:
        ValueError: the model has no list of as many modules as its config has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(part.startswith(("vision", "audio", "visual")) for part in parts):
            continue
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ValueError(
        f"{type(model).__name__} must have a list of its {count} layers, none was found; set "
        "gradient_checkpointing: false and give each worker a whole base"
    )


def recompute_layers(model: PreTrainedModel) -> None:
    """Lets every decoder layer forget its insides until its backward pass. What a forward reads beside
    its inputs (the pack's segments, its dropout) must be the same when it is run again."""
    _, layers = decoder_layers(model)
    for layer in layers:
        # Dropout is a hash of the tokens (dropout.py), so no random state has to be kept.
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
