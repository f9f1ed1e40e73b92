"""Adapters on fused experts: 3-D parameters, one matrix for each expert, of which a token passes a few.

Shape legend: M tokens of the batch, n segments of it, N tokens of a segment that pass an expert (padded to
the most), H/I/O features, E experts.

On disk they are what PEFT calls `target_parameters`, with its rank per expert set by `rank_pattern`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from trainers.lowrank import LowRankAdded, Matrices, Segments
from trainers.store import LayerSize

PARAMETERS = ("gate_up_proj", "down_proj")
"""Fused parameters in the order in which PEFT wraps them: the first is wrapped innermost."""


class Context(Protocol):
    """What an adapted layer must know of the micro-step (adapters.PackContext)."""

    segments: Segments | None


@dataclass(eq=False)
class ExpertMatrix:
    """One fused parameter with the low-rank products of the slots that target it; in a pack's `layers`
    under the parameter's full name, beside the adapted Linear layers."""

    base: Any
    """The frozen experts."""
    parameter: str
    size: LayerSize
    hit: set[int] = field(default_factory=set)
    dropout_keys: dict[int, int] = field(default_factory=dict)
    matrices: Matrices | None = None
    dropout_keys_S: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The frozen parameter, [E, O, I] or (`is_transposed`) [E, I, O]."""
        return getattr(self.base, self.parameter)

    @property
    def is_transposed(self) -> bool:
        return bool(self.base.is_transposed)

    def added(
        self, out: torch.Tensor, x: torch.Tensor, expert: int, segments: Segments
    ) -> torch.Tensor:
        """An expert's products, with those of the adapters, [n, N, O]."""
        if self.matrices is None or self.hit.isdisjoint(segments.slots):
            return out
        A, B, grad_A, grad_B, scaling_S = self.matrices
        of_expert = (A[:, expert], B[:, expert], grad_A[:, expert], grad_B[:, expert])
        own = Matrices(*of_expert, scaling_S)
        return LowRankAdded.apply(x, out, segments.anchor, own, segments, None)


class AdaptedExperts(nn.Module):
    """A layer's frozen experts with adapters. Each expert computes the tokens that are routed to it, as
    transformers' own plain implementation does."""

    def __init__(self, base: nn.Module, ctx: Context) -> None:
        super().__init__()
        self.base: Any = base
        self.ctx = ctx
        self.sites: dict[str, ExpertMatrix] = {}

    def forward(
        self, hidden_MH: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        segments = self.ctx.segments
        hit = set().union(*(site.hit for site in self.sites.values()))
        if segments is None or hit.isdisjoint(segments.slots):
            return self.base(hidden_MH, top_k_index, top_k_weights)
        out_MH = torch.zeros_like(hidden_MH)
        per_segment = len(hidden_MH) // len(segments.slots)
        for expert, tokens, choices in _routed(top_k_index, self.base.num_experts):
            place = _places(tokens, per_segment, len(segments.slots))
            x_nNH = hidden_MH.new_zeros(len(segments.slots), place.most, hidden_MH.shape[-1])
            x_nNH = x_nNH.index_put((place.segment, place.position), hidden_MH[tokens])
            given = self._expert(expert, x_nNH, segments)[place.segment, place.position]
            weighted = given * top_k_weights[tokens, choices, None]
            out_MH = out_MH.index_add(0, tokens, weighted.to(out_MH.dtype))
        return out_MH

    def _expert(self, expert: int, x: torch.Tensor, segments: Segments) -> torch.Tensor:
        gate_up = self._product("gate_up_proj", expert, x, segments)
        return self._product("down_proj", expert, self.base._apply_gate(gate_up), segments)

    def _product(
        self, parameter: str, expert: int, x: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        weight = getattr(self.base, parameter)[expert]
        bias = getattr(self.base, f"{parameter}_bias")[expert] if self.base.has_bias else None
        out = F.linear(x, weight.T if self.base.is_transposed else weight, bias)
        site = self.sites.get(parameter)
        return out if site is None else site.added(out, x, expert, segments)


@dataclass(frozen=True)
class _Place:
    """Where an expert's tokens stand when each segment's stand in a row of their own."""

    segment: torch.Tensor
    position: torch.Tensor
    most: int


def _routed(
    top_k_index: torch.Tensor, num_experts: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(expert, its tokens in their order, which of a token's choices it is), of the experts that have any."""
    for expert in top_k_index.unique().tolist():
        if expert < num_experts:
            tokens, choices = torch.where(top_k_index == expert)
            yield expert, tokens, choices


def _places(tokens: torch.Tensor, per_segment: int, num_segments: int) -> _Place:
    segment = tokens // per_segment
    counts = segment.bincount(minlength=num_segments)
    first = counts.cumsum(0) - counts
    position = torch.arange(len(tokens), device=tokens.device) - first[segment]
    return _Place(segment, position, int(counts.max()))


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts of the kind that is adapted here."""
    found = [getattr(module, name, None) for name in PARAMETERS]
    return all(isinstance(p, nn.Parameter) and _ndim(p) == 3 for p in found)


def parameter_suffix(name: str) -> str:
    """experts.gate_up_proj of a fused parameter's full name."""
    return ".".join(name.split(".")[-2:])


def _ndim(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # a sharded one is empty


def expert_size(module: nn.Module, parameter: str, num_active: int) -> LayerSize:
    """The size of an expert's matrix.

    Raises:
        ValueError: experts that compute otherwise than those known here.
    """
    base: Any = module
    known = getattr(base, "has_gate", False) and not getattr(base, "has_post_expert_norm", False)
    if not known or num_active < 1:
        raise ValueError(
            f"{type(module).__name__}: experts must have a gate, no norm of their own, and a config with "
            "num_experts_per_tok; others cannot be trained by this version, leave experts out of target"
        )
    weight = getattr(base, parameter)
    experts, rows, columns = getattr(weight, "ds_shape", weight.shape)
    num_in, num_out = (rows, columns) if base.is_transposed else (columns, rows)
    return LayerSize(num_in, num_out, experts, num_active)


def num_active_experts(model: nn.Module) -> int:
    """Experts that a token passes; 0 where the model has none."""
    if not isinstance(model, PreTrainedModel):
        return 0
    return int(getattr(model.config.get_text_config(), "num_experts_per_tok", 0) or 0)


def to_peft(name: str, view: torch.Tensor) -> torch.Tensor:
    """A slot's tensor as it is on disk, an adapter's as PEFT has it: A [R, I] and B [O, R]; of experts A
    [E R, I], expert by expert, and B [O, R E], rank by rank (peft.tuners.lora.layer.ParamWrapper)."""
    if not _is_fused(name, view.shape):
        return view.contiguous()
    if ".lora_A." in name:
        return view.reshape(-1, view.shape[-1]).contiguous()
    return view.permute(2, 1, 0).reshape(view.shape[-1], -1).contiguous()


def from_peft(name: str, saved: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `to_peft`, for a view of a shape."""
    if not _is_fused(name, shape):
        return saved
    experts, rank, width = shape
    if ".lora_A." in name:
        return saved.view(shape)
    return saved.view(width, rank, experts).permute(2, 1, 0)


def peft_shape(name: str, shape: torch.Size) -> tuple[int, ...]:
    """Of a slot's tensor on disk."""
    if not _is_fused(name, shape):
        return tuple(shape)
    experts, rank, width = shape
    return (experts * rank, width) if ".lora_A." in name else (width, rank * experts)


def _is_fused(name: str, shape: torch.Size) -> bool:
    return len(shape) == 3 and ".lora_" in name  # a model that is trained whole has 3-D weights too
