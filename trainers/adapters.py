"""LoRA adapters of a pack: K adapters on one frozen base, one forward for all of them.

Adapters enter and leave a running pack. Their numbers live in an AdapterStore; an adapted layer does one
batched product for all segments of the batch (lowrank.py), whatever their number.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from search_spaces.variants import (
    DORA,
    LORA_PLUS,
    ON_EXPERTS,
    PISSA,
    WHOLE_WEIGHTS,
    parts_of,
)
from trainers.dora import Magnitudes, Scaled, adapted_norms, dense_weight, row_norms
from trainers.dropout import DropoutTokens, keep_mask
from trainers.experts import (
    AdaptedExperts,
    ExpertMatrix,
    expert_size,
    num_active_experts,
)
from trainers.lowrank import (
    AdaptedLinear,
    LowRankAdded,
    Matrices,
    Segments,
    make_segments,
)
from trainers.pissa import principal
from trainers.sharding import Sharding, is_sharded
from trainers.slots import AdapterSpec, Slot, adapter_views, derived_seed, stepped_parts
from trainers.store import EXP_AVG, EXP_AVG_SQ, GRAD, WEIGHT, AdapterStore, LayerSize
from trainers.targets import layer_size, matching_layers, module_of


@dataclass
class PackContext:
    """What every adapted layer must know of the current micro-step."""

    segments: Segments | None = None
    """Whose rows the batch holds; None: the base alone."""
    dropout: DropoutTokens | None = None
    """The batch's tokens, for dropout; None: no dropout (evaluation, or no adapter has any)."""
    weights_version: int = 0
    """Counts up where adapters' weights may have changed, so that a DoRA's norms are taken anew."""


