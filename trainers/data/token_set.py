"""Tokenized rows in flat arrays: compact in memory, saved without pickle, read without torch.

Shape legend: N tokens of the set, R rows, T positions.
"""

import hashlib
import json
import mmap
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trainers.data.records import Origin
from trainers.data.token_rows import FittedRow
from trainers.integrity import sealed

ARRAYS = {
    "input_ids": np.dtype(np.int32),
    "loss_mask": np.dtype(np.bool_),
    "offsets": np.dtype(np.int64),
    "row_loss_tokens": np.dtype(np.int64),
    "row_loss_bytes": np.dtype(np.int64),
}
TYPE_CODES = {1: "B", 4: "i", 8: "q"}
"""Of Python's arrays, by bytes: appending to them is faster than to numpy's."""
ORIGINS = "row_origins"
"""Where each row was read: [place, number] flattened, int64 [2 R]; places are in set.json."""
HASHED = ("input_ids", "loss_mask", "offsets")
BUFFERED_BYTES = 8 << 20
"""What a builder holds of each array before it writes it out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One row. loss_mask[i] is whether token i is predicted and counted; never at 0.

    Args:
        input_ids: int32 [T].
        loss_mask: bool [T].
        num_loss_bytes: UTF-8 bytes of the loss-bearing text.
        positions: [T], of each token within its own example where a row holds several; else None.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    num_loss_bytes: int
    positions: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedSet:
    """Rows ready to train on.

    Args:
        input_ids: int32 [N].
        loss_mask: bool [N].
        offsets: int64 [R + 1]; row i is offsets[i]:offsets[i + 1].
        row_loss_tokens: int64 [R], the mask's sum over each row.
        row_loss_bytes: int64 [R].
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    row_loss_tokens: np.ndarray
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

    @property
    def loss_token_counts(self) -> np.ndarray:
        """Loss-bearing tokens of each row, int64 [R]."""
        return self.row_loss_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @cached_property
    def num_loss_tokens(self) -> int:
        return int(self.row_loss_tokens.sum())

    @cached_property
    def num_loss_bytes(self) -> int:
        """UTF-8 bytes of the set's loss-bearing text."""
        return int(self.row_loss_bytes.sum())

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the hashes of ids, mask and row bounds: equal for equal training, whatever
        file it came from."""
        arrays = (np.ascontiguousarray(getattr(self, name)).data for name in HASHED)
        return _combined(hashlib.sha256(array) for array in arrays)

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


def release_pages(array: np.ndarray) -> None:
    """Takes what was read of a mapped array out of this process's memory; it can be read again.

    A pass over a large set would else hold all of it, as far as the system's other needs allow.
    """
    mapped = getattr(array, "_mmap", None)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


def _combined(digests: Iterable[Any]) -> str:
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


class ArrayFile:
    """A .npy file of one dimension that grows; its length is written into the header at the end."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.dtype, self.length = dtype, 0
        self.digest = hashlib.sha256()
        self._stream, self._buffer = path.open("wb"), array(TYPE_CODES[dtype.itemsize])
        self._header_bytes = self._write_header()

    def _write_header(self) -> int:
        facts = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._stream, facts)
        return self._stream.tell()

    def extend(self, values: Sequence[int]) -> None:
        """Appends values."""
        self._buffer.extend(values)
        self.length += len(values)
        if len(self._buffer) * self.dtype.itemsize >= BUFFERED_BYTES:
            self._flush()

    def _flush(self) -> None:
        self.digest.update(self._buffer)
        self._stream.write(self._buffer)
        del self._buffer[:]

    def close(self) -> None:
        """Writes what is left, and the length."""
        with self._stream:
            self._flush()
            self._stream.seek(0)
            # numpy pads headers so that an array may grow under the same one.
            if self._write_header() != self._header_bytes:
                raise RuntimeError(f"the header of {self._stream.name} grew with its length")


class SetBuilder:
    """Writes fitted rows into a folder as a TokenizedSet; memory holds a bounded part of them.

    The caller renames the folder once it is complete.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.num_rows = folder, 0
        self._files = {name: ArrayFile(folder / f"{name}.npy", t) for name, t in ARRAYS.items()}
        self._files["offsets"].extend([0])
        self._origins = ArrayFile(folder / f"{ORIGINS}.npy", np.dtype(np.int64))
        self._places: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        return self.num_rows

    def add(self, row: FittedRow, origin: Origin) -> None:
        """Appends a row."""
        files, mask = self._files, bytearray(len(row.ids))
        for start, stop in row.spans:
            mask[start:stop] = b"\1" * (stop - start)
        files["input_ids"].extend(row.ids)
        files["loss_mask"].extend(mask)
        files["offsets"].extend([files["input_ids"].length])
        files["row_loss_tokens"].extend([row.num_loss_tokens])
        files["row_loss_bytes"].extend([row.num_loss_bytes])
        place = self._places.setdefault((origin.path, origin.unit), len(self._places))
        self._origins.extend([place, origin.number])
        self.num_rows += 1

    def close(self) -> None:
        """Completes the folder."""
        for file in (*self._files.values(), self._origins):
            file.close()
        facts = {
            "rows": self.num_rows,
            "tokens": self._files["input_ids"].length,
            "places": list(self._places),
            "content_hash": _combined(self._files[name].digest for name in HASHED),
        }
        (self.folder / "set.json").write_text(sealed(facts), encoding="utf-8")
