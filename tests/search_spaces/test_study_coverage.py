"""Planted studies: known optima, steep walls, noise and divergence; do the intervals cover them?

Every draw places both optima anywhere between two grid points and up to 1.6 decades beside the
centre of the grid, runs the grid policy to its end, and reads the ratio off what it ran.
"""

import math
import random
from statistics import median

import pytest

from search_spaces.studies.grid import next_points
from search_spaces.studies.optimum import arm_optimum
from search_spaces.studies.points import Point, Unsettled
from search_spaces.studies.ratio import lr_ratio
from search_spaces.studies.verdict import judge, verdict

DRAWS = 200
SEEDS = (0, 1, 2)
GRID = [float(f"{10 ** (-3 + k / 4):.6g}") for k in range(-4, 5)]
LOW_NOISE, HIGH_NOISE = 0.002, 0.01
"""Nats between runs. A quarter decade beside the best the parabola below rises by 0.019."""


def exponential(x, curvature, steepness):
    """Zero at x = 0, with a parabola's curvature there, exponential to the right."""
    return 2 * curvature * (math.exp(steepness * x) - 1 - steepness * x) / steepness**2


def two_sided(left, right):
    return lambda x: left(x) if x < 0 else right(x)


def parabola(curvature):
    return lambda x: curvature * x * x


def slow_start(height, width):
    return lambda x: height * (math.hypot(x, width) - width)


def cliff(curvature, foot):
    return lambda x: curvature * x * x + 8 * max(0.0, x - foot) ** 2


# For each kind: the loss over its best by log10(LR) over the best LR, and above which of these runs
# diverge, for FullFT and for LoRA. The best is at 0 in all of them.
KINDS = {
    "parabola": ((parabola(0.3), 1.0), (parabola(0.45), 0.9)),
    "exponential wall": (
        (two_sided(parabola(0.3), lambda x: exponential(x, 0.3, 6)), 0.7),
        (two_sided(parabola(0.21), lambda x: exponential(x, 0.21, 9)), 0.6),
    ),
    "kink": (
        (two_sided(parabola(0.3), parabola(1.2)), 0.5),
        (two_sided(parabola(0.18), parabola(1.5)), 0.45),
    ),
    "slow start": (
        (two_sided(slow_start(0.5, 0.4), lambda x: exponential(x, 0.625, 5)), 0.8),
        (two_sided(slow_start(0.4, 0.5), lambda x: exponential(x, 0.4, 8)), 0.6),
    ),
    "cliff": ((cliff(0.3, 0.25), 0.5), (cliff(0.3, 0.15), 0.45)),
    "quartic floor": (
        (lambda x: 0.05 * x**2 + 1.2 * x**4, 0.8),
        (lambda x: 0.05 * x**2 + 1.2 * x**4 + 3 * max(0.0, x) ** 3, 0.7),
    ),
    "different arms": (
        (parabola(0.3), 0.9),
        (two_sided(parabola(0.18), lambda x: exponential(x, 0.18, 10)), 0.6),
    ),
}


def planted_arm(surface, diverges_above, log10_best, noise, offsets, rng, jitter=0.0):
    """All points of an arm: the policy asked until it wants no more."""
    moved = {seed: rng.gauss(log10_best, jitter) for seed in SEEDS}
    points = []
    for _ in range(100):
        wanted = next_points(points, grid=GRID, seeds=SEEDS)
        if not wanted:
            return points
        for rate, seed in wanted:
            x = math.log10(rate) - moved[seed]
            loss = 2.3 + offsets[seed] + surface(x) + rng.gauss(0, noise)
            loss = math.inf if x > diverges_above else loss
            points.append(Point(learning_rate=rate, seed=seed, loss=loss))
    raise AssertionError("the policy never came to an end")


def planted_ratio(kind, ratio, noise, rng, jitter=0.0):
    (full, full_wall), (lora, lora_wall) = KINDS[kind]
    offsets = {seed: rng.gauss(0, 0.05) for seed in SEEDS}  # of the data order: common to both arms
    reach = 1.6 - abs(math.log10(ratio) - 1) / 2
    best = -3 - math.log10(ratio) / 2 + rng.uniform(-reach, reach)
    full_points = planted_arm(full, full_wall, best, noise, offsets, rng, jitter)
    best += math.log10(ratio)
    lora_points = planted_arm(lora, lora_wall, best, noise, offsets, rng, jitter)
    return lr_ratio(full_points, lora_points)


@pytest.mark.parametrize("ratio", [3, 10, 30])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("noise", "least_settled", "most_width"), [(LOW_NOISE, 0.99, 1.9), (HIGH_NOISE, 0.8, 2.3)]
)
def test_coverage_planted_ratio_is_in_at_least_91_percent_of_intervals(
    kind, ratio, noise, least_settled, most_width
):
    rng = random.Random(f"{kind} {ratio} {noise}")
    draws = [planted_ratio(kind, ratio, noise, rng) for _ in range(DRAWS)]
    found = [draw for draw in draws if not isinstance(draw, Unsettled)]
    covered = sum(one.low <= ratio <= one.high for one in found)
    assert len(found) >= least_settled * DRAWS
    assert covered >= 0.91 * len(found)
    assert median(one.high / one.low for one in found) < most_width


def test_coverage_seeds_whose_own_best_rates_differ_are_covered_too():
    # Each seed's whole curve lies 0.03 decades (7%) off, in each arm by itself.
    rng = random.Random(4)
    draws = [planted_ratio("exponential wall", 10, 0.004, rng, 0.03) for _ in range(DRAWS)]
    found = [draw for draw in draws if not isinstance(draw, Unsettled)]
    assert len(found) >= 0.85 * DRAWS
    assert sum(one.low <= 10 <= one.high for one in found) >= 0.91 * len(found)


def test_coverage_optimum_beyond_divergence_is_never_reported():
    rng = random.Random(1)
    for _ in range(DRAWS):
        offsets = {seed: rng.gauss(0, 0.05) for seed in SEEDS}
        wall = rng.uniform(-0.6, -0.05)  # runs diverge before the loss has turned
        best = -3 + rng.uniform(-1, 1)
        points = planted_arm(parabola(0.3), wall, best, LOW_NOISE, offsets, rng)
        found = arm_optimum(points)
        assert isinstance(found, Unsettled)
        assert (found.side, "beside a diverged run" in found.reason) == ("high", True)


@pytest.mark.parametrize("slope", [-0.2, 0.2])
def test_coverage_optimum_beyond_every_extension_is_never_reported(slope):
    rng = random.Random(2)
    points = planted_arm(lambda x: slope * x, math.inf, -3, LOW_NOISE, dict.fromkeys(SEEDS, 0), rng)
    found = arm_optimum(points)
    assert isinstance(found, Unsettled)
    assert found.side == ("high" if slope < 0 else "low")


def test_coverage_flat_surfaces_give_an_undecided_verdict():
    rng = random.Random(3)
    for _ in range(50):
        offsets = {seed: rng.gauss(0, 0.05) for seed in SEEDS}
        arms = [
            planted_arm(lambda x: 0.0, math.inf, -3, HIGH_NOISE, offsets, rng) for _ in range(2)
        ]
        ratio = lr_ratio(*arms)
        found = verdict(judge(ratio, {"ten": 10.0, "two": 2.0}), ratio, "ten")
        assert found.status == "undecided"
        assert found.would_decide
