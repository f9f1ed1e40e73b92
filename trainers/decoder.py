"""Where the language model's own layers are in a transformers model."""

from torch import nn
from transformers import PreTrainedModel


def is_text_module(name: str) -> bool:
    """Whether a module's full name lies in the language model, not in a tower for images or sound."""
    return not any(part.startswith(("vision", "audio", "visual")) for part in name.split("."))


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's layers.

    Raises:
        ValueError: the model has no list of as many modules as its config has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if is_text_module(name) and isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ValueError(
        f"{type(model).__name__} must have a list of its {count} layers, none was found; set "
        "gradient_checkpointing: false and give each worker a whole base"
    )
