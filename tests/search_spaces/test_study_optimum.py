"""The optimum of an arm: exact parabolas, edges, divergence, tolerance, and what moves nothing."""

import math
import random

import pytest

from search_spaces.fit import fit_log_parabola
from search_spaces.studies.optimum import ArmOptimum, arm_optimum
from search_spaces.studies.points import Point, Unsettled
from search_spaces.studies.student import t_quantile_95

LOGS = [-4 + k / 4 for k in range(9)]
OFFSETS = {0: 0.0, 1: 0.06, 2: -0.03}


def arm(loss_of, logs=LOGS, offsets=OFFSETS, noise=0.0, seed=0):
    rng = random.Random(seed)
    return [
        Point(learning_rate=10**x, seed=s, loss=loss_of(x) + offset + rng.gauss(0, noise))
        for s, offset in offsets.items()
        for x in logs
    ]


def parabola(x):
    return 2.0 + 0.3 * (x + 3.07) ** 2


def settled(points, **options):
    found = arm_optimum(points, **options)
    assert isinstance(found, ArmOptimum), found
    return found


def unsettled(points):
    found = arm_optimum(points)
    assert isinstance(found, Unsettled), found
    return found


def test_arm_optimum_exact_parabola_recovers_vertex_loss_and_curvature():
    found = settled(arm(parabola))
    assert found.log10_lr == pytest.approx(-3.07, abs=1e-6)
    assert found.learning_rate == pytest.approx(10**-3.07)
    assert found.loss == pytest.approx(2.01, abs=1e-6)  # the mean offset of the seeds is 0.01
    assert (found.parabola.log10_lr, found.parabola.loss) == (found.log10_lr, found.loss)
    assert found.parabola.curvature == pytest.approx(0.3, abs=1e-6)
    assert found.low < found.learning_rate < found.high
    assert found.high / found.low < 1.4
    assert all(x == pytest.approx(-3.07, abs=1e-6) for x in found.log10_by_seed.values())


def test_arm_optimum_bent_curve_is_met_better_than_by_three_points():
    # Linear plus exponential, bend 6 per decade.
    def bent(x):
        u = x - best
        return 2 + 0.6 * (math.exp(6 * u) - 1 - 6 * u) / 36

    for best in (-3.06, -3.0, -2.94, -2.88):
        points = arm(bent)
        found = settled(points)
        three = fit_log_parabola((p.learning_rate, p.loss) for p in points)
        assert abs(found.log10_lr - best) < 0.6 * abs(three.log10_lr - best)
        assert found.low < 10**best < found.high


def test_arm_optimum_each_seeds_own_optimum_is_told():
    # Seed 1 is best 0.06 decades higher: its curve is the same, moved.
    moved = [
        Point(learning_rate=10**x, seed=s, loss=parabola(x - (0.06 if s == 1 else 0)))
        for s in range(3)
        for x in LOGS
    ]
    by_seed = settled(moved).log10_by_seed
    assert by_seed[1] - by_seed[0] == pytest.approx(0.06, abs=0.005)
    assert by_seed[2] == pytest.approx(by_seed[0])


@pytest.mark.parametrize(
    ("logs", "side", "reason"),
    [
        ([-3, -2.75, -2.5], "low", "is the lowest that all seeds ran"),
        ([-3.75, -3.5, -3.25], "high", "is the highest that all seeds ran"),
        ([-3], "high", "is the highest"),
    ],
)
def test_arm_optimum_best_on_the_edge_is_unsettled_on_that_side(logs, side, reason):
    found = unsettled(arm(parabola, logs=logs))
    assert found.side == side
    assert reason in found.reason


@pytest.mark.parametrize(("wall", "side"), [(-2.9, "high"), (-3.1, "low")])
def test_arm_optimum_beside_a_diverged_run_of_any_seed_is_unsettled(wall, side):
    points = [
        Point(
            learning_rate=p.learning_rate,
            seed=p.seed,
            loss=math.inf
            if p.seed == 2 and (math.log10(p.learning_rate) > wall) == (side == "high")
            else p.loss,
        )
        for p in arm(parabola)
    ]
    found = unsettled(points)
    assert found.side == side
    assert "a diverged run" in found.reason


def test_arm_optimum_divergence_beyond_a_finite_neighbour_does_not_matter():
    points = [
        Point(learning_rate=p.learning_rate, seed=p.seed, loss=math.inf)
        if p.learning_rate > 10**-2.6
        else p
        for p in arm(parabola)
    ]
    found = settled(points, tolerance_frac=0.02)
    assert found.log10_lr == pytest.approx(-3.07, abs=1e-6)
    assert found.tolerance_high == pytest.approx(10**-2.75)
    assert not found.open_high  # a diverged run stands beyond: the grid need not grow


