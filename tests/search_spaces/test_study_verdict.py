"""Verdicts on hand-made intervals, and what would decide the open ones."""

import pytest

from search_spaces import doctrine
from search_spaces.studies.points import Unsettled
from search_spaces.studies.ratio import Ratio
from search_spaces.studies.verdict import judge, verdict

TEN, RIVAL, SHORT = "10 x FullFT", "hidden / (2 alpha)", "15 x"
AT_128 = {TEN: 10.0, RIVAL: 2.0, SHORT: 15.0}


def ratio(estimate, low, high, *, seeds=3, misfit=0.02):
    return Ratio(
        estimate=estimate,
        low=low,
        high=high,
        by_seed=dict(enumerate([estimate] * seeds)),
        method="by hand",
        misfit_decades=misfit,
    )


def statuses(measured, predictions=AT_128):
    return {claim.name: claim.status for claim in judge(measured, predictions)}


def decided(measured, predictions=AT_128, **more):
    return verdict(judge(measured, predictions), measured, TEN, **more)


def test_judge_interval_around_ten_alone_supports_it_and_contradicts_the_rivals():
    measured = ratio(9.8, 8.2, 11.7)
    assert statuses(measured) == {TEN: "supported", RIVAL: "contradicted", SHORT: "contradicted"}
    found = decided(measured, steps=300)
    assert (found.status, found.would_decide) == ("supported", None)
    assert "9.8 (95%: 8.2 to 11.7)" in found.sentence


def test_judge_interval_around_two_contradicts_ten_and_says_what_it_holds():
    measured = ratio(2.1, 1.7, 2.6)
    assert statuses(measured) == {TEN: "contradicted", RIVAL: "supported", SHORT: "contradicted"}
    found = decided(measured)
    assert (found.status, found.would_decide) == ("contradicted", None)
    assert "It holds hidden / (2 alpha) (2)." in found.sentence
    assert "It holds no other law either." in decided(ratio(4.5, 4.0, 5.0)).sentence


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (10.0, 12.0, "supported"),  # the ends belong to the interval
        (10.1, 12.0, "contradicted"),
        (8.0, 9.9, "contradicted"),
        (5.0, 14.9, "supported"),
        (4.6, 14.9, "undecided"),  # wider than half a decade
        (8.0, 15.0, "undecided"),  # 15 is in it
    ],
)
def test_judge_boundaries_of_the_interval(low, high, expected):
    assert statuses(ratio(10.5, low, high))[TEN] == expected


def test_judge_rival_that_says_the_same_does_not_stand_in_the_way():
    # hidden 640, alpha 32: the rival law says 10 too; at 704 it says 11.
    for same in (10.0, 11.0):
        found = statuses(ratio(10, 8.5, 11.8), {TEN: 10.0, RIVAL: same, SHORT: 15.0})
        assert (found[TEN], found[RIVAL]) == ("supported", "supported")


def test_judge_unsettled_ratio_leaves_every_claim_undecided_with_the_reason():
    measured = Unsettled(reason="LoRA: the best point, 0.01, is the highest", side="high")
    claims = judge(measured, AT_128)
    assert {claim.status for claim in claims} == {"undecided"}
    assert all(measured.reason in claim.sentence for claim in claims)
    found = decided(measured)
    assert found.status == "undecided"
    assert found.would_decide is not None
    assert found.would_decide.startswith("a grid that reaches further up")
    assert "more seeds" in (decided(Unsettled(reason="LoRA: flat")).would_decide or "")


def test_verdict_rival_inside_the_interval_asks_for_seeds_and_for_another_width():
    measured = ratio(9.0, 6.0, 13.5)
    predictions = {TEN: 10.0, RIVAL: 8.0 * 0.9, SHORT: 15.0}
    found = verdict(judge(measured, predictions), measured, TEN)
    assert found.status == "undecided"
    assert found.would_decide is not None
    assert "a width or alpha at which 10 x FullFT and hidden / (2 alpha) lie" in found.would_decide
    # 10 is nearer (0.046 decades, the rival 0.097): the half width of 0.176 must fall below 0.097.
    # It goes as t(2(n-1)) / sqrt(n): 1.603 at 3 seeds, so 0.87 at most: 7 seeds give 0.823 (0.0904
    # of noise, 0.0926 with the misfit of 0.02), 6 give 0.910 (0.0999).
    assert "about 7 seeds instead of 3" in found.would_decide


def test_verdict_where_only_a_finer_grid_helps_says_so():
    found = decided(ratio(12.0, 9.0, 16.0, misfit=0.12))
    assert found.status == "undecided"
    assert "a finer grid around both optima" in (found.would_decide or "")


def test_verdict_too_short_or_too_few_seeds_decides_nothing():
    good = ratio(9.8, 8.2, 11.7)
    short = decided(good, steps=299)
    assert short.status == "undecided"
    assert "too small a study (runs of 299 steps)" in short.sentence
    assert "9.8 (95%: 8.2 to 11.7)" in short.sentence
    assert "runs of at least 300 steps" in (short.would_decide or "")
    few = decided(ratio(2.0, 1.8, 2.2, seeds=2))
    assert few.status == "undecided"
    assert few.would_decide == "at least 3 seeds"


def test_verdict_unknown_main_and_unusable_prediction_refused():
    with pytest.raises(ValueError, match="name_of_main must be one of"):
        verdict(judge(ratio(1, 1, 1), AT_128), ratio(1, 1, 1), "ten")
    with pytest.raises(ValueError, match="must be > 0, got 0"):
        judge(ratio(1, 1, 1), {TEN: 0.0})


@pytest.mark.parametrize(
    ("hidden", "alpha", "low", "high"),
    [(512, 32, 4.45, 6.86), (512, 128, 2.14, 3.01)],
)
def test_root_lr_ratio_lies_in_the_intervals_it_was_not_read_off(hidden, alpha, low, high):
    assert low < doctrine.root_lr_ratio(hidden, alpha) < high


@pytest.mark.parametrize(
    ("hidden", "alpha", "expected"),
    [(128, 32, 2), (256, 32, 4), (512, 32, 8), (640, 32, 10), (128, 8, 8)],
)
def test_rival_lr_ratio_matches_the_published_examples(hidden, alpha, expected):
    assert doctrine.rival_lr_ratio(hidden, alpha) == expected
