"""Which rows a step trains on, on which worker, and the tensors of a micro-batch.

Shape legend: n segments of h rows, B = n h rows, T positions, M loss-bearing positions (with padding).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from trainers.policy import PolicyTokens

if TYPE_CHECKING:
    from trainers.data.sequence_packing import PackedSet
    from trainers.data.token_set import TokenizedSet
    from trainers.episodes import Episodes

LOSS_BLOCK = 64
"""Loss-bearing positions of a block where the segments have very different numbers of them."""
GROUPED_BATCHES = 50
"""Batches that are sorted together where examples are grouped by length, as transformers does."""
KEPT_ORDERS = 4
MAX_PADDING = 1.1
"""Up to this many computed positions per loss-bearing one, segments are padded to the longest."""
IGNORED = -100


@dataclass(frozen=True)
class LossBlocks:
    """The loss-bearing positions of a batch in equal blocks, each of one segment.

    Args:
        index_M: where in the flattened [B T] hidden states each prediction is made; padding repeats
            a position of its own segment.
        targets_M: the token to predict, IGNORED for padding.
        segment_of_block: segment of each block; blocks have M / len(segment_of_block) positions.
    """

    index_M: torch.Tensor
    targets_M: torch.Tensor
    segment_of_block: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device.

    rows_B: which row of the set each is, -1 for padding. ids_BT: token ids, right-padded. No attention
    mask: the model is causal and padding stands to the right, so a real token never sees it, and
    the loss never reads a padded position. loss: None where no position is counted. positions_BT:
    where rows hold several examples, each token's position within its own, from which the model
    keeps them apart; else None. policy: in reinforcement learning what the objective weighs the positions by.
    """

    rows_B: torch.Tensor
    ids_BT: torch.Tensor
    loss: LossBlocks | None
    positions_BT: torch.Tensor | None = None
    policy: PolicyTokens | None = None