class AdaptedLayer(nn.Module):
    """A frozen layer plus the low-rank products of the slots that target it."""

    def __init__(self, base: nn.Module, name: str, ctx: PackContext) -> None:
        super().__init__()
        self.base, self.layer_name, self.ctx = base, name, ctx
        self.size = layer_size(base)
        self.hit: set[int] = set()
        """Slots that adapt this layer."""
        self.dropout_keys: dict[int, int] = {}
        self.matrices: Matrices | None = None
        self.dropout_keys_S = torch.zeros(0, dtype=torch.int64)
        self.magnitudes: Magnitudes | None = None
        self.doras: dict[int, tuple[int, float]] = {}
        """Rank and scale of each slot that is a DoRA here."""
        self.norms_O: torch.Tensor | None = None
        """|W| by rows, once a DoRA came."""
        self._norms: dict[int, tuple[int, torch.Tensor]] = {}

    @property
    def weight(self) -> torch.Tensor:
        """The frozen layer's weight: model code reads it here and there."""
        return self.base.weight  # pyright: ignore[reportReturnType]

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is [I, O], as Conv1D has it."""
        return isinstance(self.base, Conv1D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        segments = self.ctx.segments
        if segments is None or self.hit.isdisjoint(segments.slots):
            return self.base(x)
        keep = self._keep_mask(x, segments)
        if type(self.base) in PLAIN_LINEARS:
            weight, bias = self.base.weight, self.base.bias
            out = AdaptedLinear.apply(
                x, weight, bias, segments.anchor, self.matrices, segments, keep
            )
        else:
            out = LowRankAdded.apply(
                x, self.base(x), segments.anchor, self.matrices, segments, keep
            )
        return out if self.doras.keys().isdisjoint(segments.slots) else self._scaled(out, segments)

    def _scaled(self, out: torch.Tensor, segments: Segments) -> torch.Tensor:
        """The output under the magnitudes of those segments that are DoRAs."""
        assert self.magnitudes is not None
        m_SO, plain = self.magnitudes.m_SO, torch.ones_like(self.magnitudes.m_SO[0])
        gains, per_norm = [], []
        for slot in segments.slots:
            is_dora = slot in self.doras
            per_norm.append(1 / self._norms_of(slot) if is_dora else torch.zeros_like(plain))
            gains.append(m_SO[slot] * per_norm[-1] - 1 if is_dora else torch.zeros_like(plain))
        bias = getattr(self.base, "bias", None)
        return Scaled.apply(
            out,
            bias,
            torch.stack(gains),
            torch.stack(per_norm),
            self.magnitudes,
            segments.index,
        )

    def _norms_of(self, slot: int) -> torch.Tensor:
        """|W + s B A| by rows of a slot; the same for all chunks of a forward."""
        assert self.matrices is not None
        assert self.norms_O is not None
        version, norms = self._norms.get(slot, (-1, self.norms_O))
        if version != self.ctx.weights_version:
            rank, scaling = self.doras[slot]
            A, B = self.matrices.A_SRI[slot, :rank], self.matrices.B_SRO[slot, :rank]
            norms = adapted_norms(self.base, self.norms_O, A, B, scaling)
            self._norms[slot] = (self.ctx.weights_version, norms)
        return norms

    def _keep_mask(self, x: torch.Tensor, segments: Segments) -> torch.Tensor | None:
        """The dropout mask over x, divided by what it keeps, [n, N, I]."""
        tokens = self.ctx.dropout
        if tokens is None:
            return None
        count = len(segments.slots)
        keys_n = self.dropout_keys_S[segments.index]
        keys_M = keys_n.repeat_interleave(len(tokens.keys_M) // count)
        kept_MI = keep_mask(tokens, keys_M, x.shape[-1])
        scaled = kept_MI / (1 - tokens.rates_M.double())[:, None]
        return scaled.to(x.dtype).view(count, -1, x.shape[-1])


PLAIN_LINEARS: set[type] = {nn.Linear}
"""Layers whose product is x W^T + b with W as it is stored (base_model.py adds its own)."""


class Pack:
    """A base with its slots. `model(...)` computes what `ctx.segments` says. Of a sharded base (sharding.py)
    every worker of the group makes its pack, and all of them run the same forwards."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.ctx = model, PackContext()
        self.sharding = Sharding(model) if is_sharded(model) else None
        self.device = model.device
        self.slots: dict[int, Slot] = {}
        self.layers: dict[str, AdaptedLayer | ExpertMatrix] = {}
        first = next(p for p in model.parameters() if p.is_floating_point())
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.store = AdapterStore(dtype, self.device)
        self._anchor = torch.zeros((), device=self.device, requires_grad=True)

    def enter(self, spec: AdapterSpec) -> int:
        """Puts a new adapter into the first free slot and returns the slot's index.

        Every layer that the spec asks for must be there in every layer of the model, with the sizes
        that the ModelShape says; otherwise the pack stays as it is.

        Raises:
            ValueError: a target that matches fewer or other layers than its ModelShape says, experts
                that compute otherwise than those known (experts.py), or a variant that they or a
                sharded base cannot have.
        """
        names = matching_layers(self.model, spec.linears)
        self._require_variant(spec, names)
        index = next(i for i in range(len(self.slots) + 1) if i not in self.slots)
        self.reserve(index + 1, spec.held_rank, names, magnitudes=spec.has(DORA))
        slot = self.slots[index] = Slot(spec=spec)
        for name in names:
            layer = self.layers[name]
            layer.hit.add(index)
            layer.dropout_keys[index] = derived_seed(spec.seed, "dropout", name)
            if spec.has(DORA) and isinstance(layer, AdaptedLayer):
                layer.doras[index] = spec.held_rank, spec.scaling(layer.size)
        self._bind_slot(index, slot)
        self._bind_layers()
        self._initialise(index, spec)
        self.ctx.weights_version += 1
        return index

    def _require_variant(self, spec: AdapterSpec, sizes: Mapping[str, LayerSize]) -> None:
        parts = parts_of(spec.variant)
        if not parts <= ON_EXPERTS and any(size.num_experts for size in sizes.values()):
            raise ValueError(
                f"variant {spec.variant} cannot be trained on fused experts; leave experts out of target"
            )
        if self.sharding is not None and parts & WHOLE_WEIGHTS:
            raise ValueError(
                f"variant {spec.variant} needs whole weights on each worker, got a sharded base; set strategy: "
                "ddp or single, or variant: lora"
            )

    def leave(self, index: int) -> None:
        """Frees a slot; nothing of the adapter stays."""
        del self.slots[index]
        for layer in self.layers.values():
            layer.hit.discard(index)
            layer.dropout_keys.pop(index, None)
            if isinstance(layer, AdaptedLayer):
                layer.doras.pop(index, None)
        self.store.clear(index)

    def reserve(
        self, num_slots: int, max_rank: int, layers: Iterable[str], *, magnitudes: bool = False
    ) -> None:
        """Makes room beforehand, so that adapters enter without moving memory."""
        features = {}
        for name in layers:
            if name not in self.layers:
                self.layers[name] = self._adapted(name)
            features[name] = self.layers[name].size
        if self.store.reserve(num_slots, max_rank, features, magnitudes=magnitudes):
            for index, slot in self.slots.items():
                self._bind_slot(index, slot)
            self._bind_layers()

    def _adapted(self, name: str) -> "AdaptedLayer | ExpertMatrix":
        """A layer put in the place of a frozen one, or beside the other of the same experts."""
        module, parameter = module_of(self.model, name)
        if not parameter:
            layer = AdaptedLayer(module, name, self.ctx)
            self.model.set_submodule(name, layer)
            return layer
        if not isinstance(module, AdaptedExperts):
            module = AdaptedExperts(module, self.ctx)
            self.model.set_submodule(name.removesuffix(f".{parameter}"), module)
        size = expert_size(module.base, parameter, num_active_experts(self.model))
        site = module.sites[parameter] = ExpertMatrix(module.base, parameter, size)
        return site

    def activate(
        self,
        slots: Sequence[int],
        dropout: DropoutTokens | None = None,
        *,
        same_weights: bool = False,
    ) -> None:
        """Says whose rows come next: equal segments, slot by slot. Empty: the base alone.

        Args:
            same_weights: no adapter has changed since the last call.
        """
        self.ctx.weights_version += not same_weights
        ranks = [spec.held_rank for i in slots if (spec := self.slots[i].spec)]
        self.ctx.segments = (
            make_segments(tuple(slots), max(ranks), self._anchor, self.device) if ranks else None
        )
        self.ctx.dropout = dropout

    def eject(self) -> None:
        """Takes the adapters off again; the base is what it was."""
        if self.sharding is not None:
            self.sharding.close()
        for name, module in list(self.model.named_modules()):
            if isinstance(module, AdaptedLayer | AdaptedExperts):
                self.model.set_submodule(name, module.base)
        self.slots.clear()
        self.layers.clear()

    def _bind_slot(self, index: int, slot: Slot) -> None:
        """Takes the slot's views of the store."""
        assert slot.spec is not None
        names = [name for name, layer in self.layers.items() if index in layer.hit]
        kinds = (WEIGHT, GRAD, EXP_AVG, EXP_AVG_SQ)
        views = [adapter_views(self.store, kind, index, slot.spec, names) for kind in kinds]
        slot.parameters, slot.gradients = views[0], views[1]
        slot.moments = {name: (views[2][name], views[3][name]) for name in views[2]}
        rows = [[self.store.row(kind, index)] for kind in kinds]
        slot.rows, slot.grad_rows = rows[0], rows[1]
        factors = [1.0]
        if slot.spec.has(LORA_PLUS) or slot.spec.has(PISSA):
            steps = [stepped_parts(self.store, kind, index, slot.spec, names) for kind in kinds]
            rows, factors = (
                [[part for part, _ in found] for found in steps],
                [f for _, f in steps[0]],
            )
        slot.weights, slot.grads, slot.exp_avgs, slot.exp_avg_sqs = rows
        slot.lr_factors = factors

    def _bind_layers(self) -> None:
        """Gives the layers their views of the store."""
        count, store = self.store.num_slots, self.store
        specs = [slot.spec if (slot := self.slots.get(i)) else None for i in range(count)]
        for name, layer in self.layers.items():
            if name not in store.A_4SRI:
                continue
            A, B = store.A_4SRI[name], store.B_4SRO[name]
            hit = [
                spec.scaling(layer.size) if spec and i in layer.hit else 0.0
                for i, spec in enumerate(specs)
            ]
            scaling_S = torch.tensor(hit, dtype=store.dtype, device=self.device)
            layer.matrices = Matrices(A[WEIGHT], B[WEIGHT], A[GRAD], B[GRAD], scaling_S)
            if isinstance(layer, AdaptedLayer) and name in store.m_4SO:
                layer.magnitudes = Magnitudes(store.m_4SO[name][WEIGHT], store.m_4SO[name][GRAD])
            keys = [layer.dropout_keys.get(i, 0) for i in range(count)]
            layer.dropout_keys_S = torch.tensor(keys, dtype=torch.int64, device=self.device)

    def _initialise(self, index: int, spec: AdapterSpec) -> None:
        # U(+-1/sqrt(d_in)) is PEFT's kaiming_uniform(a=sqrt(5)) and the doctrine's A. The generator is
        # the adapter's and the layer's own, so neighbours, K and the order of layers change nothing.
        for name, layer in self.layers.items():
            if index in layer.hit:
                ranks = layer.size.rank(spec.lora_rank)
                view = self.store.A_4SRI[name][WEIGHT, index][..., :ranks, :]
                bound = 1 / math.sqrt(view.shape[-1])
                values = torch.empty(view.shape, dtype=view.dtype)
                generator = torch.Generator().manual_seed(derived_seed(spec.seed, "init", name))
                view.copy_(values.uniform_(-bound, bound, generator=generator))
                if isinstance(layer, AdaptedLayer):
                    self._start_variant(index, spec, name, layer)

    def _start_variant(self, index: int, spec: AdapterSpec, name: str, layer: AdaptedLayer) -> None:
        """What a DoRA or a PiSSA begins with in a layer, beside or instead of A."""
        if spec.has(DORA):
            if layer.norms_O is None:
                layer.norms_O = row_norms(layer.base).to(self.store.dtype)
            self.store.m_4SO[name][WEIGHT, index] = layer.norms_O
        if spec.has(PISSA):
            seed = derived_seed(spec.seed, "pissa", name)
            A, B = principal(
                dense_weight(layer.base), spec.lora_rank, spec.scaling(layer.size), seed
            )
            for first, sign in ((0, 1), (spec.lora_rank, -1)):
                ranks = slice(first, first + len(A))
                self.store.A_4SRI[name][WEIGHT, index, ranks] = A
                self.store.B_4SRO[name][WEIGHT, index, ranks] = sign * B


def inject(model: PreTrainedModel, specs: Sequence[AdapterSpec]) -> Pack:
    """A pack of K adapters on a frozen base, all of them active.

    Raises:
        ValueError: as `Pack.enter`; nothing is injected.
    """
    names = {name for spec in specs for name in matching_layers(model, spec.linears)}
    pack = Pack(model)
    magnitudes = any(spec.has(DORA) for spec in specs)
    pack.reserve(len(specs), max(spec.held_rank for spec in specs), names, magnitudes=magnitudes)
    pack.activate([pack.enter(spec) for spec in specs])
    return pack
