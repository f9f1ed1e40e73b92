"""What a forward holds: limits, turns, parts; against the rules in words, over many random packs."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from trainers.batches import Share
from trainers.composer import ForwardLimits, even_part, next_forward


@dataclass
class Member:
    name: str
    share: Share | None
    rows_done: float = 0.0
    taken: list[int] = field(default_factory=list)


def member(name: str, lengths: list[int], world_rank=0, world_size=1, rows_done=0.0) -> Member:
    all_lengths = np.array(lengths)
    share = Share.of(np.arange(len(lengths)), all_lengths, world_rank, world_size)
    return Member(name, share, rows_done)


def random_pack(seed: int, **changes) -> list[Member]:
    generator = np.random.default_rng(seed)
    packs = [
        generator.integers(1, 100, int(generator.integers(1, 20))).tolist()
        for _ in range(int(generator.integers(1, 7)))
    ]
    return [member(f"m{k}", lengths, **changes) for k, lengths in enumerate(packs)]


def forwards(members: list[Member], limits: ForwardLimits):
    """All forwards until every share is used up: (name, rows) of each."""
    made = []
    while left := [m for m in members if m.share]:
        made.append([(m.name, rows.tolist()) for m, rows in next_forward(left, limits)])
    return made


def longest(members: list[Member]) -> dict[tuple[str, int], int]:
    return {
        (m.name, int(row)): int(length)
        for m in members
        if m.share
        for row, length in zip(m.share.rows, m.share.lengths, strict=True)
    }


@pytest.mark.parametrize("max_tokens", [1, 64, 200, 1000, 1 << 20])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_next_forward_random_packs_stay_within_their_limits(max_tokens, micro_batch_size):
    limits = ForwardLimits(max_tokens=max_tokens, micro_batch_size=micro_batch_size)
    for seed in range(60):
        members = random_pack(seed)
        length_of = longest(members)
        made = forwards(members, limits)
        rows = [(name, row) for parts in made for name, taken in parts for row in taken]
        assert sorted(rows) == sorted(length_of)  # every row once
        for parts in made:
            height = max(len(taken) for _, taken in parts)
            width = max(length_of[name, row] for name, taken in parts for row in taken)
            # A batch is a rectangle: padding counts. One row alone may be longer.
            assert len(parts) * height * width <= max_tokens or (len(parts), height) == (1, 1)
            assert height <= (micro_batch_size or height)
            assert len({name for name, _ in parts}) == len(parts)


def test_next_forward_who_got_least_leads():
    members = [member("a", [8] * 4, rows_done=5), member("b", [8] * 4, rows_done=3)]
    ((chosen, _),) = next_forward(members, ForwardLimits(max_tokens=8))
    assert chosen.name == "b"
    assert chosen.rows_done == 4


def test_next_forward_equal_members_take_turns_and_end_with_equal_rows():
    members = [member(name, [8] * 6) for name in "abc"]
    order = [name for ((name, _),) in forwards(members, ForwardLimits(max_tokens=8))]
    assert order == ["a", "b", "c"] * 6
    assert [m.rows_done for m in members] == [6, 6, 6]


def test_next_forward_small_batches_of_many_fill_it_together():
    members = [member(name, [10, 10]) for name in "abcd"]
    (first,) = forwards(members, ForwardLimits(max_tokens=80))
    assert [(name, len(rows)) for name, rows in first] == [(name, 2) for name in "abcd"]
    members = [member(name, [10, 10]) for name in "abcd"]
    sizes = [len(parts) for parts in forwards(members, ForwardLimits(max_tokens=79))]
    assert sizes == [3, 1]


def test_next_forward_follower_whose_rows_are_too_wide_waits():
    members = [member("a", [10]), member("b", [100]), member("c", [10])]
    first, *_ = forwards(members, ForwardLimits(max_tokens=30))
    assert [name for name, _ in first] == ["a", "c"]


@pytest.mark.parametrize(("rows_left", "comes"), [(2, False), (3, True)])
def test_next_forward_follower_must_fill_more_than_half_of_its_segment(rows_left, comes):
    members = [member("a", [10] * 4), member("b", [10] * rows_left)]
    first, *_ = forwards(members, ForwardLimits(max_tokens=1000))
    assert ("b" in [name for name, _ in first]) is comes


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("max_tokens", [50, 300, 1 << 20])
def test_next_forward_every_worker_decides_alike(world_size, max_tokens):
    limits = ForwardLimits(max_tokens=max_tokens)
    for seed in range(40):
        workers = [
            random_pack(seed, world_rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        made = [forwards(members, limits) for members in workers]
        names = [[[name for name, _ in parts] for parts in one] for one in made]
        assert all(one == names[0] for one in names)
        done = [[m.rows_done for m in members] for members in workers]
        assert all(one == done[0] for one in done)
        rows = [(n, r) for one in made for parts in one for n, taken in parts for r in taken]
        assert sorted(rows) == sorted((n, r) for n, r in longest(random_pack(seed)))


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(1, 1, 1), (8, 8, 8), (9, 8, 5), (16, 8, 8), (17, 8, 6), (7, 100, 7), (10, 1, 1)],
)
def test_even_part_cuts_into_few_nearly_equal_parts(count, most, expected):
    assert even_part(count, most) == expected


def test_even_part_brute_force_is_the_smallest_part_of_the_fewest_parts():
    for count in range(1, 40):
        for most in range(1, 40):
            fewest = min(parts for parts in range(1, count + 1) if parts * most >= count)
            smallest = min(size for size in range(1, most + 1) if fewest * size >= count)
            assert even_part(count, most) == smallest


@pytest.mark.parametrize(
    ("width", "micro_batch_size", "expected"),
    [(10, None, 10), (11, None, 9), (100, None, 1), (101, None, 1), (10, 4, 4), (10, 40, 10)],
)
def test_forward_limits_rows_of_a_width(width, micro_batch_size, expected):
    limits = ForwardLimits(max_tokens=100, micro_batch_size=micro_batch_size)
    assert limits.rows(width) == expected
