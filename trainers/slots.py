"""One adapter of a pack: what it is asked to be, and its numbers in the store under PEFT's names."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from search_spaces import doctrine
from search_spaces.architecture import LinearShape
from search_spaces.variants import DORA, LORA_PLUS, PISSA, PLAIN, parts_of, scale, stored_rank
from trainers.store import AdapterStore, LayerSize
from trainers.targets import peft_prefixes

MAGNITUDE = "lora_magnitude_vector"
"""PEFT's name for a DoRA's magnitudes in a saved adapter."""


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """One adapter: what PEFT's LoraConfig would say of it.

    Args:
        lora_rank: R of A and B, >= 1; each expert's is divided by the experts that a token passes.
        lora_alpha: the product B A is scaled by lora_alpha / (the rank there), of rsLoRA by its root.
        linears: the adapted layers, from `ModelShape.resolve_target`.
        dropout: probability of dropping an input of A, in [0, 1).
        seed: of A's initialisation and of the dropout masks.
        variant: 'lora', or what of search_spaces.variants it is, joined by '+'.
    """

    lora_rank: int
    lora_alpha: float
    linears: tuple[LinearShape, ...]
    dropout: float = 0.0
    seed: int = 0
    variant: str = PLAIN

    def has(self, part: str) -> bool:
        """Whether the variant is, among others, this one."""
        return part in parts_of(self.variant)

    def scaling(self, size: LayerSize) -> float:
        """The factor on B A x in a layer."""
        return scale(self.lora_alpha, size.rank(self.lora_rank), self.variant)

    @property
    def held_rank(self) -> int:
        """R as it is held and saved: a PiSSA's start is subtracted by R frozen ranks beside its own."""
        return stored_rank(self.lora_rank, self.variant)

    @property
    def held_alpha(self) -> float:
        """lora_alpha that gives `scaling` at held_rank."""
        if self.held_rank == self.lora_rank:
            return self.lora_alpha
        return (
            self.lora_alpha
            * scale(1, self.lora_rank, self.variant)
            / scale(1, self.held_rank, self.variant)
        )


@dataclass
class Slot:
    """One trainable unit of a pack: an adapter, or (full.py) the whole model.

    Args:
        parameters: name -> weights; PEFT's own names for an adapter, the model's for full fine-tuning.
        gradients: name -> what `backward` of the pack's loss fills.
        moments: name -> AdamW's two moments.
        weights, grads, exp_avgs, exp_avg_sqs: the same numbers as the optimizer steps them: one
            contiguous row of an adapter (of some variants its trained matrices), or a tensor for each
            parameter.
        lr_factors: of the learning rate, for each of them.
        rows, grad_rows: all numbers of the slot, and all gradients, also those of what is not trained.
    """

    spec: AdapterSpec | None
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    weights: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    exp_avgs: list[torch.Tensor] = field(default_factory=list)
    exp_avg_sqs: list[torch.Tensor] = field(default_factory=list)
    lr_factors: list[float] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)
    grad_rows: list[torch.Tensor] = field(default_factory=list)

    def zero_grad(self) -> None:
        """Empties the gradients in place."""
        torch._foreach_zero_(self.grad_rows)


def adapter_views(
    store: AdapterStore, kind: int, slot: int, spec: AdapterSpec, layers: Sequence[str]
) -> dict[str, torch.Tensor]:
    """A slot's numbers of a kind under PEFT's names: A [R, I] and B [O, R] of each layer, of a DoRA its
    magnitudes [O]; of experts A [E, R, I] and B [E, R, O], which `experts.to_peft` brings into PEFT's order."""
    views: dict[str, torch.Tensor] = {}
    for name, prefix in peft_prefixes(layers).items():
        size = store.features[name]
        rank = size.rank(spec.held_rank)
        B = store.B_4SRO[name][kind, slot][..., :rank, :]
        views[f"{prefix}.lora_A.weight"] = store.A_4SRI[name][kind, slot][..., :rank, :]
        views[f"{prefix}.lora_B.weight"] = B if size.num_experts else B.T
        if spec.has(DORA):
            views[f"{prefix}.{MAGNITUDE}"] = store.m_4SO[name][kind, slot]
    return views


def stepped_parts(
    store: AdapterStore, kind: int, slot: int, spec: AdapterSpec, layers: Iterable[str]
) -> list[tuple[torch.Tensor, float]]:
    """A slot's trained numbers of a kind where not all of its row is trained alike, each with its factor on
    the learning rate: LoRA+'s B learns faster, and a PiSSA's second half is frozen. Each is contiguous."""
    trained = spec.lora_rank if spec.has(PISSA) else store.max_rank
    faster = doctrine.LORA_PLUS_RATIO.value if spec.has(LORA_PLUS) else 1.0
    parts: list[tuple[torch.Tensor, float]] = []
    for name in layers:
        A, B = store.A_4SRI[name][kind, slot], store.B_4SRO[name][kind, slot]
        if not store.features[name].num_experts:  # of experts no rank is frozen
            A, B = A[:trained], B[:trained]
        parts += [(A, 1.0), (B, faster)]
        parts += [(store.m_4SO[name][kind, slot], 1.0)] if spec.has(DORA) else []
    return parts


def derived_seed(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else (63 bits)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
