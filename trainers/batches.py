"""Which rows a step trains on, on which worker, and the tensors of a micro-batch.

Shape legend: B rows, T positions, K adapters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from trainers.data import TokenizedSet


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device.

    rows_B: which row of the set each is, -1 for padding. ids_BT: token ids, right-padded. loss_BT:
    whether position t's token is predicted and counted (never at t = 0). No attention mask: the
    model is causal and padding stands to the right, so a real token never sees it, and the loss
    never reads a padded position.
    """

    rows_B: torch.Tensor
    ids_BT: torch.Tensor
    loss_BT: torch.Tensor


class RowSource:
    """A tokenized set as micro-batches."""

    def __init__(self, rows: "TokenizedSet", pad_id: int, device: torch.device) -> None:
        self.rows, self.pad_id, self.device = rows, pad_id, device
        self.lengths = np.asarray(rows.lengths, dtype=np.int64)
        self.loss_tokens = np.asarray(rows.loss_token_counts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, segments: Sequence[np.ndarray]) -> Batch:
        """The rows of K adapters, one segment each, all padded to the longest row and to the
        largest segment; a padding row has one position and no loss."""
        height = max(1, *(len(segment) for segment in segments))
        width = max(2, *(int(self.lengths[s].max(initial=0)) for s in segments))
        ids = np.full((len(segments) * height, width), self.pad_id, dtype=np.int64)
        loss, rows = np.zeros(ids.shape, dtype=bool), np.full(len(ids), -1, dtype=np.int64)
        for k, segment in enumerate(segments):
            for offset, row in enumerate(segment):
                example = self.rows.example(int(row))
                at = k * height + offset
                rows[at] = row
                ids[at, : len(example.input_ids)] = example.input_ids
                loss[at, : len(example.loss_mask)] = example.loss_mask
        rows_B, ids_BT, loss_BT = (
            torch.from_numpy(array).to(self.device) for array in (rows, ids, loss)
        )
        return Batch(rows_B=rows_B, ids_BT=ids_BT, loss_BT=loss_BT)


def example_order(num_rows: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Row numbers of the examples start..stop of a trial: every epoch is a new permutation, a
    function of (seed, epoch) alone, so that any position can be resumed."""
    epochs = range(start // num_rows, (stop - 1) // num_rows + 1)
    orders = [np.random.default_rng([seed, epoch]).permutation(num_rows) for epoch in epochs]
    first = start - epochs[0] * num_rows
    return np.concatenate(orders)[first : first + stop - start]


def worker_micro_batches(
    indices: np.ndarray,
    lengths: np.ndarray,
    micro_batch_size: int,
    world_rank: int,
    world_size: int,
) -> Iterator[np.ndarray]:
    """This worker's share of a global batch, in micro-batches of rows of like length.

    Sorting by length saves padding and changes no gradient but by rounding: the loss is a sum over
    the global batch. Every worker yields the same number of micro-batches (the last may be empty).
    """
    by_length = indices[np.argsort(-lengths[indices], kind="stable")]
    share = by_length[world_rank::world_size]
    most_rows = -(-len(indices) // world_size)
    for start in range(0, most_rows, micro_batch_size):
        yield share[start : start + micro_batch_size]
