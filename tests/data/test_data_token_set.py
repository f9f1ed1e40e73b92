"""Sets as they are written to disk row by row, and packed sequences over them."""

import random
from itertools import pairwise

import numpy as np
import pytest

from trainers.data import token_set
from trainers.data.reading_progress import ReadingProgress
from trainers.data.records import Origin
from trainers.data.sequence_packing import PackedSet, packed_order, save_order
from trainers.data.token_rows import FittedRow
from trainers.data.token_set import SetBuilder, TokenizedSet


def random_rows(count, longest=40, seed=0):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        length = rng.randint(2, longest)
        start = rng.randint(1, length - 1)
        ids = [rng.randrange(1000) for _ in range(length)]
        rows.append(FittedRow(ids, ((start, length),), rng.randrange(100)))
    return rows


def written(folder, rows):
    builder = SetBuilder(folder)
    for number, row in enumerate(rows, start=1):
        builder.add(row, Origin("a.jsonl", number))
    builder.close()
    return TokenizedSet.load(folder)


@pytest.mark.parametrize("buffered", [1, 64, 8 << 20])
def test_set_builder_writes_the_rows_whatever_it_buffers(buffered, tmp_path, monkeypatch):
    monkeypatch.setattr(token_set, "BUFFERED_BYTES", buffered)
    rows = random_rows(200)
    found = written(tmp_path / "set", rows)
    assert len(found) == 200
    for index, row in enumerate(rows):
        example = found.example(index)
        assert example.input_ids.tolist() == row.ids
        assert np.flatnonzero(example.loss_mask).tolist() == list(range(*row.spans[0]))
        assert example.num_loss_bytes == row.num_loss_bytes
    assert found.loss_token_counts.tolist() == [row.num_loss_tokens for row in rows]
    assert found.num_loss_tokens == int(found.loss_mask.sum())


def test_set_builder_hash_is_that_of_the_loaded_set(tmp_path):
    found = written(tmp_path / "set", random_rows(50))
    facts = token_set.json.loads((tmp_path / "set" / "set.json").read_text())
    assert facts["content_hash"] == found.content_hash
    other = written(tmp_path / "other", random_rows(50, seed=1))
    assert other.content_hash != found.content_hash


def test_set_builder_without_rows_gives_an_empty_set(tmp_path):
    found = written(tmp_path / "set", [])
    assert (len(found), found.num_tokens, found.num_loss_tokens) == (0, 0, 0)
    assert save_order(tmp_path / "set", 16) == 0


def test_set_load_torn_files_are_refused(tmp_path):
    written(tmp_path / "set", random_rows(5))
    np.save(tmp_path / "set" / "input_ids.npy", np.zeros(3, dtype=np.int32))
    with pytest.raises(ValueError, match="must hold"):
        TokenizedSet.load(tmp_path / "set")


def fewest_sequences(lengths, seq_len):
    """The best packing, by trying all."""
    best = len(lengths)

    def place(at, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if at == len(lengths):
            best = len(rooms)
            return
        for index, room in enumerate(rooms):
            if room >= lengths[at]:
                place(at + 1, [*rooms[:index], room - lengths[at], *rooms[index + 1 :]])
        place(at + 1, [*rooms, seq_len - lengths[at]])

    place(0, [])
    return best


@pytest.mark.parametrize("seed", range(20))
def test_packed_order_holds_each_example_once_in_about_the_fewest_sequences(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 16) for _ in range(rng.randint(1, 9))]
    order, bounds = packed_order(np.array(lengths), 16)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in order[start:stop]) for start, stop in pairwise(bounds)]
    assert max(sums) <= 16
    assert len(sums) <= 11 / 9 * fewest_sequences(lengths, 16) + 1


def test_packed_order_of_full_rows_gives_each_a_sequence():
    order, bounds = packed_order(np.array([8, 8, 8]), 8)
    assert order.tolist() == [0, 1, 2]
    assert bounds.tolist() == [0, 1, 2, 3]


def test_packed_set_holds_the_tokens_masks_and_counts_of_its_rows(tmp_path):
    rows = written(tmp_path / "set", random_rows(60))
    num_sequences = save_order(tmp_path / "set", 48)
    packed = PackedSet.load(tmp_path / "set")
    assert len(packed) == num_sequences < 60
    assert packed.num_loss_tokens == rows.num_loss_tokens == packed.loss_token_counts.sum()
    assert packed.lengths.sum() == rows.num_tokens
    assert packed.lengths.max() <= 48
    seen = []
    for index in range(len(packed)):
        sequence = packed.example(index)
        assert len(sequence.input_ids) == packed.lengths[index]
        assert sequence.loss_mask.sum() == packed.loss_token_counts[index]
        starts = np.flatnonzero(sequence.positions == 0)
        assert not sequence.loss_mask[starts].any()
        for part in np.split(np.arange(len(sequence.input_ids)), starts[1:]):
            assert sequence.positions[part].tolist() == list(range(len(part)))
            seen.append(sequence.input_ids[part].tolist())
    assert sorted(seen) == sorted(rows.example(i).input_ids.tolist() for i in range(60))


def test_reading_progress_is_silent_at_first_and_then_speaks_now_and_then():
    now, lines = [0.0], []
    progress = ReadingProgress(clock=lambda: now[0], say=lines.append)
    for second in range(26):
        now[0] = float(second)
        for _ in range(512):
            progress.saw("big.jsonl")
    assert lines == [
        "reading big.jsonl: 2,816 rows, 563 a second",
        "reading big.jsonl: 7,936 rows, 529 a second",
        "reading big.jsonl: 13,056 rows, 522 a second",
    ]
