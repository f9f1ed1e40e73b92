"""The shape of an architecture that search_spaces does not know, read from the built model."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from search_spaces.architecture import LinearShape, ModelShape, UnknownArchitectureError
from trainers.base_model import meta_model
from trainers.decoder import is_text_module
from trainers.experts import (
    PARAMETERS,
    expert_size,
    is_experts,
    num_active_experts,
    parameter_suffix,
)
from trainers.store import LayerSize
from trainers.targets import EXPERTS, layer_size

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
    stand in, fused experts by what they are, the head as transformers names it. Routers, vision towers and
    anything that is neither are left out, never guessed.

    Raises:
        ValueError: no attention layer was recognised, or experts that cannot be trained: left out without
            a word, most of the model would stay frozen.
    """
    try:
        return ModelShape.from_config(config.to_dict())
    except UnknownArchitectureError:
        model = meta_model(config)
    experts = _expert_sizes(model)
    linears = _linears(model) + _expert_shapes(experts)
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
        num_experts=max((size.num_experts for size in experts.values()), default=0),
        num_active_experts=num_active_experts(model) if experts else 0,
        is_from_model=True,
    )


def _expert_sizes(model: PreTrainedModel) -> dict[str, LayerSize]:
    """Full name -> size of every fused parameter of the language part's experts."""
    found: dict[str, LayerSize] = {}
    for name, module in model.named_modules():
        if not is_text_module(name):
            continue
        if is_experts(module):
            active = num_active_experts(model)
            try:
                found |= {f"{name}.{one}": expert_size(module, one, active) for one in PARAMETERS}
            except ValueError as error:
                raise ValueError(
                    f"{name} ({type(module).__name__}): experts of this kind cannot be trained by this version, "
                    "and without them most of the model would stay frozen"
                ) from error
        elif name.endswith(EXPERTS) and any(p.ndim == 3 for p in module.parameters(recurse=False)):
            raise ValueError(
                f"{name} ({type(module).__name__}): must be experts with {' and '.join(PARAMETERS)}; others cannot "
                "be trained by this version"
            )
    return found


def _expert_shapes(sizes: Mapping[str, LayerSize]) -> list[LinearShape]:
    counts: Counter[tuple[str, int, int]] = Counter()
    for name, size in sizes.items():
        counts[(parameter_suffix(name), size.num_in, size.num_out)] += size.num_experts
    return [
        LinearShape(name=n, in_features=i, out_features=o, component="experts", count=count)
        for (n, i, o), count in counts.items()
    ]


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
    ) or lowered.endswith((".gate", "expert_gate")):
        return None
    if any(word in lowered for word in ATTENTION_WORDS):
        return "attn"
    return "mlp" if any(word in lowered for word in MLP_WORDS) else None
