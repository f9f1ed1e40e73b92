"""config.json -> shape for GPT-2, GPT-NeoX, Falcon and MPT, each with names of its own.

Defaults are those of the transformers 5.24 config classes, compared by a test.
"""

from collections.abc import Callable

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
from search_spaces.linear_shape import LinearShape


def _read_gpt2(config: Config) -> ShapeFields:
    hidden, layers = size(config, "n_embd", 768), size(config, "n_layer", 12)
    positions = size(config, "n_positions", 1024)
    if flag(config, "add_cross_attention", False):
        raise UnknownArchitectureError(
            "gpt2 with add_cross_attention has no shape reader; its shape will be read from the "
            "model built on the meta device, by trainers"
        )
    inner = optional_size(config, "n_inner", None) or 4 * hidden
    linears = (
        linear("attn.c_attn", hidden, 3 * hidden, "attn", layers),
        linear("attn.c_proj", hidden, hidden, "attn", layers),
        linear("mlp.c_fc", hidden, inner, "mlp", layers),
        linear("mlp.c_proj", inner, hidden, "mlp", layers),
    )
    biases = layers * (3 * hidden + hidden + inner + hidden)
    norms = 2 * hidden * (2 * layers + 1)
    vocab = size(config, "vocab_size", 50257)
    return _dense_fields(
        "gpt2", config, hidden, layers, vocab, linears, biases + norms, positions, tied=True
    )


def _read_neox(config: Config) -> ShapeFields:
    hidden, layers = size(config, "hidden_size", 6144), size(config, "num_hidden_layers", 44)
    inner = size(config, "intermediate_size", 24576)
    linears = _bloom_like("attention", hidden, 3 * hidden, inner, layers)
    biases = layers * ((4 * hidden if flag(config, "attention_bias", True) else 0) + inner + hidden)
    norms = 2 * hidden * (2 * layers + 1)
    vocab = size(config, "vocab_size", 50432)
    positions = size(config, "max_position_embeddings", 2048)
    return _dense_fields(
        "gpt_neox", config, hidden, layers, vocab, linears, biases + norms, positions, tied=False
    )


def _read_falcon(config: Config) -> ShapeFields:
    hidden, layers = size(config, "hidden_size", 4544), size(config, "num_hidden_layers", 32)
    heads = size(config, "num_attention_heads", 71)
    head_dim = hidden // heads
    new = flag(config, "new_decoder_architecture", False)
    qkv = 3 * hidden
    if new:
        kv_heads = optional_size(config, "num_kv_heads", None) or heads
        qkv = (2 * kv_heads + heads) * head_dim
    elif flag(config, "multi_query", True):
        qkv = hidden + 2 * head_dim
    inner = optional_size(config, "ffn_hidden_size", None) or 4 * hidden
    linears = _bloom_like("self_attention", hidden, qkv, inner, layers)
    biases = layers * (qkv + 2 * hidden + inner) if flag(config, "bias", False) else 0
    norms = 2 * hidden * (_falcon_norms(config, new) * layers + 1)
    vocab = size(config, "vocab_size", 65024)
    positions = size(config, "max_position_embeddings", 2048)
    return _dense_fields(
        "falcon", config, hidden, layers, vocab, linears, biases + norms, positions, tied=True
    )


def _falcon_norms(config: Config, new_architecture: bool) -> int:
    """LayerNorms per layer."""
    if not new_architecture and not flag(config, "parallel_attn", True):
        return 2
    given = optional_size(config, "num_ln_in_parallel_attn", None)
    parallel_norms = given or (2 if new_architecture else 1)
    return 2 if new_architecture and parallel_norms == 2 else 1


def _bloom_like(
    attention: str, hidden: int, qkv: int, inner: int, layers: int
) -> tuple[LinearShape, ...]:
    return (
        linear(f"{attention}.query_key_value", hidden, qkv, "attn", layers),
        linear(f"{attention}.dense", hidden, hidden, "attn", layers),
        linear("dense_h_to_4h", hidden, inner, "mlp", layers),
        linear("dense_4h_to_h", inner, hidden, "mlp", layers),
    )


def _read_mpt(config: Config) -> ShapeFields:
    # transformers hard-codes the MLP at 4 x d_model, whatever expansion_ratio says, and drops all
    # biases and position embeddings.
    hidden, layers = size(config, "d_model", 2048), size(config, "n_layers", 24)
    linears = (
        linear("attn.Wqkv", hidden, 3 * hidden, "attn", layers),
        linear("attn.out_proj", hidden, hidden, "attn", layers),
        linear("ffn.up_proj", hidden, 4 * hidden, "mlp", layers),
        linear("ffn.down_proj", 4 * hidden, hidden, "mlp", layers),
    )
    vocab = size(config, "vocab_size", 50368)
    positions = size(config, "max_seq_len", 2048)
    norms = hidden * (2 * layers + 1)
    return _dense_fields("mpt", config, hidden, layers, vocab, linears, norms, positions, tied=True)


def _dense_fields(
    model_type: str,
    config: Config,
    hidden: int,
    layers: int,
    vocab: int,
    linears: tuple[LinearShape, ...],
    other_params: int,
    positions: int,
    *,
    tied: bool,
) -> ShapeFields:
    # Of these families only GPT-2 learns its positions; the others rotate or use ALiBi.
    learned_positions = positions if model_type == "gpt2" else 0
    return ShapeFields(
        model_type=model_type,
        hidden_size=hidden,
        num_layers=layers,
        vocab_size=vocab,
        max_position_embeddings=positions,
        num_experts=0,
        num_active_experts=0,
        tied_head=flag(config, "tie_word_embeddings", tied),
        linears=(*linears, lm_head(hidden, vocab)),
        embedding_params=(vocab + learned_positions) * hidden,
        other_params=other_params,
    )


CLASSIC_READERS: dict[str, Callable[[Config], ShapeFields]] = {
    "gpt2": _read_gpt2,
    "gpt_neox": _read_neox,
    "falcon": _read_falcon,
    "mpt": _read_mpt,
}
