"""Which runs an arm still needs: edges, divergence, windows, reuse, and that it ends."""

import math
import random

import pytest

from search_spaces.studies.grid import next_points
from search_spaces.studies.points import Point

GRID = [1e-4, 1.77828e-4, 3.16228e-4, 5.62341e-4, 1e-3, 1.77828e-3, 3.16228e-3]
"""1e-4 to 10^-2.5 by 10^0.25."""


def run_out(loss_of, grid=GRID, seeds=(0, 1, 2), points=(), **policy):
    """The policy asked to its end; every run it asks for is new."""
    points = list(points)
    for _ in range(200):
        wanted = next_points(points, grid=grid, seeds=seeds, **policy)
        if not wanted:
            return points
        assert len(set(wanted)) == len(wanted)
        assert not {(p.learning_rate, p.seed) for p in points} & set(wanted)
        points += [Point(learning_rate=r, seed=s, loss=loss_of(r, s)) for r, s in wanted]
    raise AssertionError("the policy never came to an end")


def rates(points, seed):
    return sorted(point.learning_rate for point in points if point.seed == seed)


def bowl(best, wall=math.inf):
    """Lowest at `best`; diverges above `wall`."""
    return lambda rate, _: math.inf if rate > wall else 2 + 0.3 * math.log10(rate / best) ** 2


def test_next_points_at_first_wants_the_grid_of_the_first_seed():
    assert next_points([], grid=GRID, seeds=(7, 8)) == [(rate, 7) for rate in GRID]


def test_next_points_interior_best_other_seeds_run_half_a_decade_around_it():
    points = run_out(bowl(3.2e-4))
    assert rates(points, 0) == GRID
    assert rates(points, 1) == rates(points, 2) == GRID[:5]


def test_next_points_best_at_the_top_grows_until_the_window_is_there():
    points = run_out(bowl(3.2e-3))
    assert rates(points, 0) == [*GRID, 5.62341e-3, 1e-2]
    assert rates(points, 1) == [1e-3, 1.77828e-3, 3.16228e-3, 5.62341e-3, 1e-2]


def test_next_points_best_far_below_grows_downwards_step_by_step():
    points = run_out(bowl(1e-5))
    assert rates(points, 0)[:6] == [
        3.16228e-6,
        5.62341e-6,
        1e-5,
        1.77828e-5,
        3.16228e-5,
        5.62341e-5,
    ]
    assert rates(points, 1) == [3.16228e-6, 5.62341e-6, 1e-5, 1.77828e-5, 3.16228e-5]


def test_next_points_beside_divergence_runs_between_until_a_finite_point_is_higher():
    # Best at 1e-3, 1.78e-3 diverges: 1.33e-3 lies an eighth of a decade above, and is higher.
    points = run_out(bowl(9e-4, wall=1.5e-3))
    assert rates(points, 0) == sorted([*GRID, 1.33352e-3])
    assert rates(points, 1) == [3.16228e-4, 5.62341e-4, 1e-3, 1.33352e-3]


@pytest.mark.parametrize("wall", [1.2e-3, 1.5e-3])
def test_next_points_hopeless_beside_divergence_gives_up_at_an_eighth_of_a_decade(wall):
    # The loss falls up to the wall, whether or not the point between diverges.
    points = run_out(bowl(5e-3, wall=wall))
    assert rates(points, 0) == sorted([*GRID, 1.33352e-3])
    assert rates(points, 1) == []


def test_next_points_coarser_step_is_halved_twice_down_to_an_eighth():
    grid = [1e-5, 3.16228e-5, 1e-4, 3.16228e-4, 1e-3]
    points = run_out(bowl(1.5e-4, wall=2.5e-4), grid=grid, seeds=(0,), step_decades=0.5)
    assert rates(points, 0) == [1e-5, 3.16228e-5, 1e-4, 1.77828e-4, 2.37137e-4, 3.16228e-4, 1e-3]


def test_next_points_all_diverged_goes_down_to_the_bound_and_ends():
    points = run_out(lambda rate, _: math.inf if rate > 2e-6 else 2 + rate, max_extensions=8)
    assert min(rates(points, 0)) == 1e-6
    assert rates(points, 1) == []
    assert len(run_out(lambda *_: math.inf, max_extensions=3)) == len(GRID) + 3


def test_next_points_without_extensions_keeps_to_the_grid():
    points = run_out(bowl(1e-2), max_extensions=0)
    assert rates(points, 0) == GRID
    assert rates(points, 1) == []


def test_next_points_a_seed_whose_best_is_elsewhere_grows_and_the_window_follows_the_mean():
    # The mean of the three is best at 5.6e-4; seed 2 alone needs a point above its own best.
    shifted = {0: 3.2e-4, 1: 3.2e-4, 2: 1.8e-3}
    points = run_out(lambda rate, seed: bowl(shifted[seed])(rate, seed))
    assert rates(points, 1) == GRID[:6]
    assert rates(points, 2) == GRID


def test_next_points_a_rate_where_any_seed_diverged_counts_as_diverged():
    # 5.6e-4 diverges for seed 1 alone: all seeds run the half step below it.
    def loss(rate, seed):
        return math.inf if seed == 1 and rate > 5e-4 else bowl(3.2e-4)(rate, seed)

    points = run_out(loss)
    assert all(4.21697e-4 in rates(points, seed) for seed in (0, 1, 2))


def test_next_points_added_seed_and_grid_points_reuse_what_is_there():
    before = run_out(bowl(3.2e-4))
    assert next_points(before, grid=GRID, seeds=(0, 1, 2, 3)) == [(r, 3) for r in GRID[:5]]
    # A wider grid, rounded to other digits and from another first rate.
    wider = [5.6234e-5, *(float(f"{rate:.4g}") for rate in GRID), 5.6234e-3]
    assert next_points(before, grid=wider, seeds=(0, 1, 2)) == [(5.6234e-5, 0), (5.6234e-3, 0)]


def test_next_points_rates_of_all_seeds_are_the_same_numbers():
    rng = random.Random(0)
    for _ in range(100):
        best, noise = 10 ** rng.uniform(-6, -1), rng.choice([0.001, 0.03])
        wall = best * 10 ** rng.uniform(-0.3, 1)
        points = run_out(
            lambda r, s, best=best, wall=wall, noise=noise: (
                bowl(best, wall)(r, s) + rng.gauss(0, noise)
            )
        )
        first = set(rates(points, 0))
        others = {p.learning_rate for p in points if p.seed}
        assert all(rate in first or rate not in GRID for rate in others)
        logs = sorted({round(math.log10(p.learning_rate / GRID[0]) * 8, 3) for p in points})
        assert logs == sorted({float(round(log)) for log in logs})  # eighths of a decade


def test_next_points_scaled_grid_and_rates_gives_scaled_runs():
    by_four = [float(f"{4 * rate:.6g}") for rate in GRID]
    plain = rates(run_out(bowl(1e-2)), 1)
    scaled = rates(run_out(bowl(4e-2), grid=by_four), 1)
    assert scaled == pytest.approx([4 * rate for rate in plain], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": []}, "must not be empty"),
        ({"seeds": []}, "must not be empty"),
        ({"seeds": (1, 1)}, "no seed may come twice"),
        ({"grid": [1e-3, 0.0]}, "a finite number > 0, got 0"),
        ({"step_decades": 0.0}, "step_decades must be > 0"),
        ({"max_extensions": -1}, "max_extensions >= 0"),
    ],
)
def test_next_points_unusable_settings_refused(change, message):
    with pytest.raises(ValueError, match=message):
        next_points([], **{"grid": GRID, "seeds": (0,), **change})
