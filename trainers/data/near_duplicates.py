"""Examples that are nearly the same: MinHash over runs of tokens, candidates verified exactly.

Two examples are near-duplicates when at least SIMILAR of the runs of RUN tokens that either has, both
have (Jaccard similarity). Runs that many examples share (a system prompt, an instruction's frame) say
nothing and are left out first. Written here and not taken from a library, because the tokens are
already on disk in arrays: memory holds 64 bytes an example, and no Python object for any.

Shape legend: E examples, N tokens or runs of a block of examples.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainers.data.records import NUM_SHOWN, Origin
from trainers.data.token_set import ORIGINS, TokenizedSet, release_pages

RUN = 5
SIMILAR = 0.8
MIN_RUNS = 8
"""An example with fewer runs of its own is not compared: two short answers are alike by chance."""
NUM_BANDS, BAND_HASHES = 8, 4
"""A pair of similarity s becomes a candidate with probability 1 - (1 - s^4)^8: 98% at 0.8."""
SAMPLED, COMMON_FRAC = 1000, 0.25
BLOCK_TOKENS = 1 << 18
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class NearDuplicates:
    """Near-duplicates among the training examples, and held-out examples that nearly are trained.

    Args:
        num_train, num_eval: examples that nearly equal an earlier one of the training side; equal
            ones are not counted here.
        train, eval: the first few, as (example, earlier training example).
    """

    num_train: int
    num_eval: int
    train: tuple[tuple[int, int], ...]
    eval: tuple[tuple[int, int], ...]


def near_duplicates(train: TokenizedSet, held_out: TokenizedSet) -> NearDuplicates:
    """Compares every example with the earlier ones of the training side."""
    finder = _Finder((train, held_out))
    pairs = list(finder.pairs())
    in_train = [(row, twin) for row, twin in pairs if row < len(train)]
    in_eval = [(row - len(train), twin) for row, twin in pairs if row >= len(train)]
    return NearDuplicates(
        len(in_train), len(in_eval), tuple(in_train[:NUM_SHOWN]), tuple(in_eval[:NUM_SHOWN])
    )


def found_in(folder: Path) -> dict[str, Any]:
    """The near-duplicates of a prepared dataset as JSON, the first few as "place ~ earlier place".

    Args: folder: holds train/ and eval/.
    """
    sides = [folder / "train", folder / "eval"]
    found = near_duplicates(*map(TokenizedSet.load, sides))
    places = [_Places(side) for side in sides]
    return {
        "num_train": found.num_train,
        "num_eval": found.num_eval,
        "train": [f"{places[0].of(row)} ~ {places[0].of(twin)}" for row, twin in found.train],
        "eval": [f"{places[1].of(row)} ~ {places[0].of(twin)}" for row, twin in found.eval],
    }


class _Places:
    """Where the examples of a saved set were read."""

    def __init__(self, folder: Path) -> None:
        self.origins = np.load(folder / f"{ORIGINS}.npy", mmap_mode="r")
        self.names = json.loads((folder / "set.json").read_text(encoding="utf-8"))["places"]

    def of(self, example: int) -> Origin:
        place, number = self.origins[2 * example : 2 * example + 2].tolist()
        path, unit = self.names[place]
        return Origin(path, number, unit)


class _Finder:
    """Examples of several sets under one numbering; twins are looked for in the first set."""

    def __init__(self, sets: Sequence[TokenizedSet]) -> None:
        self.sets = sets
        self.firsts = np.cumsum([0, *map(len, sets)])
        self.common = self._common_runs()

    def _ids(self, example: int) -> np.ndarray:
        which = int(np.searchsorted(self.firsts, example, side="right")) - 1
        rows = self.sets[which]
        ids = np.array(rows.example(example - int(self.firsts[which])).input_ids)
        release_pages(rows.input_ids)  # an example brings many pages around it
        return ids

    def _common_runs(self) -> np.ndarray:
        """Runs that more than COMMON_FRAC of a sample of the examples have, sorted."""
        total = int(self.firsts[-1])
        sample = np.unique(np.linspace(0, max(0, total - 1), min(total, SAMPLED)).astype(int))
        runs = [np.unique(_runs(self._ids(example))) for example in sample.tolist()]
        if not runs:
            return np.empty(0, dtype=np.uint64)
        values, counts = np.unique(np.concatenate(runs), return_counts=True)
        return values[(counts > COMMON_FRAC * len(sample)) & (counts > 1)]

    def own_runs(self, example: int) -> np.ndarray:
        """The runs of an example that are not common, sorted, each once."""
        return np.setdiff1d(_runs(self._ids(example)), self.common)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(example, earlier example of the first set), for each example that has such a twin."""
        num_first = int(self.firsts[1])
        found: set[int] = set()
        for example, twin in _candidates(self._band_keys(), num_first).tolist():
            if example not in found and self._are_similar(example, twin):
                found.add(example)
                yield example, twin

    def _are_similar(self, one: int, other: int) -> bool:
        if np.array_equal(self._ids(one), self._ids(other)):
            return False
        a, b = self.own_runs(one), self.own_runs(other)
        both = len(np.intersect1d(a, b, assume_unique=True))
        return both >= SIMILAR * (len(a) + len(b) - both)

    def _band_keys(self) -> np.ndarray:
        """What MinHash makes of every example, uint64 [bands, E]; 0 where it is not compared."""
        blocks = [keys for rows in self.sets for keys in _blocks_of_keys(rows, self.common)]
        return np.concatenate(blocks, axis=1) if blocks else np.empty((NUM_BANDS, 0), np.uint64)


