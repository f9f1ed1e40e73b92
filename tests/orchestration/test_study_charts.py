"""The study page's charts, from their traces."""

from typing import Any

import pytest

from orchestration.studies.charts import cards, picture
from orchestration.studies.curves import loss_range
from tests.orchestration.study_results import (
    arm,
    capacity,
    figure,
    lr_ratio,
    nothing_yet,
    point,
    points_of,
    series,
)


def chart(results: dict, index: int) -> Any:
    return cards(results)[index].figure


def marks(drawn: Any, symbol: str) -> list[float]:
    """The learning rates at which a chart has a symbol, from its traces that are not legend keys."""
    found = []
    for trace in drawn.data:
        symbols = trace.marker.symbol
        if isinstance(symbols, tuple):
            found += [x for x, each in zip(trace.x, symbols, strict=True) if each == symbol]
    return found


def test_curve_chart_marks_every_diverged_run_and_every_finished_one_once():
    results = lr_ratio()
    curves = chart(results, 0)
    top = curves.layout.yaxis.range[1]
    ended = points_of(results, "finished")
    above = [p for p in ended if p["eval_loss"] > top]
    assert 0 < len(above) < len(ended) / 4
    assert len(marks(curves, "x")) == len(points_of(results, "diverged")) == 22
    assert len(marks(curves, "triangle-up-open")) == len(above)
    inside = [y for t in curves.data if t.mode == "markers" and t.yaxis != "y2" for y in t.y]
    drawn = sorted(y for y in inside if y is not None)
    assert drawn == sorted(p["eval_loss"] for p in ended if p["eval_loss"] <= top)
    assert f"{len(above)} runs" in cards(results)[0].note
    assert "22 runs diverged" in cards(results)[0].note


def test_curve_chart_draws_each_fit_near_its_optimum_with_its_interval():
    curves = chart(lr_ratio(), 0)
    bars = [
        trace for trace in curves.data if trace.marker.symbol == ("line-ns", "diamond", "line-ns")
    ]
    assert [trace.x[1] for trace in bars] == [1.6e-3, 3.0e-3, 3.4e-3]  # the fourth is unsettled
    assert bars[2].x == pytest.approx((3.4e-3 / 1.3, 3.4e-3, 4.25e-3))
    assert "1.36e-3 to above 6.80e-3" in bars[2].text[0]
    bow = [trace for trace in curves.data if trace.line.width == 4 and trace.x[0] is not None][2]
    assert 3.4e-4 < min(bow.x) < 3.4e-3 < max(bow.x) < 3.4e-2
    assert min(bow.y) == pytest.approx(2.54)


def test_curve_chart_mean_has_a_gap_where_a_seed_diverged():
    one = arm("a", 1e-3, 2.0, lora_rank=1, wall=9) | {"fit": None}
    one["points"] = [point(1e-3, 0, 2.0), point(1e-3, 1, 2.5), point(2e-3, 0, 2.1)]
    one["points"] += [point(2e-3, 1, None, "diverged"), point(4e-3, 0, None, "failed")]
    mean = chart(lr_ratio() | {"arms": [one]}, 0).data[0]
    assert (mean.x, mean.y) == ((1e-3, 2e-3, 4e-3), (2.25, None, None))


@pytest.mark.parametrize(
    ("losses", "base", "highest_seen", "lowest_unseen"),
    [
        ([2.0, 2.1, 2.2, 2.3, 2.4, 40.0], 9.0, 2.4, 40.0),  # a near-diverged run squashes nothing
        ([2.0, 2.1, 2.2, 2.3, 2.4, 3.2], 2.35, 2.3, 2.4),  # what is worse than the base is out
        ([2.0, 2.1, 2.2, 2.3, 2.4, 2.5], 9.0, 2.5, 9.0),
        ([2.0], 9.0, 2.0, 9.0),
    ],
)
def test_loss_range_keeps_the_curves_and_leaves_out_the_wall(
    losses, base, highest_seen, lowest_unseen
):
    points = [point(1e-3, seed, loss) | {"base_loss": base} for seed, loss in enumerate(losses)]
    low, top = loss_range([{"points": points}])
    assert low < losses[0]
    assert highest_seen < top < lowest_unseen


