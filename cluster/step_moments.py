"""The moments of a step at which it may hold most, each with what it then holds beside base and adapters."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from cluster.activation_bytes import (
    FLOAT_BYTES,
    Block,
    LayerBytes,
    blocks,
    layer_bytes,
    norm_backward_bytes,
    norm_bytes,
)
from cluster.holding import BaseHolding, Forward
from cluster.nf4_bytes import NF4_BLOCK, is_quantizable, nf4_weight_bytes
from search_spaces.architecture import ModelShape
from search_spaces.linear_shape import LinearShape

DeviceType = Literal["cpu", "cuda"]
Moment = Literal[
    "forward", "loss", "final norm", "backward", "dropout mask", "gather", "all-reduce"
]

LOGIT_COPIES = 3
"""fp32 copies of a chunk's logits at the worst moment: log-softmax, its gradient, the logits' gradient."""
CHUNK_BYTES: dict[DeviceType, int] = {"cpu": 4 << 20, "cuda": 256 << 20}
"""fp32 logits of a chunk; trainers/head.py holds the same table, and a test compares them."""
ARRIVING_COPIES: dict[DeviceType, int] = {"cpu": 2, "cuda": 1}
"""Of a single weight while it is gathered. Measured: gloo's all-gather holds a flat copy of its output
(benchmarks/sharded_layers.py); NCCL writes where the weight will be."""
PREFETCH_PARAMS = 50_000_000
"""Parameters that DeepSpeed gathers ahead. Source: DeepSpeedZeRoOffload's default in 0.19."""


@dataclass(frozen=True, kw_only=True)
class Transient:
    """Bytes of one moment; the fields are those of `memory.StepBytes`."""

    gathered: int = 0
    reduce_buffer: int = 0
    activations: int = 0
    logits: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())


def step_moments(
    shape: ModelShape,
    holding: BaseHolding,
    forward: Forward,
    targets: Sequence[LinearShape],
    device_type: DeviceType,
) -> dict[Moment, Transient]:
    """Every moment of a forward and backward of one worker, with what it holds.

    Args:
        targets: the adapted linears, of all adapters together.
    """
    step = _Step(shape, holding, forward, targets, device_type)
    moments: dict[Moment, Transient] = {"loss": step.loss(), "forward": step.forward_of_a_layer()}
    if step.trains_layers:
        moments |= {"final norm": step.final_norm(), "backward": step.backward()}
    if forward.dropout:
        moments["dropout mask"] = step.dropout_mask()
    if holding.sharded:
        moments["gather"] = step.gather()
    return moments


