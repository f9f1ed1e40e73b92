"""Rows in an order that is random and never moves: by a hash of what they hold."""

import hashlib

import numpy as np

from trainers.data.token_set import TokenizedSet

STEP = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: what sets equal rows apart, evenly over all hashes."""


def content_order(rows: TokenizedSet) -> np.ndarray:
    """Row numbers, int64 [R], in the order of a hash of ids and mask. It does not depend on where a
    row stands; equal rows are spread over it, so that its first n rows are a random sample."""
    hashes = np.array([_row_hash(rows, row) for row in range(len(rows))], dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    place = np.arange(len(rows)) - np.maximum.accumulate(np.where(starts, np.arange(len(rows)), 0))
    hashes[order] = ordered + place.astype(np.uint64) * STEP  # modulo 2^64
    return np.argsort(hashes, kind="stable")


def _row_hash(rows: TokenizedSet, row: int) -> int:
    example = rows.example(row)
    digest = hashlib.blake2b(digest_size=8)
    digest.update(np.ascontiguousarray(example.input_ids, dtype=np.int32).data)
    digest.update(np.ascontiguousarray(example.loss_mask, dtype=np.bool_).data)
    return int.from_bytes(digest.digest(), "big")


def taken(rows: TokenizedSet, chosen: np.ndarray) -> TokenizedSet:
    """The chosen rows as a set of their own, in memory. chosen: at least one row number."""
    examples = [rows.example(int(row)) for row in chosen]
    lengths = rows.lengths[chosen]
    return TokenizedSet(
        input_ids=np.concatenate([example.input_ids for example in examples]),
        loss_mask=np.concatenate([example.loss_mask for example in examples]),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        row_loss_tokens=rows.loss_token_counts[chosen],
        row_loss_bytes=rows.row_loss_bytes[chosen],
    )
