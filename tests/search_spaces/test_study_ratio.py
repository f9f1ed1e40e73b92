"""The ratio of two arms and the gap of their losses, on planted arms."""

import math
import random

import pytest

from search_spaces.studies.points import Point, Unsettled
from search_spaces.studies.ratio import Gap, Ratio, loss_gap, lr_ratio

FULL_BEST, LORA_BEST = -4.3, -3.3  # a ratio of 10
OFFSETS = {0: 0.0, 1: 0.05, 2: -0.04}


def arm(log10_best, *, loss=2.0, noise=0.002, curvature=0.3, seeds=(0, 1, 2), draw=0, scale=1.0):
    rng = random.Random(f"{log10_best} {draw}")
    centre = round(log10_best * 4) / 4
    return [
        Point(
            learning_rate=scale * 10**x,
            seed=seed,
            loss=loss
            + OFFSETS.get(seed, 0.0)
            + curvature * (x - log10_best) ** 2
            + rng.gauss(0, noise),
        )
        for seed in seeds
        for x in (centre + k / 4 for k in range(-4, 5))
    ]


def settled(full, lora):
    found = lr_ratio(full, lora)
    assert isinstance(found, Ratio), found
    return found


def test_lr_ratio_planted_ten_is_found_and_held():
    found = settled(arm(FULL_BEST), arm(LORA_BEST))
    assert found.estimate == pytest.approx(10, rel=0.08)
    assert found.low < 10 < found.high
    assert found.high / found.low < 1.6
    assert set(found.by_seed) == {0, 1, 2}
    assert all(value == pytest.approx(10, rel=0.25) for value in found.by_seed.values())
    assert found.low < math.prod(found.by_seed.values()) ** (1 / 3) < found.high
    assert 0 < found.misfit_decades <= math.log10(found.high / found.low) / 2
    assert "Student's t" in found.method


def test_lr_ratio_scaled_rates_of_an_arm_scale_the_ratio_and_of_both_leave_it():
    full, lora = arm(FULL_BEST), arm(LORA_BEST)
    plain = settled(full, lora)
    lora_up = settled(full, arm(LORA_BEST, scale=3))
    both_up = settled(arm(FULL_BEST, scale=3), arm(LORA_BEST, scale=3))
    expected = (plain.low, plain.estimate, plain.high)
    assert (both_up.low, both_up.estimate, both_up.high) == pytest.approx(expected)
    assert (lora_up.low, lora_up.estimate, lora_up.high) == pytest.approx([3 * x for x in expected])


def test_lr_ratio_swapped_arms_give_the_inverse():
    full, lora = arm(FULL_BEST), arm(LORA_BEST)
    plain, swapped = settled(full, lora), settled(lora, full)
    assert swapped.estimate == pytest.approx(1 / plain.estimate)
    assert (swapped.low, swapped.high) == pytest.approx((1 / plain.high, 1 / plain.low))


def test_lr_ratio_raised_losses_leave_it():
    full = arm(FULL_BEST)
    plain = settled(full, arm(LORA_BEST))
    raised = settled(full, arm(LORA_BEST, loss=3.5))
    assert (raised.low, raised.high) == pytest.approx((plain.low, plain.high))


def test_lr_ratio_counts_only_the_seeds_of_both_arms():
    full = [*arm(FULL_BEST), *arm(FULL_BEST - 2, seeds=(9,))]
    assert settled(full, arm(LORA_BEST)) == settled(arm(FULL_BEST), arm(LORA_BEST))
    found = lr_ratio(full, arm(LORA_BEST, seeds=(0, 7)))
    assert isinstance(found, Unsettled)
    assert "one seed" in found.reason


def test_lr_ratio_unsettled_arm_is_named_with_its_side():
    upper = [p for p in arm(LORA_BEST) if math.log10(p.learning_rate) < LORA_BEST + 0.1]
    found = lr_ratio(arm(FULL_BEST), upper)
    assert isinstance(found, Unsettled)
    assert (found.reason[:5], found.side) == ("LoRA:", "high")
    found = lr_ratio([], arm(LORA_BEST))
    assert isinstance(found, Unsettled)
    assert found.reason.startswith("FullFT: no run")


def test_loss_gap_planted_gap_is_held_by_at_least_91_percent_of_intervals():
    found = [
        loss_gap(arm(FULL_BEST, draw=k), arm(LORA_BEST, loss=2.03, curvature=0.5, draw=k))
        for k in range(200)
    ]
    gaps = [gap for gap in found if isinstance(gap, Gap)]
    assert len(gaps) == 200
    assert sum(gap.low <= 0.03 <= gap.high for gap in gaps) >= 182
    assert sorted(gap.high - gap.low for gap in gaps)[100] < 0.03
    assert all(gap.low < gap.estimate < gap.high for gap in gaps)


def test_loss_gap_offset_of_the_data_order_is_no_noise():
    # Seeds differ by 0.09 nats in both arms alike; the paired interval is far narrower.
    found = loss_gap(arm(FULL_BEST, noise=1e-4), arm(LORA_BEST, noise=1e-4, loss=2.03))
    assert isinstance(found, Gap)
    assert found.estimate == pytest.approx(0.03, abs=0.003)
    assert found.high - found.low < 0.02


def test_loss_gap_of_an_unsettled_arm_is_unsettled():
    found = loss_gap(arm(FULL_BEST), arm(LORA_BEST, seeds=(0,)))
    assert isinstance(found, Unsettled)
