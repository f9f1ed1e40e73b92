"""The shape of an architecture that search_spaces does not know, read from the built model."""

from collections import Counter
from pathlib import Path
from typing import cast

from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from search_spaces.architecture import LinearShape, ModelShape, UnknownArchitectureError
from trainers.base_model import meta_model
from trainers.targets import layer_size

ATTENTION_WORDS, MLP_WORDS = ("attn", "attention"), ("mlp", "ffn", "feed_forward", "fc1", "fc2")


def shape_of_folder(folder: Path) -> ModelShape:
    """The shape of the model whose config.json stands in a folder.

    Raises:
        ValueError: transformers cannot build it, or no attention layer was recognised.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder}: transformers cannot build this model: {first}") from error
    return shape_of_config(config)


def shape_of_config(config: PretrainedConfig) -> ModelShape:
    """The shape that search_spaces reads from a config; of an architecture that it does not know, of
    the model built without weights: attention and MLP by the names of the modules that its linears
    stand in, the head as transformers names it. Routers, vision towers and anything that is neither
    are left out, never guessed.

    Raises:
        ValueError: no attention layer was recognised.
    """
    try:
        return ModelShape.from_config(config.to_dict())
    except UnknownArchitectureError:
        model = meta_model(config)
    linears = _linears(model)
    if not any(linear.component == "attn" for linear in linears):
        raise ValueError(f"no attention layer was recognised in {type(model).__name__}")
    text = model.config.get_text_config()
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    tied = bool(getattr(text, "tie_word_embeddings", False))
    adapted = sum(
        linear.num_params for linear in linears if not (tied and linear.component == "unembed")
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    return ModelShape.from_linears(
        model_type=model.config.model_type,
        linears=tuple(linears),
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        embedding_params=embedding.weight.numel(),
        other_params=total - embedding.weight.numel() - adapted,
        max_position_embeddings=getattr(text, "max_position_embeddings", None),
        tied_head=tied,
    )


def _linears(model: PreTrainedModel) -> list[LinearShape]:
    head = model.get_output_embeddings()
    counts: Counter[tuple[str, int, int, str]] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            component = "unembed" if module is head else _component(name)
            if component:
                size = layer_size(module)
                counts[(_suffix(name), size.num_in, size.num_out, component)] += 1
    return [
        LinearShape(name=n, in_features=i, out_features=o, component=c, count=count)
        for (n, i, o, c), count in counts.items()
    ]


def _suffix(name: str) -> str:
    """The name after the layer's number, which is what tells attention's c_proj from the MLP's."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else name


def _component(name: str) -> str | None:
    lowered = name.lower()
    if any(
        word in lowered for word in ("vision", "visual", "audio", "router", ".gate.")
    ) or lowered.endswith(".gate"):
        return None
    if any(word in lowered for word in ATTENTION_WORDS):
        return "attn"
    return "mlp" if any(word in lowered for word in MLP_WORDS) else None