def test_loss_range_shows_the_best_of_an_arm_that_is_worse_than_the_rest():
    good = {"points": [point(1e-3, seed, 2.0 + seed / 100) for seed in range(20)]}
    poor = {"points": [point(1e-3, 0, 3.0), point(1e-2, 0, 9.0)]}
    _, top = loss_range([good, poor])
    assert 3.0 < top < 9.0
    assert loss_range([{"points": [point(1e-3, 0, None, "diverged")]}]) == (0.0, 1.0)


def test_curve_chart_learning_rates_have_readable_ticks():
    axis = chart(lr_ratio(), 0).layout.xaxis
    assert axis.ticktext == ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1")
    assert axis.tickvals == pytest.approx((1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1))


def test_figure_chart_intervals_are_bands_of_lines_and_bars_of_markers():
    over_load, by_rank = (chart(capacity(), index) for index in (0, 1))
    bands = [trace for trace in over_load.data if trace.fill == "toself"]
    assert len(bands) == 3
    assert (len(bands[0].x), bands[0].y[0]) == (12, pytest.approx(0.95 * 256))
    bars = by_rank.data[0].error_y
    assert bars.array == pytest.approx((0.08, 0.07, 0, 0.1))
    assert bars.arrayminus == pytest.approx((0.12, 0.08, 0, 0.1))
    assert by_rank.layout.xaxis.ticktext == ("1", "4", "16", "64")


def test_figure_chart_on_log_axes_has_lines_and_texts_at_their_values():
    over_load = chart(capacity(), 0)
    assert [shape.x0 for shape in over_load.layout.shapes] == [2560, 10_240, 40_960]
    texts = [(note.text, 10**note.x) for note in over_load.layout.annotations]
    assert texts[1] == ("2 bits x r4", pytest.approx(10_240))
    ratio = chart(lr_ratio(), 1)
    assert [10**note.y for note in ratio.layout.annotations] == pytest.approx([10, 15])
    low, high = (10**end for end in ratio.layout.yaxis.range)
    assert low < 1.3  # 1.9 - 0.6
    assert high > 15


@pytest.mark.parametrize(
    ("results", "title"),
    [
        (lr_ratio(), "Loss by learning rate"),
        (lr_ratio() | {"kind": "batch"}, "Ratio by arm"),
        (lr_ratio() | {"kind": "batch", "figures": []}, "Loss by learning rate"),
        (capacity(), "Bits stored as the load grows"),
    ],
)
def test_picture_is_the_curves_where_they_are_the_answer_else_the_first_figure(results, title):
    main: Any = picture(results)
    assert main.layout.title.text == title


def test_picture_of_a_study_that_drew_nothing_is_none():
    assert picture(nothing_yet()) is None


def test_figure_chart_of_markers_tells_series_apart_without_colour():
    ratio = chart(lr_ratio(), 1)
    assert [trace.marker.symbol for trace in ratio.data] == ["circle", "diamond-open"]
    assert ratio.data[0].x[0] < 0 < ratio.data[1].x[0]  # beside each other over one label


def test_cards_leave_out_a_figure_that_has_no_values_yet():
    empty = figure("Nothing", "x", "y", series("a", [], [], 1.0), series("b", [1], [None]))
    results = capacity()
    results["figures"].append(empty)
    assert len(cards(results)) == 2
    assert picture(results | {"figures": [empty]}) is None


def test_curve_chart_of_rewards_marks_what_is_worse_at_the_bottom():
    results = lr_ratio()
    losses = chart(results, 0)
    for p in points_of(results, "finished"):
        p["eval_loss"] -= 4.0
    for each in results["arms"]:
        for p in each["points"]:
            p["base_loss"] -= 4.0
        if each["fit"]:
            each["fit"]["loss"] -= 4.0
            each["fit"]["parabola"]["loss"] -= 4.0
    card = cards(results | {"objective": "eval_reward"})[0]
    rewards: Any = card.figure
    assert card.heading == "Reward by learning rate"
    assert "with a reward below" in card.note
    assert "crosses at the bottom" in card.note
    low, high = rewards.layout.yaxis.range
    assert [low, high] == pytest.approx([4.0 - y for y in losses.layout.yaxis.range[::-1]])
    assert rewards.layout.yaxis.domain[1] == 1
    assert rewards.layout.yaxis2.domain[0] == 0
    assert rewards.layout.yaxis2.domain[1] == rewards.layout.yaxis.domain[0]
    assert marks(rewards, "triangle-up-open") == []
    assert marks(rewards, "triangle-down-open") == marks(losses, "triangle-up-open")
    assert rewards.layout.yaxis.title.text.startswith("eval_reward")