def test_arm_optimum_edge_of_what_all_seeds_ran_counts_not_of_one_seed():
    # Seed 0 ran all; the others only up to the best point.
    points = [p for p in arm(parabola) if p.seed == 0 or p.learning_rate < 10**-2.9]
    assert unsettled(points).side == "high"


def test_arm_optimum_points_of_the_first_seed_alone_help_without_their_offset():
    wide = [
        p
        for p in arm(parabola, offsets={0: 0.5, 1: 0.0, 2: -0.5})
        if p.seed == 0 or abs(math.log10(p.learning_rate) + 3) < 0.3
    ]
    found = settled(wide)
    assert found.log10_lr == pytest.approx(-3.07, abs=1e-6)
    assert found.loss == pytest.approx(2.0)


def test_arm_optimum_nothing_to_fit_says_why():
    assert "no run with a finite loss" in unsettled([]).reason
    diverged = arm(lambda _: math.inf)
    assert (unsettled(diverged).reason, unsettled(diverged).side) == (
        "no run with a finite loss",
        "low",
    )
    assert "one seed" in unsettled(arm(parabola, offsets={0: 0.0})).reason
    apart = [*arm(parabola, logs=[-3], offsets={0: 0}), *arm(parabola, logs=[-2], offsets={1: 0})]
    assert "all seeds" in unsettled(apart).reason


def test_arm_optimum_flat_within_the_noise_is_unsettled_and_no_side_helps():
    found = [unsettled(arm(lambda _: 2.0, noise=0.01, seed=k)) for k in range(20)]
    flat = [one for one in found if "flat" in one.reason]
    assert len(flat) > 10  # the others have their lowest point on the edge, by chance
    assert {one.side for one in flat} == {"none"}


def test_arm_optimum_twice_one_run_refused():
    points = arm(parabola)
    with pytest.raises(ValueError, match="one run per learning rate and seed"):
        arm_optimum([*points, points[0]])
    with pytest.raises(ValueError, match="tolerance_frac must be >= 0"):
        arm_optimum(points, tolerance_frac=-0.1)


def test_point_unusable_numbers_refused():
    with pytest.raises(ValueError, match=r"math.inf where the run diverged, got nan"):
        Point(learning_rate=1e-3, seed=0, loss=math.nan)
    with pytest.raises(ValueError, match="a finite number > 0"):
        Point(learning_rate=0.0, seed=0, loss=1.0)


def test_arm_optimum_tolerance_ends_where_the_measured_curve_crosses_the_limit():
    # Best 1.0 at -3; 0.2 per decade beside it: 2% is reached 0.1 decades away on both sides.
    def vee(x):
        return 1.0 + 0.2 * abs(x + 3)

    points = arm(vee, offsets={0: 0.0, 1: 0.0})
    found = settled(points, tolerance_frac=0.02)
    # The fit's lowest point is inserted into the measured curve, a little below its tip.
    assert found.tolerance_low == pytest.approx(10**-3.1, rel=0.06)
    assert found.tolerance_high == pytest.approx(10**-2.9, rel=0.06)
    wide = settled(points, tolerance_frac=0.5)
    assert (wide.tolerance_low, wide.tolerance_high) == pytest.approx((10**-4, 10**-2))
    assert wide.open_low
    assert wide.open_high
    assert not found.open_low


def test_arm_optimum_scaled_rates_and_raised_losses_move_only_what_they_must():
    points = arm(parabola, noise=0.004, seed=5)
    plain = settled(points)
    moved = settled(
        [
            Point(learning_rate=7 * p.learning_rate, seed=p.seed, loss=p.loss + 3.0)
            for p in reversed(points)
        ]
    )
    assert moved.learning_rate == pytest.approx(7 * plain.learning_rate)
    assert (moved.low, moved.high) == pytest.approx((7 * plain.low, 7 * plain.high))
    assert moved.loss == pytest.approx(plain.loss + 3.0)
    assert moved.parabola.curvature == pytest.approx(plain.parabola.curvature)


def test_arm_optimum_more_noise_widens_and_more_seeds_narrow_the_interval():
    def width(noise, num_seeds):
        found = settled(
            arm(parabola, offsets=dict.fromkeys(range(num_seeds), 0), noise=noise, seed=1)
        )
        return math.log10(found.high / found.low)

    assert width(0.001, 3) < width(0.008, 3)
    assert width(0.008, 12) < width(0.008, 3)


@pytest.mark.parametrize(
    ("df", "expected"),
    [(1, 12.706), (2, 4.303), (4, 2.776), (8, 2.306), (9, 2.262), (20, 2.086), (120, 1.980)],
)
def test_t_quantile_95_matches_the_table(df, expected):
    assert t_quantile_95(df) == pytest.approx(expected, abs=1e-3)


def test_t_quantile_95_without_freedom_refused():
    with pytest.raises(ValueError, match="df must be >= 1, got 0"):
        t_quantile_95(0)
