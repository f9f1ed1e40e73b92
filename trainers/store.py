"""The memory of a pack's adapters: weights, gradients and AdamW moments of all slots in one tensor.

Shape legend: S slots, R largest lora_rank, I/O a layer's in/out features, P = sum of R (I + O).

A slot's weights are one row of P numbers, so its optimizer step, its gradient norm and its all-reduce
are one call each; a layer's A and B of all slots are strided views of the same memory, so a batched
product needs no copying. Adapters of lower rank leave the rest of their rows at zero: a zero row of A
meets a zero row of B, adds nothing, and gets a zero gradient.
"""

from collections.abc import Mapping

import torch

WEIGHT, GRAD, EXP_AVG, EXP_AVG_SQ = range(4)
"""What a row holds: first index of the memory."""

Features = tuple[int, int]
"""(in_features, out_features) of a layer."""


class AdapterStore:
    """Rows for S adapters of up to R ranks on a set of layers; grows, never shrinks."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.features: dict[str, Features] = {}
        self.num_slots = self.max_rank = 0
        self.memory_4SP = torch.zeros(4, 0, 0, dtype=dtype, device=device)
        self.A_4SRI: dict[str, torch.Tensor] = {}
        self.B_4SRO: dict[str, torch.Tensor] = {}

    def reserve(self, num_slots: int, max_rank: int, features: Mapping[str, Features]) -> bool:
        """Makes room for slots, ranks and layers, keeping what is there. True: the memory moved and
        every view of it must be taken again."""
        layers = dict(sorted((self.features | dict(features)).items()))
        wanted = (max(num_slots, self.num_slots), max(max_rank, self.max_rank), layers)
        if wanted == (self.num_slots, self.max_rank, self.features):
            return False
        old_A, old_B = dict(self.A_4SRI), dict(self.B_4SRO)
        slots, ranks = self.num_slots, self.max_rank
        self.num_slots, self.max_rank, self.features = wanted
        self._lay_out()
        for name in old_A:
            self.A_4SRI[name][:, :slots, :ranks] = old_A[name]
            self.B_4SRO[name][:, :slots, :ranks] = old_B[name]
        return True

    def _lay_out(self) -> None:
        per_rank = sum(i + o for i, o in self.features.values())
        shape = (4, self.num_slots, self.max_rank * per_rank)
        self.memory_4SP = torch.zeros(shape, dtype=self.dtype, device=self.device)
        offset = 0
        for name, sizes in self.features.items():
            for views, size in zip((self.A_4SRI, self.B_4SRO), sizes, strict=True):
                part = self.memory_4SP[:, :, offset : offset + self.max_rank * size]
                views[name] = part.view(4, self.num_slots, self.max_rank, size)
                offset += self.max_rank * size

    def row(self, kind: int, slot: int) -> torch.Tensor:
        """All numbers of a kind of one slot, contiguous, [P]."""
        return self.memory_4SP[kind, slot]

    def clear(self, slot: int) -> None:
        """Zeroes everything of a slot."""
        self.memory_4SP[:, slot].zero_()

    @staticmethod
    def bytes_per_slot(lora_rank: int, features: Mapping[str, Features], item_bytes: int) -> int:
        """Bytes of one slot: weights, gradients and two moments."""
        return 4 * item_bytes * lora_rank * sum(i + o for i, o in features.values())
