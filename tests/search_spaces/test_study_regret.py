"""What trusting a prior would have lost, on hand-made curves."""

import math

import pytest

from search_spaces.studies.points import Point
from search_spaces.studies.regret import prior_regrets

RATES = [10 ** (-4 + k / 4) for k in range(6)]
LOSSES = [2.9, 2.4, 2.1, 2.0, 2.1, math.inf]
"""A parabola but for the last."""


def arm(losses=LOSSES, offsets=(0.0, 0.0), rates=RATES):
    return [
        Point(learning_rate=rate, seed=seed, loss=loss + offset)
        for seed, offset in enumerate(offsets)
        for rate, loss in zip(rates, losses, strict=True)
    ]


def test_prior_regrets_at_and_between_points_of_a_parabola():
    found = prior_regrets(arm(), {"best": RATES[3], "beside": RATES[2], "between": 10**-3.375})
    assert found["best"].regret_frac == pytest.approx(0, abs=1e-9)
    assert found["beside"].regret_frac == pytest.approx(0.05)
    assert found["between"].regret_frac == pytest.approx(0.025)  # linear in log10: 2.05
    assert found["between"].learning_rate == 10**-3.375
    assert {one.note for one in found.values()} == {None}


@pytest.mark.parametrize(
    ("log10_rate", "note"),
    [
        (-4.01, "below the grid"),
        (-2.75, "diverged"),
        (-2.7, "diverged"),
        (-2.9, "beside a diverged run"),
    ],
)
def test_prior_regrets_where_nothing_was_measured_has_none_with_a_note(log10_rate, note):
    [found] = prior_regrets(arm(), {"prior": 10**log10_rate}).values()
    assert (found.regret_frac, found.note) == (None, note)


def test_prior_regrets_above_a_finite_grid_says_so():
    finite = arm(LOSSES[:5], rates=RATES[:5])
    [found] = prior_regrets(finite, {"prior": 10**-2.99}).values()
    assert (found.regret_frac, found.note) == (None, "above the grid")


def test_prior_regrets_between_two_diverged_is_diverged():
    both = arm([2.4, 2.1, 2.0, 2.1, math.inf, math.inf])
    assert prior_regrets(both, {"prior": 10**-2.9})["prior"].note == "diverged"


def test_prior_regrets_without_an_optimum_are_over_the_best_point_and_say_so():
    rising = arm([2.0, 2.1, 2.2, 2.3, 2.4, 2.5])
    found = prior_regrets(rising, {"low": RATES[0], "high": RATES[-1]})
    assert found["low"].regret_frac == pytest.approx(0)
    assert found["high"].regret_frac == pytest.approx(0.25)
    assert (found["high"].note or "").startswith("over the best point: the best point, 0.0001,")
    one_seed = prior_regrets(arm(offsets=(0.0,)), {"prior": RATES[1]})["prior"]
    assert one_seed.regret_frac == pytest.approx(0.2)
    assert "one seed" in (one_seed.note or "")


def test_prior_regrets_offset_of_a_seed_that_ran_more_is_removed():
    # Seed 0 lies 1 nat above seed 1 and alone ran the lowest rate.
    points = [p for p in arm(offsets=(1.0, 0.0)) if p.seed == 0 or p.learning_rate > RATES[0]]
    found = prior_regrets(points, {"prior": RATES[0]})["prior"]
    assert found.regret_frac == pytest.approx(3.4 / 2.5 - 1)


def test_prior_regrets_no_finite_run_has_none_with_the_reason():
    diverged = arm([math.inf] * 6)
    found = prior_regrets(diverged, {"prior": 1e-4})["prior"]
    assert (found.regret_frac, found.note) == (None, "no run with a finite loss")
    assert prior_regrets([], {"prior": 1e-4})["prior"].regret_frac is None
    with pytest.raises(ValueError, match="a finite number > 0"):
        prior_regrets(diverged, {"prior": -1.0})
