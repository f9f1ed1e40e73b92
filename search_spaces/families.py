"""config.json -> shape, one reader per family of model types.

Every default is the one of the transformers 5.24 config class of that model type; a test builds
each type on the meta device, with its keys left out too, and compares.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from search_spaces.config_fields import (
    Config,
    ShapeFields,
    UnknownArchitectureError,
    flag,
    linear,
    lm_head,
    optional_size,
    size,
)
from search_spaces.families_classic import CLASSIC_READERS
from search_spaces.linear_shape import LinearShape


@dataclass(frozen=True, kw_only=True)
class _Decoder:
    """A decoder with q, k, v, o and a gated MLP (Llama and its descendants).

    `defaults` are the config class's; a bias is None where the config's attention_bias decides.
    """

    defaults: Config
    qkv_bias: bool | None = False
    o_bias: bool | None = False
    norms_per_layer: int = 2
    qk_norm: bool = False
    fused: bool = False
    experts: str = ""
    """Config key of an expert's intermediate size; empty for a dense model."""
    expert_bias: bool = False


def _defaults(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int | None, **more: object
) -> Config:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        **more,
    }


_GEMMA3 = _Decoder(
    defaults=_defaults(
        *(262208, 2304, 9216, 26, 8, 4),
        **{"head_dim": 256, "max_position_embeddings": 131072, "tie_word_embeddings": True},
    ),
    qkv_bias=None,
    o_bias=None,
    norms_per_layer=4,
    qk_norm=True,
)
_DECODERS: dict[str, _Decoder] = {
    "llama": _Decoder(
        defaults=_defaults(32000, 4096, 11008, 32, 32, None, max_position_embeddings=2048),
        qkv_bias=None,
        o_bias=None,
    ),
    "mistral": _Decoder(
        defaults=_defaults(32000, 4096, 14336, 32, 32, 8, max_position_embeddings=131072)
    ),
    "qwen2": _Decoder(
        defaults=_defaults(151936, 4096, 22016, 32, 32, 32, max_position_embeddings=32768),
        qkv_bias=True,
    ),
    "qwen3": _Decoder(
        defaults=_defaults(
            *(151936, 4096, 22016, 32, 32, 32), head_dim=128, max_position_embeddings=32768
        ),
        qkv_bias=None,
        o_bias=None,
        qk_norm=True,
    ),
    "gemma": _Decoder(
        defaults=_defaults(
            *(256000, 3072, 24576, 28, 16, 16),
            **{"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True},
        ),
        qkv_bias=None,
        o_bias=None,
    ),
    "gemma2": _Decoder(
        defaults=_defaults(
            *(256000, 2304, 9216, 26, 8, 4),
            **{"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True},
        ),
        qkv_bias=None,
        o_bias=None,
        norms_per_layer=4,
    ),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "phi3": _Decoder(
        defaults=_defaults(32064, 3072, 8192, 32, 32, None, max_position_embeddings=4096),
        fused=True,
    ),
    "mixtral": _Decoder(
        defaults=_defaults(
            *(32000, 4096, 14336, 32, 32, 8),
            **{"max_position_embeddings": 131072, "num_experts": 8, "num_experts_per_tok": 2},
        ),
        experts="intermediate_size",
    ),
    "qwen3_moe": _Decoder(
        defaults=_defaults(
            *(151936, 2048, 6144, 24, 32, 4),
            **{"max_position_embeddings": 32768, "num_experts": 128, "num_experts_per_tok": 8},
            moe_intermediate_size=768,
        ),
        qkv_bias=None,
        o_bias=None,
        qk_norm=True,
        experts="moe_intermediate_size",
    ),
    "gpt_oss": _Decoder(
        defaults=_defaults(
            *(201088, 2880, 2880, 36, 64, 8),
            **{"max_position_embeddings": 131072, "num_experts": 128, "num_experts_per_tok": 4},
            head_dim=64,
            attention_bias=True,
        ),
        qkv_bias=None,
        o_bias=None,
        experts="intermediate_size",
        expert_bias=True,
    ),
}


def read_config(config: Config) -> ShapeFields:
    """The shape that a config.json describes.

    Args:
        config: the parsed file; a nested text_config is entered.

    Raises:
        UnknownArchitectureError: a model_type without a reader.
        ValueError: no model_type, or a size that is not an integer >= 1.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(
            f"config.json must hold a model_type (a name such as 'llama'), got {model_type!r}"
        )
    if model_type in _DECODERS:
        sizes = _text_part(config) if model_type == "gemma3" else config
        return _read_decoder(model_type, sizes, _DECODERS[model_type])
    if model_type in CLASSIC_READERS:
        return CLASSIC_READERS[model_type](config)
    raise UnknownArchitectureError(
        f"model_type {model_type!r} has no shape reader (known: {', '.join(known_model_types())}); "
        "its shape will be read from the model built on the meta device, by trainers"
    )


def known_model_types() -> tuple[str, ...]:
    """Model types whose shape is read from config.json alone, sorted."""
    return tuple(sorted([*_DECODERS, *CLASSIC_READERS]))


def _text_part(config: Config) -> Config:
    """The language model's half of a Gemma 3 config; without one transformers takes defaults."""
    inner = config.get("text_config")
    if inner is not None and not isinstance(inner, Mapping):
        raise ValueError(f"text_config in config.json must be an object, got {inner!r}")
    # The head is tied by the outer config, the sizes stand in text_config.
    tied = config.get("tie_word_embeddings", True)
    return {**cast(Config, inner or {}), "tie_word_embeddings": tied}


def _read_decoder(model_type: str, given: Config, family: _Decoder) -> ShapeFields:
    config = {**family.defaults, **given}
    hidden, layers = size(config, "hidden_size", None), size(config, "num_hidden_layers", None)
    vocab = size(config, "vocab_size", None)
    attn, attn_other = _attention(config, family, hidden, layers)
    body, body_other, experts, active = _decoder_body(config, family, hidden, layers)
    norms = hidden * (family.norms_per_layer * layers + 1)
    sinks = size(config, "num_attention_heads", None) * layers if model_type == "gpt_oss" else 0
    return ShapeFields(
        model_type=model_type,
        hidden_size=hidden,
        num_layers=layers,
        vocab_size=vocab,
        max_position_embeddings=optional_size(config, "max_position_embeddings", None),
        num_experts=experts,
        num_active_experts=active,
        tied_head=flag(config, "tie_word_embeddings", False),
        linears=(*attn, *body, lm_head(hidden, vocab)),
        embedding_params=vocab * hidden,
        other_params=norms + sinks + attn_other + body_other,
    )


def _attention(
    config: Config, family: _Decoder, hidden: int, layers: int
) -> tuple[list[LinearShape], int]:
    """The attention's linears, and the parameters of its biases and norms."""
    heads = size(config, "num_attention_heads", None)
    head_dim = optional_size(config, "head_dim", None) or hidden // heads
    q = heads * head_dim
    kv = (optional_size(config, "num_key_value_heads", None) or heads) * head_dim
    if family.fused:
        sizes = [("qkv_proj", hidden, q + 2 * kv), ("o_proj", q, hidden)]
    else:
        sizes = [("q_proj", hidden, q), ("k_proj", hidden, kv), ("v_proj", hidden, kv)]
        sizes.append(("o_proj", q, hidden))
    config_bias = flag(config, "attention_bias", False)
    qkv_bias = config_bias if family.qkv_bias is None else family.qkv_bias
    o_bias = config_bias if family.o_bias is None else family.o_bias
    biases = (q + 2 * kv if qkv_bias else 0) + (hidden if o_bias else 0)
    norms = 2 * head_dim if family.qk_norm else 0
    return [linear(*size, "attn", layers) for size in sizes], layers * (biases + norms)


def _decoder_body(
    config: Config, family: _Decoder, hidden: int, layers: int
) -> tuple[list[LinearShape], int, int, int]:
    """MLP and expert linears, their other parameters, number of experts and of active ones."""
    inner = size(config, "intermediate_size", None)
    if not family.experts:
        biases = layers * (2 * inner + hidden) if flag(config, "mlp_bias", False) else 0
        return _dense_mlp(hidden, inner, layers, fused=family.fused), biases, 0, 0
    # Both spellings are legal in transformers (attribute_map of the config classes).
    experts = size(config, "num_local_experts", config["num_experts"])
    active = size(config, "num_experts_per_tok", None)
    sparse = _num_sparse_layers(config, layers)
    dense = _dense_mlp(hidden, inner, layers - sparse, fused=False) if layers > sparse else []
    m = size(config, family.experts, None)
    linears = dense
    if sparse:
        linears = [
            *dense,
            linear("experts.gate_up_proj", hidden, 2 * m, "experts", sparse * experts),
            linear("experts.down_proj", m, hidden, "experts", sparse * experts),
        ]
    # gpt-oss: a bias on the router and on both expert matrices.
    per_expert_bias = 1 + 2 * m + hidden if family.expert_bias else 0
    other = sparse * experts * (hidden + per_expert_bias)
    return linears, other, experts, active


def _dense_mlp(hidden: int, inner: int, layers: int, *, fused: bool) -> list[LinearShape]:
    down = linear("down_proj", inner, hidden, "mlp", layers)
    if fused:
        return [linear("gate_up_proj", hidden, 2 * inner, "mlp", layers), down]
    gate_up = [linear(name, hidden, inner, "mlp", layers) for name in ("gate_proj", "up_proj")]
    return [*gate_up, down]


def _num_sparse_layers(config: Config, layers: int) -> int:
    """Layers with experts; only Qwen3-MoE configs can make some of them dense."""
    step = size(config, "decoder_sparse_step", 1)
    listed = config.get("mlp_only_layers")
    if listed is not None and not isinstance(listed, (list, tuple)):
        raise ValueError(f"mlp_only_layers in config.json must be a list of layers, got {listed!r}")
    dense = set(cast(Iterable[object], listed or ()))
    return sum(1 for i in range(layers) if i not in dense and (i + 1) % step == 0)
