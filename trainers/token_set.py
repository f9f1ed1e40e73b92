"""Tokenized rows in flat arrays: compact in memory, saved without pickle, read without torch.

Shape legend: N tokens of the set, R rows, T positions.
"""

import hashlib
import json
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trainers.examples import FittedRow

ARRAYS = ("input_ids", "loss_mask", "offsets", "row_loss_bytes")


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One row. loss_mask[i] is whether token i is predicted and counted; never at 0.

    Args:
        input_ids: int32 [T].
        loss_mask: bool [T].
        num_loss_bytes: UTF-8 bytes of the loss-bearing text.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    num_loss_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedSet:
    """Rows ready to train on.

    Args:
        input_ids: int32 [N].
        loss_mask: bool [N].
        offsets: int64 [R + 1]; row i is offsets[i]:offsets[i + 1].
        row_loss_bytes: int64 [R].
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    row_loss_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def example(self, index: int) -> Example:
        """Row `index` as views, not copies. Raises: IndexError: no such row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row must be within 0..{len(self) - 1}, got {index}")
        where = slice(self.offsets[index], self.offsets[index + 1])
        return Example(
            input_ids=self.input_ids[where],
            loss_mask=self.loss_mask[where],
            num_loss_bytes=int(self.row_loss_bytes[index]),
        )

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [R]."""
        return np.diff(self.offsets)

    @cached_property
    def loss_token_counts(self) -> np.ndarray:
        """Loss-bearing tokens of each row, int64 [R]."""
        running = np.concatenate([[0], np.cumsum(self.loss_mask, dtype=np.int64)])
        return np.diff(running[self.offsets])

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @cached_property
    def num_loss_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_mask))

    @cached_property
    def num_loss_bytes(self) -> int:
        """UTF-8 bytes of the set's loss-bearing text."""
        return int(self.row_loss_bytes.sum())

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of ids, mask and row bounds: equal for equal training, whatever file it came
        from."""
        digest = hashlib.sha256()
        for name in ("input_ids", "loss_mask", "offsets"):
            digest.update(np.ascontiguousarray(getattr(self, name)).data)
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the arrays into a folder; the caller renames the folder once it is complete."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        facts = {"rows": len(self), "tokens": self.num_tokens, "content_hash": self.content_hash}
        (folder / "set.json").write_text(json.dumps(facts), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "TokenizedSet":
        """Reads a saved set; the arrays stay on disk and are mapped, so that memory holds what is
        used.

        Raises: ValueError: the arrays do not belong together.
        """
        arrays: dict[str, Any] = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ARRAYS
        }
        facts = json.loads((folder / "set.json").read_text(encoding="utf-8"))
        found = {"rows": len(arrays["offsets"]) - 1, "tokens": len(arrays["input_ids"])}
        if any(facts[key] != value for key, value in found.items()):
            raise ValueError(
                f"{folder}: a saved set must hold {facts}, holds {found}; delete the folder"
            )
        return cls(**arrays)


class SetBuilder:
    """Gathers fitted rows into a TokenizedSet."""

    def __init__(self) -> None:
        self._ids, self._mask = array("i"), bytearray()
        self._offsets, self._bytes = array("q", [0]), array("q")

    def __len__(self) -> int:
        return len(self._bytes)

    def add(self, row: FittedRow) -> None:
        first = len(self._mask)
        self._ids.extend(row.ids)
        self._mask.extend(bytes(len(row.ids)))
        for start, stop in row.spans:
            self._mask[first + start : first + stop] = b"\1" * (stop - start)
        self._offsets.append(len(self._mask))
        self._bytes.append(row.num_loss_bytes)

    def built(self) -> TokenizedSet:
        """The set; its arrays share the builder's memory, which must not grow afterwards."""
        return TokenizedSet(
            input_ids=np.frombuffer(self._ids, dtype=np.int32),
            loss_mask=np.frombuffer(self._mask, dtype=np.bool_),
            offsets=np.frombuffer(self._offsets, dtype=np.int64),
            row_loss_bytes=np.frombuffer(self._bytes, dtype=np.int64),
        )