def _runs(ids: np.ndarray) -> np.ndarray:
    """A hash of each run of RUN tokens, uint64 [T - RUN + 1]."""
    ids = ids.astype(np.uint64)
    length = max(0, len(ids) - RUN + 1)
    hashed = np.zeros(length, dtype=np.uint64)
    for at in range(RUN):
        hashed = _mixed(hashed + ids[at : at + length])
    return hashed


def _mixed(values: np.ndarray) -> np.ndarray:
    # The finalizer of splitmix64: every bit of the input moves half of the output's.
    values = (values + np.uint64(1)) * MULTIPLIER
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    return values ^ (values >> np.uint64(27))


def _blocks_of_keys(rows: TokenizedSet, common: np.ndarray) -> Iterator[np.ndarray]:
    for first, last in _blocks(rows.offsets):
        start = int(rows.offsets[first])
        ids = np.asarray(rows.input_ids[start : rows.offsets[last]])
        yield _keys(ids, np.asarray(rows.offsets[first : last + 1]) - start, common)
        release_pages(rows.input_ids)


def _blocks(offsets: np.ndarray) -> Iterable[tuple[int, int]]:
    first = 0
    while first < len(offsets) - 1:
        limit = offsets[first] + BLOCK_TOKENS
        last = max(first + 1, int(np.searchsorted(offsets, limit, side="right")) - 1)
        yield first, last
        first = last


def _keys(ids: np.ndarray, offsets: np.ndarray, common: np.ndarray) -> np.ndarray:
    """uint64 [bands, examples of the block]."""
    runs, starts = _runs(ids), offsets[:-1]
    owner = np.repeat(np.arange(len(starts)), np.diff(offsets))[: len(runs)]
    # A run must lie within one example.
    usable = np.arange(len(runs)) + RUN <= offsets[1:][owner]
    usable &= ~_is_among(runs, common)
    runs, owner = runs[usable], owner[usable]
    counts = np.bincount(owner, minlength=len(starts))
    compared = np.flatnonzero(counts >= MIN_RUNS)
    keep = counts[owner] >= MIN_RUNS
    runs, counts = runs[keep], counts[compared]
    keys = np.zeros((NUM_BANDS, len(starts)), dtype=np.uint64)
    if not len(compared):
        return keys
    firsts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    for band in range(NUM_BANDS):
        key = np.zeros(len(compared), dtype=np.uint64)
        for number in range(BAND_HASHES):
            salt = np.uint64((band * BAND_HASHES + number + 1) * int(MULTIPLIER) % 2**64)
            key = _mixed(key + np.minimum.reduceat(_mixed(runs ^ salt), firsts))
        keys[band, compared] = key | np.uint64(1)
    return keys


def _is_among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    if not len(known):
        return np.zeros(len(values), dtype=bool)
    at = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return known[at] == values


def _candidates(keys: np.ndarray, num_first: int) -> np.ndarray:
    """Pairs (example, earliest example of the first set with the same key), ascending, [pairs, 2]."""
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for band in keys:
        compared = np.flatnonzero(band)
        order = compared[np.argsort(band[compared], kind="stable")]
        if not len(order):
            continue
        begins = np.concatenate([[True], band[order][1:] != band[order][:-1]])
        earliest = order[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
        is_pair = (order != earliest) & (earliest < num_first)
        pairs.append(np.stack([order[is_pair], earliest[is_pair]], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)
