"""Stored bits against hand sums and enumeration, and where a curve over loads levels off."""

import itertools
import math
import random

import pytest

from search_spaces.studies.stored_bits import LoadPoint, check_unseen, peak_of, stored_bits


def test_stored_bits_are_known_bits_less_what_the_values_still_cost():
    # 4 facts of 2 symbols and an end token: 12 tokens at half a bit each.
    assert stored_bits(32.0, 0.5 * math.log(2), 12) == pytest.approx(32 - 6)


def test_stored_bits_of_a_perfect_memory_are_all_there_are():
    assert stored_bits(16_880.0, 0.0, 3798) == 16_880.0


def test_stored_bits_of_a_uniform_guess_are_none():
    # 8 symbols of 5 bits, and an end token that is certain.
    assert stored_bits(40.0, 8 * math.log(32) / 9, 9) == pytest.approx(0.0, abs=1e-9)


def test_stored_bits_of_a_model_worse_than_guessing_are_negative():
    assert stored_bits(40.0, 2 * 8 * math.log(32) / 9, 9) == pytest.approx(-40.0)


@pytest.mark.parametrize("loss", [-1e-9, math.nan, math.inf])
def test_stored_bits_of_an_impossible_loss_are_refused(loss):
    with pytest.raises(ValueError, match="eval_loss must be finite and >= 0"):
        stored_bits(40.0, loss, 9)


@pytest.mark.parametrize(("known", "tokens"), [(0.0, 9), (math.nan, 9), (40.0, 0)])
def test_stored_bits_of_no_facts_are_refused(known, tokens):
    with pytest.raises(ValueError, match="facts must hold"):
        stored_bits(known, 1.0, tokens)


def test_stored_bits_of_unseen_facts_keep_krafts_bound_for_any_model():
    # All 4^3 values of one fact, under models that know nothing of which one it will be.
    draw = random.Random(0)
    values = list(itertools.product(range(4), repeat=3))
    for sharpness in (0.1, 1.0, 5.0, 20.0):
        weights = [math.exp(draw.gauss(0, sharpness)) for _ in values]
        probabilities = [weight / sum(weights) for weight in weights]
        stored = [stored_bits(6.0, -math.log(p) / 3, 3) for p in probabilities]
        for bits in range(1, 7):
            assert sum(s >= bits for s in stored) <= len(values) * 2**-bits


def test_unseen_facts_within_chance_pass_and_above_it_are_a_leak():
    check_unseen(-1e6, "r1")
    check_unseen(64.0, "r1")
    with pytest.raises(
        ValueError, match="r1 must store at most 64 bits of facts that were never shown"
    ):
        check_unseen(64.5, "r1")


def _points(*pairs):
    return [LoadPoint(load=load, stored=(stored,)) for load, stored in pairs]


def test_peak_of_a_curve_that_levels_off_is_its_highest_point():
    # The last 2 bits/parameter that are offered add 0.02.
    peak = peak_of(_points((4.0, 0.42), (0.25, 0.2), (2.0, 0.4), (1.0, 0.35)))
    assert (peak.load, peak.stored, peak.rising) == (4.0, 0.42, None)


def test_peak_of_a_curve_that_falls_behind_its_peak_has_levelled_off():
    peak = peak_of(_points((0.5, 0.3), (1.0, 0.5), (2.0, 0.2)))
    assert (peak.load, peak.stored, peak.rising) == (1.0, 0.5, None)


@pytest.mark.parametrize(("last", "rises"), [(0.549, False), (0.551, True)])
def test_peak_of_a_curve_that_stores_a_tenth_of_what_is_added_is_the_boundary(last, rises):
    peak = peak_of(_points((1.0, 0.45), (2.0, last)))
    assert (peak.rising is not None) == rises


def test_peak_of_an_adapter_with_room_says_how_much_of_the_last_load_it_took():
    peak = peak_of(_points((0.5, 0.45), (1.0, 0.9)))
    assert peak.rising == "90% of the bits that the largest load adds are stored"


def test_peak_of_one_load_is_no_level():
    assert peak_of(_points((4.0, 0.1))).rising == "one load alone"


def test_peak_of_adapters_that_learnt_nothing_is_no_level():
    assert peak_of(_points((1.0, -0.1), (2.0, -0.2))).rising == "nothing is stored yet"


@pytest.mark.parametrize("pairs", [[], [(1.0, 0.2), (1.0, 0.3)]])
def test_peak_of_no_loads_or_of_one_twice_is_refused(pairs):
    with pytest.raises(ValueError, match="one or more different loads"):
        peak_of(_points(*pairs))


def test_peak_is_of_the_mean_over_seeds_with_their_range():
    points = [
        LoadPoint(load=1.0, stored=(0.2, 0.6)),
        LoadPoint(load=2.0, stored=(0.3, 0.4, 0.45)),
    ]
    peak = peak_of(points)
    assert (peak.load, peak.stored, peak.low, peak.high) == (1.0, pytest.approx(0.4), 0.2, 0.6)
