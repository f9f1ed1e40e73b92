"""Sequence packing: several examples in one sequence, none of which attends to another.

A packed sequence carries each example's own positions (0, 1, 2, ... from its first token), from which
transformers builds a mask that keeps examples apart. An example is never cut, its first token is
predicted in neither form, and so the loss-bearing tokens of an epoch are the same packed or not; only
the number of sequences, and with it the number of steps, changes.

Shape legend: R examples, S sequences, T positions.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from trainers.data.token_set import Example, TokenizedSet


def packed_order(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Which examples share a sequence: the order of the examples, int64 [R], and where in it each
    sequence begins, int64 [S + 1].

    Best fit decreasing: from the longest on, each example goes where it leaves least room; at most
    22% more sequences than the best packing has, in practice under 1%.

    Args:
        lengths: tokens of each example, int64 [R], each within 1..seq_len.
    Source: Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing
        algorithms".
    """
    sequences: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # sequences, by room that is left
    rooms: list[int] = []  # the rooms that some sequence has, ascending
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            sequence, room = len(sequences), seq_len
            sequences.append([])
        else:
            room = rooms[at]
            sequence = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        sequences[sequence].append(row)
        left = room - length
        if not with_room[left]:
            insort(rooms, left)
        with_room[left].append(sequence)
    order = np.array([row for rows in sequences for row in rows], dtype=np.int64)
    return order, np.cumsum([0, *map(len, sequences)], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class PackedSet:
    """A tokenized set read as packed sequences: what the loop calls a row is a sequence.

    Args:
        rows: the examples; nothing is copied.
        order: int64 [R].
        bounds: int64 [S + 1].
    """

    rows: TokenizedSet
    order: np.ndarray
    bounds: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "PackedSet":
        """A set's sequences, as `save_order` put them beside its arrays."""
        order, bounds = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ORDER_FILES)
        return cls(TokenizedSet.load(folder), order, bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def example(self, index: int) -> Example:
        """Sequence `index`. Raises: IndexError: no such sequence."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence must be within 0..{len(self) - 1}, got {index}")
        chosen = self.order[self.bounds[index] : self.bounds[index + 1]].tolist()
        parts = [self.rows.example(row) for row in chosen]
        return Example(
            input_ids=np.concatenate([part.input_ids for part in parts]),
            loss_mask=np.concatenate([part.loss_mask for part in parts]),
            num_loss_bytes=sum(part.num_loss_bytes for part in parts),
            positions=np.concatenate([np.arange(len(part.input_ids)) for part in parts]),
        )

    def _summed(self, values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values[self.order], self.bounds[:-1])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [S]."""
        return self._summed(self.rows.lengths)

    @cached_property
    def loss_token_counts(self) -> np.ndarray:
        """Loss-bearing tokens of each sequence, int64 [S]."""
        return self._summed(self.rows.loss_token_counts)

    @property
    def num_tokens(self) -> int:
        return self.rows.num_tokens

    @property
    def num_loss_tokens(self) -> int:
        return self.rows.num_loss_tokens

    @property
    def num_loss_bytes(self) -> int:
        return self.rows.num_loss_bytes


ORDER_FILES = ("packed_order", "packed_bounds")


def save_order(folder: Path, seq_len: int) -> int:
    """Packs a saved set, and keeps the order beside its arrays. Returns the number of sequences."""
    found = packed_order(TokenizedSet.load(folder).lengths, seq_len)
    for name, values in zip(ORDER_FILES, found, strict=True):
        np.save(folder / f"{name}.npy", values, allow_pickle=False)
    return len(found[1]) - 1
