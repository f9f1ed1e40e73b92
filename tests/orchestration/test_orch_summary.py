"""What a report says in words, each branch from numbers that were made for it; and the fits behind it."""

import math

import pytest

from orchestration.effects import axis_effect, seed_noise
from orchestration.lr_curves import edge_of, rate_curves, varied_axes
from orchestration.summary import Found, summary
from search_spaces.studies.optimum import ArmOptimum, RateOptimum, one_seed_optimum
from search_spaces.studies.points import Point, Unsettled
from tests.orchestration.sweep_records import BASE_LOSS, BEST_LOG10, grid_records, record

PLAN = {"discarded": []}
PARABOLA = {1e-4: 3.1, 3e-4: 3.02, 1e-3: 3.0, 3e-3: 3.05}


def curve(losses=PARABOLA, **shared):
    """Trials along learning rates."""
    return [record(rate, loss, **shared) for rate, loss in losses.items()]


def told(records, plan=PLAN, *, chosen=None) -> str:
    usable = [r for r in records if r.best and r.status in ("finished", "stopped")]
    best = chosen or min(usable, key=lambda r: r.best["eval_loss"], default=None)
    return "\n".join(summary(Found(plan, records, best)))


def seeded(losses: dict[int, tuple[float, float]]):
    """A better and a worse candidate, each on several seeds."""
    return [
        record(rate, loss, seed=seed)
        for seed, pair in losses.items()
        for rate, loss in zip((1e-3, 3e-3), pair, strict=True)
    ]


def test_summary_names_the_best_its_lead_and_that_one_seed_decides_nothing():
    text = told(curve())
    assert (
        "Best: rank 8, learning_rate 1.00e-3, batch 16, with eval_loss 3.0000 after 640 examples."
        in text
    )
    assert "0.3000, 9.1% better than the untouched base (3.3000)" in text
    assert "The second (rank 8, learning_rate 3.00e-4, batch 16) is 0.0200 behind" in text
    assert "one seed decides nothing" in text
    assert "Next: run the best and the second on other seeds" in text


def test_summary_says_where_the_fit_puts_the_optimum_of_one_seed_without_an_interval():
    text = told(curve())
    assert "lies inside the grid; the fit puts the optimum at" in text
    assert "(one seed gives no interval)" in text
    assert "within 0.5% of it" in text


@pytest.mark.parametrize(
    ("gap", "words", "advice"),
    [
        (0.1, "which is beyond what seeds", "nothing here asks for another run"),
        (0.004, "the two cannot be told apart", "take the cheaper of the two"),
    ],
)
def test_summary_compares_the_lead_with_what_seeds_differ_by(gap, words, advice):
    records = [
        *seeded({seed: (3.0 + off, 3.0 + gap + off) for seed, off in ((0, 0.0), (1, 0.01))}),
        *(record(rate, 3.29, seed=seed) for rate in (1e-4, 1e-2) for seed in (0, 1)),
    ]
    text = told(records)
    assert words in text
    assert "standard deviation 0.0050" in text  # of the four candidates, two did not differ
    assert advice in text


@pytest.mark.parametrize(("rate", "side"), [(1e-4, "lower"), (1e-2, "higher")])
def test_summary_warns_of_an_optimum_at_the_edge_and_says_where_to_go(rate, side):
    rates = (1e-4, 1e-3, 1e-2)
    records = [record(r, 3.0 + 0.1 * abs(math.log10(r / rate))) for r in rates]
    text = told(records)
    end = "lowest" if side == "lower" else "highest"
    assert f"the {end} that was tried: the optimum may lie beyond the grid" in text
    assert f"extend learning_rate by two or three {side} values" in text


def test_summary_of_a_best_beside_a_diverged_run_is_no_edge_and_not_fitted():
    records = [*curve({1e-4: 3.1, 3e-4: 3.05, 1e-3: 3.0}), record(3e-3, 3.2, status="diverged")]
    text = told(records)
    assert "inside the grid; where the optimum is was not fitted" in text
    assert "stands beside a diverged run" in text
    assert "1 diverged" in text


