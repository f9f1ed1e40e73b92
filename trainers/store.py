"""The memory of a pack's adapters: weights, gradients and AdamW moments of all slots in one tensor.

Shape legend: S slots, R largest lora_rank, I/O a layer's in/out features, E experts of a layer, P = sum of
R (I + O). The matrices of E experts lie together, [S, E, R, I], at their own, smaller rank.

A slot's weights are one row of P numbers, so its optimizer step, its gradient norm and its all-reduce
are one call each; a layer's A and B of all slots are strided views of the same memory, so a batched
product needs no copying. Adapters of lower rank leave the rest of their rows at zero: a zero row of A
meets a zero row of B, adds nothing, and gets a zero gradient.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from search_spaces.doctrine import expert_rank

WEIGHT, GRAD, EXP_AVG, EXP_AVG_SQ = range(4)
"""What a row holds: first index of the memory."""


class LayerSize(NamedTuple):
    """A layer's features; of fused experts with their number and that of those that a token passes."""

    num_in: int
    num_out: int
    num_experts: int = 0
    num_active: int = 0

    def rank(self, lora_rank: int) -> int:
        """The rank that an adapter of a nominal rank has here."""
        return expert_rank(lora_rank, self.num_active) if self.num_experts else lora_rank

    def num_params(self, lora_rank: int) -> int:
        """Of an adapter of a nominal rank."""
        return self.rank(lora_rank) * (self.num_in + self.num_out) * max(1, self.num_experts)

    def shape(self, lora_rank: int, features: int) -> tuple[int, ...]:
        """Of A (or B transposed) of one adapter: [R, I], of experts [E, R, I]."""
        experts = (self.num_experts,) if self.num_experts else ()
        return (*experts, self.rank(lora_rank), features)


class AdapterStore:
    """Rows for S adapters of up to R ranks on a set of layers; grows, never shrinks."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.features: dict[str, LayerSize] = {}
        self.num_slots = self.max_rank = 0
        self.has_magnitudes = False
        self.memory_4SP = torch.zeros(4, 0, 0, dtype=dtype, device=device)
        self.A_4SRI: dict[str, torch.Tensor] = {}
        self.B_4SRO: dict[str, torch.Tensor] = {}
        self.m_4SO: dict[str, torch.Tensor] = {}

    def reserve(
        self,
        num_slots: int,
        max_rank: int,
        features: Mapping[str, LayerSize],
        *,
        magnitudes: bool = False,
    ) -> bool:
        """Makes room for slots, ranks and layers (and a DoRA's magnitudes), keeping what is there, and all of it
        where there is no memory for more. True: the memory moved and every view of it must be taken again."""
        layers = dict(sorted((self.features | dict(features)).items()))
        wanted = (
            max(num_slots, self.num_slots),
            max(max_rank, self.max_rank),
            layers,
            magnitudes or self.has_magnitudes,
        )
        if wanted == (self.num_slots, self.max_rank, self.features, self.has_magnitudes):
            return False
        old_A, old_B, old_m = dict(self.A_4SRI), dict(self.B_4SRO), dict(self.m_4SO)
        slots = self.num_slots
        before = self.num_slots, self.max_rank, self.features, self.has_magnitudes
        self.num_slots, self.max_rank, self.features, self.has_magnitudes = wanted
        try:
            self._lay_out()
        except (RuntimeError, MemoryError):  # no room: everything stays as it was
            self.num_slots, self.max_rank, self.features, self.has_magnitudes = before
            raise
        for name in old_m:
            self.m_4SO[name][:, :slots] = old_m[name]
        for name in old_A:
            ranks = old_A[name].shape[-2]
            self.A_4SRI[name][:, :slots, ..., :ranks, :] = old_A[name]
            self.B_4SRO[name][:, :slots, ..., :ranks, :] = old_B[name]
        return True

    def _lay_out(self) -> None:
        count = sum(size.num_params(self.max_rank) for size in self.features.values())
        count += sum(size.num_out for size in self.features.values()) * self.has_magnitudes
        memory = torch.zeros(4, self.num_slots, count, dtype=self.dtype, device=self.device)
        self.memory_4SP, offset = memory, 0
        for name, size in self.features.items():
            for views, width in ((self.A_4SRI, size.num_in), (self.B_4SRO, size.num_out)):
                shape = size.shape(self.max_rank, width)
                part = memory[:, :, offset : offset + math.prod(shape)]
                views[name] = part.view(4, self.num_slots, *shape)
                offset += math.prod(shape)
            if self.has_magnitudes:
                self.m_4SO[name] = memory[:, :, offset : offset + size.num_out]
                offset += size.num_out

    def row(self, kind: int, slot: int) -> torch.Tensor:
        """All numbers of a kind of one slot, contiguous, [P]."""
        return self.memory_4SP[kind, slot]

    def clear(self, slot: int) -> None:
        """Zeroes everything of a slot."""
        self.memory_4SP[:, slot].zero_()

    @staticmethod
    def bytes_per_slot(lora_rank: int, features: Mapping[str, LayerSize], item_bytes: int) -> int:
        """Bytes of one slot: weights, gradients and two moments."""
        return 4 * item_bytes * sum(size.num_params(lora_rank) for size in features.values())
