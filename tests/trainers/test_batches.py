"""Micro-batches: padding, loss blocks against a brute-force mask, data order, shares of workers."""

import numpy as np
import pytest
import torch

from tests.trainers.tiny import Row, Rows, random_rows
from trainers.batches import (
    IGNORED,
    LOSS_BLOCK,
    MAX_PADDING,
    Batch,
    RowSource,
    Share,
    block_size,
    example_order,
)

CPU = torch.device("cpu")
PAD = 0


def source(rows: Rows) -> RowSource:
    return RowSource(rows, PAD, CPU)


def row(ids: list[int], trained: list[int]) -> Row:
    return Row(np.array(ids), np.isin(np.arange(len(ids)), trained))


def predictions(batch: Batch) -> list[tuple[int, int, int, int]]:
    """(segment of the block, row of the batch, position, token) of every counted prediction."""
    assert batch.loss is not None
    width, loss = batch.ids_BT.shape[1], batch.loss
    size = len(loss.index_M) // len(loss.segment_of_block)
    assert size * len(loss.segment_of_block) == len(loss.index_M)
    return [
        (loss.segment_of_block[at // size], index // width, index % width, target)
        for at, (index, target) in enumerate(
            zip(loss.index_M.tolist(), loss.targets_M.tolist(), strict=True)
        )
        if target != IGNORED
    ]


def random_segments(rows: Rows, generator) -> list[np.ndarray]:
    sizes = generator.integers(0, 7, int(generator.integers(1, 6)))
    return [generator.integers(0, len(rows), int(size)) for size in sizes]


@pytest.mark.parametrize("max_block", [1, 7, 64, 1 << 30])
def test_loss_blocks_random_batches_hold_every_prediction_once(max_block):
    rows, generator = random_rows(30, longest=40), np.random.default_rng(0)
    for _ in range(50):
        segments = random_segments(rows, generator)
        batch = source(rows).batch(segments, max_block)
        height = max(1, *(len(segment) for segment in segments))
        expected = [
            (k, k * height + at, position - 1, int(rows.rows[index].input_ids[position]))
            for k, segment in enumerate(segments)
            for at, index in enumerate(segment)
            for position in np.flatnonzero(rows.rows[index].loss_mask)
        ]
        if not expected:
            assert batch.loss is None
            continue
        assert sorted(predictions(batch)) == sorted(expected)
        assert batch.loss is not None
        padding = batch.loss.targets_M == IGNORED
        size = len(batch.loss.index_M) // len(batch.loss.segment_of_block)
        assert size <= max_block
        # Padding repeats a position of the block's own segment: no other adapter's numbers.
        segment_of = batch.loss.index_M // (height * batch.ids_BT.shape[1])
        block_of = torch.tensor(batch.loss.segment_of_block).repeat_interleave(size)
        assert torch.equal(segment_of[padding], block_of[padding])


def test_batch_pads_to_the_longest_row_and_the_largest_segment():
    rows = Rows([row([5, 6, 7], [2]), row([8, 9], [1]), row([1, 2, 3, 4], [3])])
    batch = source(rows).batch([np.array([0, 1]), np.array([1])])
    assert batch.ids_BT.tolist() == [[5, 6, 7], [8, 9, PAD], [8, 9, PAD], [PAD, PAD, PAD]]
    assert batch.rows_B.tolist() == [0, 1, 1, -1]


def test_batch_of_no_rows_has_no_loss():
    # A worker whose share of a global batch is empty.
    batch = source(random_rows(3)).batch([np.array([], dtype=np.int64)])
    assert batch.loss is None
    assert batch.rows_B.tolist() == [-1]


def test_batch_whose_pad_id_is_a_trained_token_still_trains_it():
    # FIELD A04: padding goes by length, not by id.
    rows = Rows([row([5, PAD, 7, PAD], [1, 3]), row([8, PAD], [1])])
    batch = source(rows).batch([np.array([0, 1])])
    assert sorted(predictions(batch)) == [(0, 0, 0, PAD), (0, 0, 2, PAD), (0, 1, 0, PAD)]


@pytest.mark.parametrize(
    ("counts", "max_block", "expected"),
    [
        ([10], 1 << 30, 10),
        ([10, 10, 10], 1 << 30, 10),
        ([0, 10], 1 << 30, 10),
        ([100, 90], 1 << 30, 100),  # 200 positions for 190: within 10%
        ([100, 70], 1 << 30, LOSS_BLOCK),  # 200 for 170: too many
        ([10, 1], 1 << 30, 10),  # no block is larger than the largest segment
        ([10], 7, 5),
        ([10], 1, 1),
        ([300, 10], 200, LOSS_BLOCK),
    ],
)
def test_block_size_pads_little_or_falls_back_to_small_blocks(counts, max_block, expected):
    assert block_size(np.array(counts), max_block) == expected


def test_block_size_random_counts_stay_within_the_padding_rule():
    generator = np.random.default_rng(0)
    for _ in range(500):
        counts = generator.integers(0, 400, int(generator.integers(1, 6)))
        counts[0] += 1
        max_block = int(generator.choice([1, 16, 100, 1 << 30]))
        size = block_size(counts, max_block)
        assert 1 <= size <= min(max_block, counts.max())
        blocks = sum(-(-int(count) // size) for count in counts)
        padded = blocks * size
        small = size <= LOSS_BLOCK and padded - counts.sum() < len(counts) * LOSS_BLOCK
        assert padded <= MAX_PADDING * counts.sum() or small


def test_example_order_every_epoch_is_a_new_permutation():
    order = example_order(10, 5, 0, 30).reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) == 3
    assert example_order(10, 6, 0, 10).tolist() != order[0].tolist()


def test_example_order_any_cut_is_the_same_stretch_of_the_whole():
    whole = example_order(7, 3, 0, 40)
    for start in range(40):
        for stop in range(start + 1, 41):
            assert example_order(7, 3, start, stop).tolist() == whole[start:stop].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 12])
def test_share_workers_hold_the_global_batch_once_and_alike(num_rows, world_size):
    lengths = np.random.default_rng(1).integers(1, 50, 100)
    indices = np.random.default_rng(2).permutation(100)[:num_rows]
    shares = [Share.of(indices, lengths, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate([s.rows for s in shares]).tolist()) == sorted(indices.tolist())
    sizes = [len(share.rows) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for share in shares:
        # All cut by the lengths of the first, which are nowhere shorter than their own.
        assert share.lengths.tolist() == lengths[shares[0].rows].tolist()
        assert (lengths[share.rows] <= share.lengths[: len(share.rows)]).all()


def test_share_take_gives_the_longest_first_and_counts_them_as_done():
    lengths = np.array([3, 9, 5, 7])
    share = Share.of(np.arange(4), lengths, 0, 1)
    assert (len(share), share.width) == (4, 9)
    assert share.take(3).tolist() == [1, 3, 2]
    assert (len(share), share.width) == (1, 3)
    assert share.take(3).tolist() == [0]
    assert not share


def test_share_take_of_a_worker_with_fewer_rows_ends_with_the_others():
    lengths = np.array([4, 4, 4])
    shares = [Share.of(np.arange(3), lengths, rank, 2) for rank in (0, 1)]
    taken = [[share.take(1).tolist() for _ in range(2)] for share in shares]
    assert taken == [[[0], [2]], [[1], []]]
    assert [len(share) for share in shares] == [0, 0]