def test_summary_of_one_learning_rate_or_one_candidate_says_so():
    text = told([record(1e-3, 3.0)])
    assert "No other candidate has a usable score" in text
    assert "One learning rate was tried" in text
    assert "compare it with other learning rates" in text


def test_summary_of_what_is_no_better_than_the_base_looks_for_other_rates():
    text = told(curve({1e-4: 3.4, 1e-3: 3.35, 1e-2: 3.5}))
    assert "not better than the untouched base (3.3000)" in text
    assert "ten times lower and ten times higher" in text


def test_summary_of_a_best_that_was_chosen_by_something_else_says_so():
    records = curve()
    text = told(records, chosen=records[1])
    assert "has a better eval_loss, by 0.0200: it was not what the best was chosen by" in text


def test_summary_without_a_usable_trial_advises_by_how_they_ended():
    diverged = told([record(1e-1, 3.5, status="diverged"), record(1.0, 3.5, status="diverged")])
    assert "No trial ended with a usable score" in diverged
    assert "lower the learning rates" in diverged
    failed = told([record(1e-3, None, status="failed"), record(1e-1, 3.5, status="diverged")])
    assert "1 diverged, 1 failed" in failed
    assert "mend what the reasons name" in failed


def test_summary_of_an_interrupted_sweep_says_to_go_on():
    text = told([*curve(), record(1e-2, 3.1, status="unfinished", num_rows=2)])
    assert "1 did not end" in text
    assert "`tenfold resume` goes on" in text


def test_summary_counts_what_was_discarded_by_rule_and_what_was_stopped():
    rules = [{"rule": "capacity"}, {"rule": "capacity"}, {"rule": "memory"}]
    records = [*curve(), record(1e-2, 3.2, status="stopped", num_rows=2)]
    text = told(records, {"discarded": rules})
    assert (
        "3 candidates were discarded before any trial (2 by the rule capacity, 1 by the rule memory)"
        in text
    )
    assert "Of 5 trials, 1 was stopped early by the scheduler." in text
    assert "1 candidate was discarded" in told(curve(), {"discarded": rules[:1]})


def test_summary_says_what_rank_and_batch_seem_to_do():
    text = told(grid_records())
    assert "at rank 1 to 2.9302 at rank 64: the larger the rank, the better" in text
    assert "at batch 32: the smaller the batch, the better" in text
    assert "one seed cannot say whether that is real" in text
    mixed = [
        r
        for rank, x in ((1, 0.0), (8, 0.1), (64, 0.05))
        for r in curve({1e-3: 3 + x, 1e-2: 3.1 + x}, lora_rank=rank)
    ]
    assert "no order in it" in told(mixed)


def test_summary_tries_higher_ranks_where_the_highest_is_best_beyond_the_noise():
    records = [
        record(
            rate,
            3.2 - 0.1 * rank + 0.05 * abs(math.log10(rate) + 3) + 0.001 * seed,
            lora_rank=rank,
            seed=seed,
        )
        for rank in (1, 2)
        for rate in (1e-4, 1e-3, 1e-2)
        for seed in (0, 1)
    ]
    text = told(records)
    assert "beyond what seeds differ by" in text
    assert "the highest rank is best: try higher ones" in text


# The numbers behind it


def test_rate_curves_of_a_grid_are_fitted_near_where_each_was_made_best():
    curves = rate_curves(grid_records())
    assert [c.label for c in curves] == [
        f"rank {r}, batch {b}" for r in (1, 8, 64) for b in (16, 32)
    ]
    for found, batch in zip(curves, (16, 32) * 3, strict=True):
        assert isinstance(found.optimum, RateOptimum)
        made = BEST_LOG10 + 0.1 * math.log2(batch / 16)
        assert found.optimum.log10_lr == pytest.approx(made, abs=0.1)
        assert found.edge == ""
        assert len(found.records) == 7


