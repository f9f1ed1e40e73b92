"""Bytes that one forward of a pack keeps for its backward pass, and what a backward pass needs beside them.

Derived part by part from what autograd saves in the blocks that transformers 5 builds and in
trainers/lowrank.py; proved against torch's own trackers by tests/trainers/test_memory_measured.py. Exact
for Llama and its relatives (Mistral, Qwen, Phi-3, Mixtral). For the others the linears are right and the
norms and activation functions are taken to be like Llama's or, where listed here, plain LayerNorms.

Not counted: attention scores where they are materialised (`SCORES_NOT_COUNTED`; and fp32 with grouped heads
on a GPU, for which torch 2.13 has no fused kernel).

Shape legend: T tokens of a forward, H hidden, Q width of all query heads, V width of keys and values
together, F width of the MLP, R lora_rank, e bytes of the compute type.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from search_spaces.architecture import ModelShape
from search_spaces.linear_shape import LinearShape

FLOAT_BYTES, INT_BYTES = 4, 8
LAYER_NORMS = frozenset({"gpt2", "gpt_neox", "falcon", "mpt"})
"""Model types whose norms save their input as it is; an RMSNorm computes in fp32 and saves a copy."""
HEAD_NORMS = frozenset({"qwen3", "qwen3_moe", "gemma3", "gemma3_text"})
"""Model types that normalise each query and key head."""
NORMS_PER_LAYER = {"gemma2": 4, "gemma3": 4, "gemma3_text": 4}
SPELLED_OUT_GELU = frozenset({"gpt2"})
"""Model types whose activation is written out with a tanh and so keeps its steps."""
SCORES_NOT_COUNTED = frozenset({"gemma2", "gpt_oss", "falcon"})
"""Model types whose attention (a softcap, sinks, a mask on one key head) has no fused kernel and keeps its
scores, row_tokens numbers for each head and token. The shape does not say how many heads there are, so
these bytes are missing: `planned_bytes` adds a margin."""
NORM_BACKWARD = 5
"""fp32 tensors of width H alive at the peak of an RMSNorm's backward pass, beside what it saved.
Source: live storages of torch 2.13 at that moment, bf16 and fp32."""
HASH_TENSORS = 3
"""int64 tensors of a linear's inputs alive while trainers/dropout.py hashes a mask."""
HEAD_WIDTH = 64
"""ASSUMPTION: features of an attention head, for flash attention's one fp32 number a head and token."""


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """Bytes for each token of one decoder layer.

    Args:
        entry: the layer's input, which a recomputed layer keeps.
        entry_norm: kept by the norm of the input: in fp32 the input itself.
        attention: kept from the norm's output to the attention's.
        middle: kept of the norm between attention and MLP.
        mlp: kept of the MLP or of the experts.
        mlp_peak: alive at the worst moment of the MLP's backward pass, what it kept included.
        attention_peak: the same of the attention's backward pass (the MLP's share is gone by then).
        norm_peak: needed by an RMSNorm's backward pass beside what the others kept.
        mask_peak: needed while a dropout mask is computed; 0 without dropout.
    """

    entry: int
    entry_norm: int
    attention: int
    middle: int
    mlp: int
    mlp_peak: int
    attention_peak: int
    norm_peak: int
    mask_peak: int

    @property
    def kept(self) -> int:
        """All that the layer keeps beside its input and the norm of that."""
        return self.attention + self.middle + self.mlp

    @property
    def recomputed(self) -> int:
        """What is there once the layer was computed again, beside the input that it began with."""
        return self.kept + (self.entry_norm if self.entry_norm > self.entry else 0)

    @property
    def backward_peak(self) -> int:
        """The most that is alive in the layer's backward pass, what it kept included."""
        before_mlp = self.attention + self.middle
        return max(
            before_mlp + self.mlp_peak,
            before_mlp + self.norm_peak,
            self.attention + self.attention_peak,
        )


