"""Which rows came before: digests with places, 24 bytes a row, so that any file can be looked through."""

from array import array
from dataclasses import dataclass

import numpy as np

from trainers.data.records import NUM_SHOWN, Origin


@dataclass(frozen=True)
class Repeats:
    """How many rows came before, and the first few as "place = earlier place"."""

    count: int
    shown: tuple[str, ...]


class RowDigests:
    """The rows of one side of the split, in reading order."""

    def __init__(self) -> None:
        self._digests, self._files, self._numbers = array("Q"), array("q"), array("q")
        self._places: dict[tuple[str, str], int] = {}

    def add(self, digest: bytes, origin: Origin) -> None:
        """Appends a row. Of its digest, 64 bits are kept: a million rows hold a false pair once in
        40 million times."""
        key = (origin.path, origin.unit)
        self._digests.append(int.from_bytes(digest[:8], "big"))
        self._files.append(self._places.setdefault(key, len(self._places)))
        self._numbers.append(origin.number)

    def _place(self, index: int) -> str:
        path, unit = list(self._places)[self._files[index]]
        return str(Origin(path, self._numbers[index], unit))

    @property
    def _values(self) -> np.ndarray:
        return np.array(self._digests, dtype=np.uint64)

    def repeats(self) -> Repeats:
        """Rows whose content came before on this side."""
        _, first, which = np.unique(self._values, return_index=True, return_inverse=True)
        earlier = first[which]
        later = np.flatnonzero(earlier != np.arange(len(earlier)))
        pairs = zip(later[:NUM_SHOWN].tolist(), earlier[later[:NUM_SHOWN]].tolist(), strict=True)
        shown = (f"{self._place(row)} = {self._place(before)}" for row, before in pairs)
        return Repeats(len(later), tuple(shown))

    def shared_with(self, other: "RowDigests") -> Repeats:
        """Distinct rows of this side that the other side has too."""
        both, mine, theirs = np.intersect1d(self._values, other._values, return_indices=True)
        order = np.argsort(mine)[:NUM_SHOWN]
        pairs = zip(mine[order].tolist(), theirs[order].tolist(), strict=True)
        shown = (f"{self._place(row)} = {other._place(twin)}" for row, twin in pairs)
        return Repeats(len(both), tuple(shown))
