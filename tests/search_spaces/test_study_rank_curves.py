"""Where curves part, where capacity is filled, and Kendall's tau, by hand."""

import pytest

from search_spaces.studies.rank_curves import capacity_examples, kendall_tau, leaving_examples

REFERENCE = [(100, 3.0, 0.0), (200, 2.5, 0.0), (300, 2.2, 0.0), (400, 2.0, 0.0)]


def curve(*excesses):
    return [(n, loss + more, 0.1) for (n, loss, _), more in zip(REFERENCE, excesses, strict=True)]


@pytest.mark.parametrize(
    ("excesses", "expected"),
    [
        ((0.0, 0.0, 0.0, 0.0), None),
        ((0.5, 0.5, 0.5, 0.0), None),  # slow at first, and there at the end
        ((0.0, 0.0, 0.0, 0.03), 400),
        ((0.0, 0.1, 0.0, 0.03), 400),  # it came back at 300
        ((0.0, 0.1, 0.1, 0.1), 200),
        ((0.5, 0.1, 0.1, 0.1), 100),
        ((-0.5, -0.1, -0.1, -0.1), None),  # below the reference is not above it
    ],
)
def test_leaving_examples_first_evaluation_from_which_it_stays_above(excesses, expected):
    assert leaving_examples(REFERENCE, curve(*excesses), 0.01) == expected


def test_leaving_examples_exactly_the_tolerance_has_not_left():
    reference, at_tolerance = [(1, 2.0, 0.0)], [(1, 2.5, 0.0)]
    assert leaving_examples(reference, at_tolerance, 0.25) is None
    assert leaving_examples(reference, at_tolerance, 0.2499) == 1


def test_leaving_examples_compares_the_evaluations_of_both():
    assert leaving_examples(REFERENCE, [(150, 9.0, 0.0), (400, 2.1, 0.0)], 0.01) == 400
    with pytest.raises(ValueError, match="must share an evaluation"):
        leaving_examples(REFERENCE, [(150, 9.0, 0.0)], 0.01)
    with pytest.raises(ValueError, match="tolerance_frac must be >= 0"):
        leaving_examples(REFERENCE, REFERENCE, -1)


def test_capacity_examples_whole_examples_that_fit():
    # Rank 4 of 8192 parameters at 2 bits: 16,384 bits; 100 tokens at 1 bit an example.
    assert capacity_examples(16_384, 100, 1) == 163
    assert capacity_examples(16_384, 128, 1) == 128  # exactly filled
    assert capacity_examples(16_384, 128, 2.5) == 51
    assert capacity_examples(0, 128, 1) == 0
    with pytest.raises(ValueError, match="bits_per_token > 0"):
        capacity_examples(16_384, 128, 0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([1, 2, 3, 4], [1, 3, 2, 4], 4 / 6),  # one of six pairs is turned
        # Ties: 4 pairs agree; 5 are untied in the first, 5 in the second.
        ([1, 1, 2, 3], [1, 2, 2, 3], 4 / 5),
        ([1, 2, 3], [5, 5, 5], None),
        ([1], [1], None),
        ([], [], None),
    ],
)
def test_kendall_tau_of_hand_counted_pairs(first, second, expected):
    assert kendall_tau(first, second) == (None if expected is None else pytest.approx(expected))
    assert kendall_tau(second, first) == kendall_tau(first, second)


def test_kendall_tau_of_different_lengths_refused():
    with pytest.raises(ValueError, match="one length, got 2 and 1"):
        kendall_tau([1, 2], [1])