class RowSource:
    """A tokenized set, its packed sequences, or episodes (episodes.py) as micro-batches."""

    def __init__(
        self, rows: "TokenizedSet | PackedSet | Episodes", pad_id: int, device: torch.device
    ) -> None:
        self.rows, self.pad_id, self.device = rows, pad_id, device
        self.lengths = np.asarray(rows.lengths, dtype=np.int64)
        self.loss_tokens = np.asarray(rows.loss_token_counts, dtype=np.int64)
        # Every batch asks for its epoch's order, which for millions of rows takes a second.
        self._order = lru_cache(maxsize=KEPT_ORDERS)(self._fresh_order)

    def _fresh_order(self, seed: int, epoch: int, group: int | None) -> np.ndarray:
        if group is None:
            return epoch_order(len(self), seed, epoch)
        return grouped_epoch_order(self.lengths, seed, epoch, group)

    def order(self, seed: int, start: int, stop: int, group: int | None = None) -> np.ndarray:
        """Row numbers of the examples start..stop of a trial, counted over all epochs.

        Args: group: the global batch size, where its batches are to be of similar length.
        """
        return _between(len(self), start, stop, lambda epoch: self._order(seed, epoch, group))

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, segments: Sequence[np.ndarray], max_block: int = 1 << 30) -> Batch:
        """The rows of n adapters, one segment each, all padded to the longest row and to the largest
        segment; a padding row has no loss. max_block: most positions of a loss block."""
        height = max(1, *(len(segment) for segment in segments))
        width = max(2, *(int(self.lengths[s].max(initial=0)) for s in segments))
        ids = np.full((len(segments) * height, width), self.pad_id, dtype=np.int64)
        loss, rows = np.zeros(ids.shape, dtype=bool), np.full(len(ids), -1, dtype=np.int64)
        positions: np.ndarray | None = None
        for k, segment in enumerate(segments):
            for at, row in enumerate(segment, start=k * height):
                example = self.rows.example(int(row))
                rows[at] = row
                ids[at, : len(example.input_ids)] = example.input_ids
                loss[at, : len(example.loss_mask)] = example.loss_mask
                if (own := example.positions) is not None:
                    if positions is None:
                        # Padding goes on counting: it attends to its own row, and nothing to it.
                        positions = np.tile(np.arange(width), (len(ids), 1))
                    positions[at, : len(own)] = own
        return Batch(
            rows_B=self._on_device(rows),
            ids_BT=self._on_device(ids),
            loss=self._loss_blocks(ids, loss, height, max_block),
            positions_BT=None if positions is None else self._on_device(positions),
        )

    def _loss_blocks(
        self, ids: np.ndarray, loss: np.ndarray, height: int, max_block: int
    ) -> LossBlocks | None:
        # Position t - 1 predicts token t, which is never the first.
        flat = np.flatnonzero(loss)
        counts = np.bincount(flat // (height * ids.shape[1]), minlength=len(ids) // height)
        if not len(flat):
            return None
        index, targets, segment_of_block = [], [], []
        size = block_size(counts, max_block)
        for segment, part in enumerate(np.split(flat, np.cumsum(counts)[:-1])):
            blocks = -(-len(part) // size)
            padding = blocks * size - len(part)
            index += [part - 1, np.repeat(part[:1] - 1, padding)]
            targets += [ids.reshape(-1)[part], np.full(padding, IGNORED)]
            segment_of_block += [segment] * blocks
        return LossBlocks(
            index_M=self._on_device(np.concatenate(index)),
            targets_M=self._on_device(np.concatenate(targets)),
            segment_of_block=tuple(segment_of_block),
        )

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def block_size(counts: np.ndarray, max_block: int) -> int:
    """Positions of a loss block: an even part of the largest segment where that pads little."""
    largest = int(counts.max())
    even = -(-largest // -(-largest // max_block))
    padded = sum(-(-int(count) // even) * even for count in counts)
    return even if padded <= MAX_PADDING * counts.sum() else min(LOSS_BLOCK, even)


def _between(
    num_rows: int, start: int, stop: int, order: Callable[[int], np.ndarray]
) -> np.ndarray:
    epochs = range(start // num_rows, (stop - 1) // num_rows + 1)
    first = start - epochs[0] * num_rows
    return np.concatenate([order(epoch) for epoch in epochs])[first : first + stop - start]


def example_order(num_rows: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Row numbers of the examples start..stop of a trial that does not group by length."""
    return _between(num_rows, start, stop, lambda epoch: epoch_order(num_rows, seed, epoch))


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Row numbers of an epoch: a permutation, a function of (seed, epoch) alone, so that any position
    can be resumed."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def grouped_epoch_order(
    lengths: np.ndarray, seed: int, epoch: int, global_batch_size: int
) -> np.ndarray:
    """As `epoch_order`, with batches of rows of similar length: each part of the permutation,
    GROUPED_BATCHES batches long, is sorted by length and cut into batches, and the batches of the
    epoch come in random order. A batch that two epochs share stays whole."""
    rows = epoch_order(len(lengths), seed, epoch)
    first = -epoch * len(rows) % global_batch_size  # what the last epoch's last batch still takes
    last = len(rows) - (len(rows) - first) % global_batch_size if first < len(rows) else first
    part = GROUPED_BATCHES * global_batch_size
    sorted_parts = [
        piece[np.argsort(-lengths[piece], kind="stable")]
        for piece in np.split(rows[first:last], range(part, max(0, last - first), part))
    ]
    batches = np.concatenate(sorted_parts).reshape(-1, global_batch_size)
    shuffled = np.random.default_rng([seed, epoch, 1]).permutation(batches)
    return np.concatenate([rows[:first], shuffled.reshape(-1), rows[last:]])


@dataclass
class Share:
    """What one worker still has to do of a global batch: its rows, longest first.

    Sorting by length saves padding and changes no gradient but by rounding: the loss is a sum over
    the global batch. All workers have equal shares to within one row, and must cut them alike:
    lengths are those of world rank 0's share, which has the longest row at every place.
    """

    rows: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(
        cls, indices: np.ndarray, lengths: np.ndarray, world_rank: int, world_size: int
    ) -> "Share":
        by_length = indices[np.argsort(-lengths[indices], kind="stable")]
        return cls(by_length[world_rank::world_size], lengths[by_length[::world_size]])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def width(self) -> int:
        """Tokens of the longest row that is left."""
        return int(self.lengths[0])

    def take(self, num_rows: int) -> np.ndarray:
        """The longest rows that are left; they count as done."""
        taken, self.rows = self.rows[:num_rows], self.rows[num_rows:]
        self.lengths = self.lengths[num_rows:]
        return taken