def test_rate_curves_never_fit_too_few_points_nor_unequal_budgets():
    (two,) = rate_curves(curve({1e-3: 3.0, 1e-2: 3.1}))
    assert isinstance(two.optimum, Unsettled)
    assert two.optimum.reason == "2 learning rate(s) ran to their ends: a fit needs 3"
    stopped = [*curve({1e-3: 3.0, 3e-3: 3.05}), record(1e-4, 3.2, status="stopped", num_rows=2)]
    (halved,) = rate_curves(stopped)
    assert isinstance(halved.optimum, Unsettled)
    assert "unequal budgets are not fitted" in halved.optimum.reason
    (empty,) = rate_curves([record(1e-3, None, status="failed")])
    assert isinstance(empty.optimum, Unsettled)
    assert empty.optimum.reason == "no trial ran to its end"


def test_rate_curves_of_random_draws_are_not_fitted_through_what_differs_otherwise():
    records = [record(10 ** (-4 + i / 5), 3.0 + 0.01 * i, weight_decay=i / 100) for i in range(12)]
    assert varied_axes(records) == ["lora_rank"]
    (one,) = rate_curves(records)
    assert isinstance(one.optimum, Unsettled)
    assert "differ in weight_decay too" in one.optimum.reason


def test_rate_curves_of_several_seeds_have_an_interval_that_holds_the_optimum():
    made = -2.9
    records = [
        record(
            10**x,
            3.0 + 0.2 * (x - made) ** 2 + 0.002 * (seed - 1) + 0.0005 * ((7 * seed + i) % 3),
            seed=seed,
        )
        for i, x in enumerate((-4.0, -3.75, -3.5, -3.25, -3.0, -2.75, -2.5, -2.25, -2.0))
        for seed in range(3)
    ]
    (one,) = rate_curves(records)
    assert isinstance(one.optimum, ArmOptimum)
    assert one.optimum.low < 10**made < one.optimum.high


def test_one_seed_optimum_of_an_exact_parabola_is_its_vertex_and_its_tolerance():
    points = [
        Point(learning_rate=10**x, seed=0, loss=2.0 + 0.5 * (x + 3.1) ** 2) for x in (-4, -3, -2)
    ]
    found = one_seed_optimum(points, tolerance_frac=0.5)
    assert isinstance(found, RateOptimum)
    assert (found.log10_lr, found.loss) == pytest.approx((-3.1, 2.0))
    assert found.parabola.curvature == pytest.approx(0.5)
    assert (found.open_low, found.open_high) == (True, True)
    with pytest.raises(ValueError, match="one seed"):
        one_seed_optimum([*points, Point(learning_rate=1e-3, seed=1, loss=2.0)])


def test_edge_of_looks_at_every_rate_that_was_tried():
    assert edge_of(curve({1e-3: 3.0, 1e-2: 3.1})) == "lowest"
    assert edge_of([*curve({1e-3: 3.1, 1e-2: 3.0}), record(1e-1, 3.2, status="diverged")]) == ""
    assert edge_of([record(1e-3, 3.0)]) == ""


def test_axis_effect_is_the_best_of_each_value_and_nothing_of_a_single_one():
    records = [*curve(lora_rank=1), *curve({1e-3: 2.9, 1e-2: 2.95}, lora_rank=8)]
    levels = axis_effect(records, "lora_rank")
    assert [(level.value, level.loss, level.num_trials) for level in levels] == [
        (1, 3.0, 4),
        (8, 2.9, 2),
    ]
    assert axis_effect(records, "global_batch_size") == []


def test_seed_noise_is_pooled_and_leaves_out_what_was_stopped():
    records = seeded({0: (3.0, 3.1), 1: (3.02, 3.14)})
    # Variances of (3.0, 3.02) and (3.1, 3.14): 0.0002 and 0.0008.
    assert seed_noise(records) == pytest.approx(0.0005**0.5)
    assert seed_noise([record(1e-3, 3.0), record(1e-3, 3.2, seed=1, status="stopped")]) is None
    assert records[0].base_loss == BASE_LOSS
