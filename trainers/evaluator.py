"""Losses on rows that are not trained on: held-out rows, and those of the retention set."""

import math
from copy import copy

import numpy as np
import torch

from trainers.adapters import Pack
from trainers.batches import RowSource, Share
from trainers.comm import Comm
from trainers.composer import ForwardLimits
from trainers.head import LossHead
from trainers.out_of_memory import (
    Shortage,
    give_back,
    halved,
    require_room,
    shortage_in,
)


class Evaluator:
    """Evaluates the slots of a pack, and its base."""

    def __init__(self, pack: Pack, head: LossHead, comm: Comm) -> None:
        self.pack, self.head, self.comm = pack, head, comm
        self._max_tokens: int | None = None
        """Where a forward had no room, on this worker alone: evaluations share nothing but their sums."""

    def losses(
        self, slot: int | None, rows: RowSource, limits: ForwardLimits
    ) -> tuple[float, float]:
        """Loss of a slot, or of the base, on a set: nats/token and bits/byte, over all loss-bearing tokens.

        Raises:
            NoRoomError: a single row does not fit; on all workers alike.
        """
        total = self.nats(slot, rows, limits)
        tokens, num_bytes = int(rows.loss_tokens.sum()), rows.rows.num_loss_bytes
        return total / tokens, total / math.log(2) / num_bytes

    def nats(self, slot: int | None, rows: RowSource, limits: ForwardLimits) -> float:
        """Nats of a slot, or of the base, over all loss-bearing tokens of a set. The same errors."""
        # All workers run as many forwards, the last with a row less: of a sharded base they need it.
        everything, comm = np.arange(len(rows)), self.comm
        share = Share.of(everything, rows.lengths, comm.world_rank, comm.world_size)
        nats = torch.zeros((), dtype=torch.float64, device=rows.device)
        shortage = None
        while len(share) and shortage is None:
            before, width = copy(share), share.width
            part = share.take(self._own(limits).rows(width))
            found = self._add_nats(slot, rows, part, nats)
            if found is None:
                continue
            give_back()
            self._max_tokens = halved(self._own(limits), [found]).max_tokens
            share, shortage = before, found if found.is_single else None
        require_room(shortage, comm, rows.device)
        return float(comm.sum(nats))

    def _own(self, limits: ForwardLimits) -> ForwardLimits:
        if self._max_tokens is None or self._max_tokens >= limits.max_tokens:
            return limits
        return ForwardLimits(max_tokens=self._max_tokens, micro_batch_size=limits.micro_batch_size)

    def _add_nats(
        self, slot: int | None, rows: RowSource, part: np.ndarray, nats: torch.Tensor
    ) -> Shortage | None:
        def add() -> None:
            nats.add_(self.head.eval_nats(rows.batch([part], self.head.max_positions), slot))

        return shortage_in(add, [part], rows.lengths, waited_for=self.pack.sharding is not None)