@dataclass(frozen=True, kw_only=True)
class Block:
    """The widths of one kind of decoder layer.

    Args:
        inputs, output: the linears that read the attention's input and the one that writes it back.
        up, down: the same of the MLP, or of one expert.
        copies: how many of them a token passes: 1, or the active experts.
    """

    inputs: tuple[LinearShape, ...]
    output: LinearShape
    up: tuple[LinearShape, ...]
    down: LinearShape
    copies: int = 1

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """All of them, in the order of the forward pass."""
        return (*self.inputs, self.output, *self.up, self.down)

    @property
    def query_width(self) -> int:
        """Q."""
        return self.output.in_features

    @property
    def kv_width(self) -> int:
        """V."""
        return max(0, sum(linear.out_features for linear in self.inputs) - self.query_width)

    @property
    def up_width(self) -> int:
        """What the MLP's first linears write: 2 F where it is gated."""
        return sum(linear.out_features for linear in self.up)


def blocks(shape: ModelShape) -> list[tuple[Block, int]]:
    """The kinds of decoder layers of a model, each with the number of layers of that kind.

    Raises:
        ValueError: no attention, or neither MLP nor experts: nothing to derive activations from.
    """
    attention = [linear for linear in shape.linears if linear.component == "attn"]
    found: list[tuple[Block, int]] = []
    for component, copies in (("mlp", 1), ("experts", shape.num_active_experts)):
        body = [linear for linear in shape.linears if linear.component == component]
        if attention and body:
            per_layer = 1 if component == "mlp" else shape.num_experts
            block = Block(
                inputs=tuple(attention[:-1]),
                output=attention[-1],
                up=tuple(body[:-1]),
                down=body[-1],
                copies=copies,
            )
            found.append((block, body[-1].count // per_layer))
    if not found:
        raise ValueError(
            f"a {shape.model_type} shape must have attention and an MLP or experts to count its "
            f"activations, it has {', '.join(shape.components)}"
        )
    return found


def layer_bytes(
    block: Block,
    shape: ModelShape,
    targets: Sequence[LinearShape],
    *,
    compute_bytes: int,
    lora_rank: int,
    dropout: bool,
    magnitudes: bool = False,
    packed_tokens: int = 0,
) -> LayerBytes:
    """Bytes for each token of a decoder layer.

    Args:
        targets: the adapted linears, from `ModelShape.resolve_target`.
        compute_bytes: e.
        lora_rank: largest of the forward.
        dropout: whether any of its adapters drops inputs.
        magnitudes: whether any of its adapters is a DoRA.
        packed_tokens: of a row that holds several examples, which a mask keeps apart; else 0.
    """
    hidden, e = shape.hidden_size, compute_bytes
    norm = norm_bytes(shape, e)
    extra_norms = NORMS_PER_LAYER.get(shape.model_type, 2) - 2
    width = _Widths(
        block, shape, frozenset(targets), e, lora_rank, dropout, magnitudes, packed_tokens
    )
    return LayerBytes(
        entry=e * hidden,
        # An RMSNorm in fp32 saves its input itself, in bf16 a copy of it.
        entry_norm=norm,
        attention=width.attention(),
        middle=norm * (1 + extra_norms) + (e * hidden if width.reads(block.up) else 0),
        mlp=width.mlp(),
        mlp_peak=width.mlp_peak(),
        attention_peak=e * (3 * block.query_width + 2 * block.kv_width),
        norm_peak=norm_backward_bytes(shape, e),
        mask_peak=width.mask_peak(),
    )


def norm_bytes(shape: ModelShape, compute_bytes: int) -> int:
    """Bytes for each token that a norm of width H keeps: its input, in fp32 where it is an RMSNorm."""
    is_layer_norm = shape.model_type in LAYER_NORMS
    return shape.hidden_size * (compute_bytes if is_layer_norm else max(FLOAT_BYTES, compute_bytes))


def norm_backward_bytes(shape: ModelShape, compute_bytes: int) -> int:
    """Bytes for each token that a norm's backward pass needs beside what it kept: gradients in and out of
    a LayerNorm's one kernel; an RMSNorm is spelled out."""
    copies = 2 if shape.model_type in LAYER_NORMS else NORM_BACKWARD
    return copies * norm_bytes(shape, compute_bytes)


@dataclass(frozen=True)
class _Widths:
    block: Block
    shape: ModelShape
    targets: frozenset[LinearShape]
    e: int
    lora_rank: int
    dropout: bool
    magnitudes: bool
    packed_tokens: int

    def reads(self, linears: Sequence[LinearShape]) -> bool:
        """Whether an adapter keeps the input that these linears share."""
        return not self.targets.isdisjoint(linears)

    def low_rank(self, linears: Sequence[LinearShape]) -> int:
        """x A^T of each adapted linear, its dropout mask, and of a DoRA its output before the magnitudes."""
        adapted = [linear for linear in linears if linear in self.targets]
        masks = sum(linear.in_features for linear in adapted) if self.dropout else 0
        outputs = sum(linear.out_features for linear in adapted) if self.magnitudes else 0
        return self.e * (self.lora_rank * len(adapted) + masks + outputs)

    def attention(self) -> int:
        """The norm's output, rotated queries and keys, values, attention's output and its logsumexp."""
        block, e = self.block, self.e
        query, kv = block.query_width, block.kv_width
        kept = e * (2 * query + kv) + FLOAT_BYTES * -(-query // HEAD_WIDTH)
        if (
            self.packed_tokens
        ):  # a mask, as numbers, and keys and values repeated for every query head
            kept += e * (self.packed_tokens + 2 * query - kv)
        if len(block.inputs) == 1:  # values are a view of the fused product, which stays
            kept += e * (query + kv // 2)
        if self.shape.model_type in HEAD_NORMS:
            kept += max(FLOAT_BYTES, e) * (query + kv // 2)
        kept += e * self.shape.hidden_size if self.reads(block.inputs) else 0
        return kept + self.low_rank([*block.inputs, block.output])

    def mlp(self) -> int:
        """Up's products, the activation and, where an adapter reads it, what down multiplies. A router
        keeps its probabilities, and what each expert gives, for the gradient of its weight."""
        read = self._inner if self.reads([self.block.down]) else 0
        if self._is_routed:
            kept = self._activated + self.block.down.out_features
            return self.block.copies * self.e * kept + FLOAT_BYTES * self.shape.num_experts
        return self.e * (self._activated + read) + self.low_rank([*self.block.up, self.block.down])

    def mlp_peak(self) -> int:
        """What down multiplied is gone; its gradient and those of its two factors are there. Routed, the
        sum over experts is in fp32: its gradient and that of what an expert gave."""
        gradients = 3 * self._inner * self.e
        if self._is_routed:
            hidden = self.block.down.out_features
            routed = hidden * (2 * FLOAT_BYTES + self.e)
            return self.mlp() + self.block.copies * max(gradients, routed)
        if self.shape.model_type in SPELLED_OUT_GELU:
            gradients += self._inner * self.e
        low = self.low_rank([*self.block.up, self.block.down])
        return self.e * self._activated + gradients + low

    def mask_peak(self) -> int:
        """The widest adapted linear's mask while it is hashed."""
        adapted = [linear.in_features for linear in self.block.linears if linear in self.targets]
        return HASH_TENSORS * INT_BYTES * max(adapted, default=0) if self.dropout else 0

    @property
    def _inner(self) -> int:
        return self.block.down.in_features

    @property
    def _is_routed(self) -> bool:
        return self.block.down.component == "experts"

    @property
    def _activated(self) -> int:
        """Numbers that the activation function keeps: its input, and both factors where it gates."""
        steps = 3 if self.shape.model_type in SPELLED_OUT_GELU else 0
        is_gated = self.block.up_width >= 2 * self._inner
        return self.block.up_width + self._inner * (steps + is_gated)
