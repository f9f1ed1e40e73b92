"""Gradient checkpointing: what a decoder layer computes is thrown away and computed again in the backward
pass, so that a token in flight costs one hidden state for each layer and the insides of one layer.

transformers has its own, which works in training mode only; our base stays in eval mode, where its
dropout is off.
"""

from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trainers.decoder import decoder_layers


def recompute_layers(model: PreTrainedModel) -> None:
    """Lets every decoder layer forget its insides until its backward pass. What a forward reads beside
    its inputs (the pack's segments, its dropout) must be the same when it is run again."""
    _, layers = decoder_layers(model)
    for layer in layers:
        # Dropout is a hash of the tokens (dropout.py), so no random state has to be kept.
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
