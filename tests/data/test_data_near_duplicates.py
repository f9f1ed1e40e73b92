"""Near-duplicates, against brute force over all pairs."""

import numpy as np
import pytest

from trainers.data import near_duplicates as module
from trainers.data.near_duplicates import RUN, SIMILAR, near_duplicates
from trainers.data.token_set import TokenizedSet


def as_set(rows):
    lengths = [len(row) for row in rows]
    return TokenizedSet(
        input_ids=np.concatenate(rows).astype(np.int32) if rows else np.empty(0, np.int32),
        loss_mask=np.ones(sum(lengths), dtype=np.bool_),
        offsets=np.cumsum([0, *lengths]),
        row_loss_tokens=np.array(lengths, dtype=np.int64),
        row_loss_bytes=np.array(lengths, dtype=np.int64),
    )


def changed(row, count, rng):
    """The row with so many of its tokens replaced."""
    row = row.copy()
    row[rng.choice(len(row), count, replace=False)] = rng.integers(5000, 6000, count)
    return row


def jaccard(one, other):
    a, b = ({tuple(row[i : i + RUN]) for i in range(len(row) - RUN + 1)} for row in (one, other))
    return len(a & b) / len(a | b)


def brute_force(rows):
    """Rows that nearly equal an earlier one."""
    return {
        i
        for i, row in enumerate(rows)
        for earlier in rows[:i]
        if not np.array_equal(row, earlier) and jaccard(row, earlier) >= SIMILAR
    }


@pytest.mark.parametrize("block", [50, 1 << 20])
def test_near_duplicates_are_those_of_brute_force(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_TOKENS", block)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 3000, rng.integers(20, 200)) for _ in range(60)]
    # One to six changes of 60 tokens or more: some of them below the bound, some above.
    rows += [changed(row, 1 + i % 6, rng) for i, row in enumerate(rows) if len(row) > 60]
    rows += [rows[0].copy(), rows[1][:3]]
    found = near_duplicates(as_set(rows), as_set([]))
    expected = brute_force(rows)
    assert len(expected) > 15
    # MinHash misses 2% of the pairs just at the bound.
    assert len(expected) - 2 <= found.num_train <= len(expected)
    assert {row for row, _ in found.train} <= expected
    assert found.num_eval == 0


def test_near_duplicates_across_the_split_name_the_trained_twin():
    rng = np.random.default_rng(1)
    train = [rng.integers(0, 3000, 100) for _ in range(20)]
    held_out = [rng.integers(0, 3000, 100), changed(train[7], 1, rng), train[3].copy()]
    found = near_duplicates(as_set(train), as_set(held_out))
    assert (found.num_train, found.num_eval) == (0, 1)  # the equal one is an overlap, not counted
    assert found.eval == ((1, 7),)


def test_near_duplicates_of_held_out_rows_among_themselves_are_nobodys_leak():
    rng = np.random.default_rng(2)
    twin = rng.integers(0, 3000, 100)
    found = near_duplicates(
        as_set([rng.integers(0, 3000, 100)]), as_set([twin, changed(twin, 1, rng)])
    )
    assert (found.num_train, found.num_eval) == (0, 0)


def test_near_duplicates_a_frame_that_all_rows_share_makes_none():
    rng = np.random.default_rng(3)
    frame = rng.integers(0, 3000, 400)
    rows = [np.concatenate([frame, rng.integers(0, 3000, 30)]) for _ in range(50)]
    assert jaccard(rows[0], rows[1]) > SIMILAR  # were the frame counted
    assert near_duplicates(as_set(rows), as_set([])).num_train == 0


def test_near_duplicates_of_short_rows_and_of_none_are_none():
    short = [np.array([1, 2, 3, 4, 5, 6]), np.array([1, 2, 3, 4, 5, 7])]
    assert near_duplicates(as_set(short), as_set([])).num_train == 0
    assert near_duplicates(as_set([]), as_set([])).num_train == 0