def chunk_positions(shape: ModelShape, forward: Forward, device_type: DeviceType) -> int:
    """Loss-bearing positions whose logits are there at once: whole blocks of one segment each, equal
    segments taken (trainers/batches.py, block_size; trainers/head.py, _chunks)."""
    most = max(1, CHUNK_BYTES[device_type] // (FLOAT_BYTES * shape.vocab_size))
    segment = -(-forward.loss_tokens // forward.num_adapters)
    if not segment:
        return 0
    block = -(-segment // -(-segment // most))
    return min(forward.loss_tokens, max(1, most // block) * block)


def held_bytes(linear: LinearShape, holding: BaseHolding) -> int:
    """Bytes of one of a linear's matrices as a whole base holds it, NF4's constants apart."""
    if holding.holds_nf4 and is_quantizable(linear):
        return nf4_weight_bytes(linear) // linear.count
    return holding.compute_bytes * linear.in_features * linear.out_features


def layer_weight_bytes(block: Block, holding: BaseHolding, shape: ModelShape) -> int:
    """Bytes of the weights of one whole layer. Not counted: its norms and biases, a few kB."""
    return sum(
        held_bytes(linear, holding) * (shape.num_experts if linear.component == "experts" else 1)
        for linear in block.linears
    )


class _Step:
    def __init__(
        self,
        shape: ModelShape,
        holding: BaseHolding,
        forward: Forward,
        targets: Sequence[LinearShape],
        device_type: DeviceType,
    ) -> None:
        self.shape, self.holding, self.forward, self.targets = shape, holding, forward, targets
        self.device_type: DeviceType = device_type
        self.e = holding.compute_bytes
        self.layers = [
            (block, self._layer(block), count) for block, count in blocks(shape) if count
        ]
        self.hidden = forward.tokens * shape.hidden_size
        """Numbers of one hidden state of the forward."""
        linears = {linear for block, _, _ in self.layers for linear in block.linears}
        self.trains_layers = not linears.isdisjoint(targets)
        """Whether anything below the head is adapted: else no layer keeps anything."""
        self.final_norm_kept = forward.tokens * norm_bytes(shape, self.e) * self.trains_layers

    def _layer(self, block: Block) -> LayerBytes:
        return layer_bytes(
            block,
            self.shape,
            self.targets,
            compute_bytes=self.e,
            lora_rank=self.forward.lora_rank,
            dropout=self.forward.dropout,
            magnitudes=self.forward.magnitudes,
            packed_tokens=self.forward.row_tokens if self.forward.packed else 0,
        )

    def loss(self) -> Transient:
        """All layers are through; one chunk's logits are in their backward pass."""
        positions = chunk_positions(self.shape, self.forward, self.device_type)
        numbers = positions * self.shape.vocab_size
        heads = [linear for linear in self.targets if linear.component == "unembed"]
        logits = LOGIT_COPIES * FLOAT_BYTES * numbers
        # When an adapter of the head is reached, one copy in the compute type is left.
        reached = self.e * numbers + max((self._picked(head) for head in heads), default=0)
        logits += self.e * numbers if heads and self.forward.magnitudes else 0
        return Transient(
            gathered=self._head_bytes() if self.holding.sharded else 0,
            activations=self._kept_by_layers() + self._final() + self.final_norm_kept,
            logits=logits + 2 * positions * self.shape.hidden_size * self.e,
            workspace=max(0, reached - logits),
        )

    def forward_of_a_layer(self) -> Transient:
        """The last layer's own numbers in its forward pass: at most what it would keep for a backward pass."""
        own = max(layer.entry + layer.kept for _, layer, _ in self.layers)
        return Transient(
            gathered=self._gathered_in_backward(),
            activations=self._kept_by_layers() if self.holding.recomputes else 0,
            workspace=self.forward.tokens * own,
        )

    def final_norm(self) -> Transient:
        """The backward pass of the norm after the last layer."""
        return Transient(
            activations=self._kept_by_layers() + self._final() + self.final_norm_kept,
            workspace=self.forward.tokens * norm_backward_bytes(self.shape, self.e),
        )

    def backward(self) -> Transient:
        """The backward pass of the last layer: every other layer is still kept."""
        return max(
            (self._backward_of(block, layer) for block, layer, _ in self.layers),
            key=lambda transient: transient.total,
        )

    def dropout_mask(self) -> Transient:
        """The mask of the widest adapted linear of the last layer is being hashed."""
        tokens = self.forward.tokens
        extra = max(layer.recomputed for _, layer, _ in self.layers)
        extra = extra if self.holding.recomputes else 0
        return Transient(
            gathered=self._layer_weight_bytes() if self.holding.sharded else 0,
            activations=self._kept_by_layers() + tokens * extra + self._final(),
            workspace=tokens * max(layer.mask_peak for _, layer, _ in self.layers)
            + (self.e * self.hidden if self.holding.recomputes else 0),
        )

    def gather(self) -> Transient:
        """A layer's weights arrive: a flat buffer and what is copied out of it, and the next one's; or the
        head's."""
        layer = self._layer_weight_bytes()
        ahead = min(layer, PREFETCH_PARAMS * self.e + self._largest_weight_bytes())
        head = ARRIVING_COPIES[self.device_type] * self._head_bytes()
        return Transient(
            gathered=max(2 * layer + ahead, head),
            activations=self._kept_by_layers() + self._final(),
        )

    def _backward_of(self, block: Block, layer: LayerBytes) -> Transient:
        tokens, e = self.forward.tokens, self.e
        kept = self._kept_by_layers() + (
            tokens * layer.recomputed if self.holding.recomputes else 0
        )
        gradients = tokens * (layer.backward_peak - layer.kept)
        # While a weight is dequantized, one gradient of the MLP's width is not there yet.
        narrower = gradients - tokens * e * block.down.in_features * block.copies
        beside = max((self._beside(linear) for linear in block.linears), default=0)
        return Transient(
            gathered=self._gathered_in_backward(),
            activations=kept + self._final(),
            workspace=e * self.hidden + max(gradients, narrower + beside),
        )

    def _kept_by_layers(self) -> int:
        """What waits for the backward pass while no layer is being recomputed."""
        tokens = self.forward.tokens if self.trains_layers else 0
        if self.holding.recomputes:
            return tokens * sum(layer.entry * count for _, layer, count in self.layers)
        kept = sum((layer.entry_norm + layer.kept) * count for _, layer, count in self.layers)
        return tokens * (kept - self._not_kept_by_first())

    def _not_kept_by_first(self) -> int:
        """The first layer's input needs no gradient: its norm keeps nothing, nor does what no adapter
        touches before the first adapted linear."""
        block, layer, _ = self.layers[0]
        is_adapted = not set(self.targets).isdisjoint((*block.inputs, block.output))
        return layer.entry_norm + (0 if is_adapted else layer.attention + layer.entry_norm)

    def _final(self) -> int:
        """The decoder's output, and its loss-bearing rows with their gradients; packed rows' mask."""
        rows = 2 * self.forward.loss_tokens * self.shape.hidden_size
        mask = self.forward.tokens * self.forward.row_tokens if self.forward.packed else 0
        return self.e * (self.hidden + rows) + mask

    def _beside(self, linear: LinearShape) -> int:
        """Bytes that a linear's own backward pass needs for a moment: its weight dequantized (with its
        constants in fp32), and its adapters' matrices and gradients where they change type."""
        own = 0
        if self.holding.holds_nf4 and is_quantizable(linear):
            weights = linear.in_features * linear.out_features
            own = self.e * weights + 2 * FLOAT_BYTES * -(-weights // NF4_BLOCK)
        return own + (self._picked(linear) if linear in self.targets else 0)

    def _picked(self, linear: LinearShape) -> int:
        """The segments' A or B in the compute type, and their gradient in both types (lowrank.py)."""
        if self.e == FLOAT_BYTES:
            return 0
        widest = max(linear.in_features, linear.out_features)
        numbers = self.forward.num_adapters * self.forward.lora_rank * widest
        return numbers * (2 * self.e + FLOAT_BYTES)

    def _gathered_in_backward(self) -> int:
        if not self.holding.sharded:
            return 0
        layer = self._layer_weight_bytes()
        return layer + min(layer, PREFETCH_PARAMS * self.e + self._largest_weight_bytes())

    def _layer_weight_bytes(self) -> int:
        return max(
            layer_weight_bytes(block, self.holding, self.shape) for block, _, _ in self.layers
        )

    def _largest_weight_bytes(self) -> int:
        linears = [linear for block, _, _ in self.layers for linear in block.linears]
        return max(held_bytes(linear, self.holding) for linear in linears)

    def _head_bytes(self) -> int:
        return self.e * self.shape.vocab_size * self.shape.hidden_size
