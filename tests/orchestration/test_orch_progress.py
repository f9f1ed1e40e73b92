"""The live view of a sweep on terminals of several sizes, and the lines where there is no terminal."""

import io
import threading

import pytest
from rich.console import Console

from orchestration.board import Board
from orchestration.live_view import view
from orchestration.objective import LOSS, REWARD
from orchestration.progress import Progress
from orchestration.trial_states import SweepState, TrialState
from tests.orchestration.sweep_records import record
from tests.orchestration.sweeps import wait_until


def lines_of(tell) -> list[str]:
    """What is told where there is no terminal, without its times."""
    stream = io.StringIO()
    with Progress(["a", "b"], 3, 64, Console(file=stream, width=200)) as progress:
        tell(progress)
    return [line.split("] ", 1)[1] for line in stream.getvalue().splitlines()]


def test_progress_without_a_terminal_says_a_line_per_evaluation_and_the_end_in_the_last():
    def tell(progress):
        progress.note("starting 1 worker group(s), loading the base")
        progress.started("a")
        progress.reported("a", {"examples": 16, "eval_loss": 2.5})
        progress.reported("a", {"examples": 64, "eval_loss": 2.25})
        progress.ended("a", "finished", "")
        progress.started("b")
        progress.started("b")  # tried again
        progress.ended("b", "failed", "[/x] broke")

    assert lines_of(tell) == [
        "starting 1 worker group(s), loading the base",
        "a: 16/64 examples, eval_loss 2.5000",
        "a: finished, 64/64 examples, eval_loss 2.2500",
        "b: failed ([/x] broke)",
    ]


def test_progress_without_a_terminal_asks_no_group():
    def tell(progress):
        with progress.following(lambda: pytest.fail("asked"), 1):
            pass

    assert lines_of(tell) == []


def state(**values) -> SweepState:
    shared = {"objective": LOSS, "num_examples": 64, "eval_every": 16, "num_trials": 4}
    shared |= {"num_discarded": 0, "discarded": {}, "began": 100.0, "trials": {}}
    return SweepState(**shared | values)


def shown(found: SweepState, *, now: float = 110.0, width: int = 120, height: int = 30) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, width=width, height=height, force_terminal=True, color_system=None
    )
    console.print(view(found, now, width, height))
    lines = stream.getvalue().splitlines()
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    return stream.getvalue()


def test_view_shows_rungs_rates_packs_the_best_and_what_was_discarded():
    sweep = state(num_discarded=9, discarded={"capacity": 8, "memory": 1}, num_groups=2)
    for name in ("a", "b"):
        sweep.started(name, 100.0)
    sweep.saw_packs({"group-0": ["a", "b"], "group-1": []}, 102.0)
    sweep.reported("a", 16, 2.5, 106.0)
    sweep.reported("b", 32, 2.75, 106.0)
    text = shown(sweep)
    # 4 x 64 - 48 examples at 6 a second.
    assert "0/4 trials ended, 10.0 s, 6.0 examples/s, about 34.7 s left at most" in text
    assert "best so far: eval_loss 2.5000, a" in text
    a, b = (line.split() for line in text.splitlines() if "group-0, K=2" in line)
    assert a[:7] == ["a", "running", "1/4", "16", "4.0", "2.5000", "2.5000"]
    assert b[:7] == ["b", "running", "2/4", "32", "8.0", "2.7500", "2.7500"]
    assert "2 of 2 worker group(s) ready: group-0 K=2, group-1 K=0" in text
    assert "2 waiting" in text
    assert "8 discarded before any trial by the rule capacity" in text
    assert "1 discarded before any trial by the rule memory" in text


def test_view_while_the_base_is_loaded_says_how_many_groups_are_ready_and_how_long_it_takes():
    text = shown(state(num_groups=2))
    assert "loading the base: 0 of 2 worker group(s) ready after 10.0 s" in text
    assert "examples/s" not in text
    sweep = state(num_groups=2)
    sweep.saw_packs({"group-1": []}, 105.0)
    assert "1 of 2 worker group(s) ready: group-1 K=0" in shown(sweep)
    assert "loading" not in shown(state())  # engine solo: nobody says


@pytest.mark.parametrize(("width", "height"), [(80, 12), (80, 24), (200, 50)])
def test_view_of_a_long_sweep_fits_the_terminal_running_ones_first(width, height):
    sweep = state(num_trials=500, num_discarded=40, discarded={"capacity": 40}, num_groups=4)
    sweep.trials |= {f"trial-{i:03d}-{'x' * 60}": TrialState("") for i in range(500)}
    for number, (name, trial) in enumerate(sweep.trials.items()):
        trial.name = name
        if number < 200:
            sweep.reported(name, 64, 3.0 - number / 1000, 101.0)
            sweep.ended(name, "diverged" if number == 199 else "finished")
        elif number < 206:
            sweep.reported(name, 16, 3.5, 102.0)
    text = shown(sweep, width=width, height=height)
    assert "200/500 trials ended" in text
    assert "294 waiting, 199 finished, 1 diverged" in text
    rows = [row.strip() for row in text.splitlines() if row.strip().startswith("trial-")]
    assert [row[6:9] for row in rows[:3]] == ["200", "201", "202"]
    if height > 20:
        assert [row[6:9] for row in rows[6:8]] == [
            "198",
            "197",
        ]  # the best of those that can be chosen
        assert len(rows) <= 6 + 5


def test_view_at_the_end_is_the_headline_and_the_counts():
    sweep = state(num_trials=2)
    for name, loss in (("a", 2.5), ("b", 2.25)):
        sweep.reported(name, 64, loss, 105.0)
        sweep.ended(name, "finished")
    sweep.is_over = True
    assert shown(sweep).splitlines() == [
        "2/2 trials ended, 10.0 s",
        "best: eval_loss 2.2500, b",
        "2 finished",
    ]


def test_states_of_a_resumed_sweep_count_what_an_earlier_driver_left_but_not_as_its_pace():
    sweep = state(num_trials=3)
    sweep.was(record(1e-3, 3.0))  # 640 examples
    sweep.was(record(1e-2, 3.2, status="unfinished", num_rows=2))  # 160 of them
    assert (sweep.num_ended, sweep.rate(101.0), sweep.left_s(101.0)) == (1, None, None)
    sweep.num_examples = 640
    began = next(t for t in sweep.trials.values() if t.is_open)
    sweep.started(began.name, 101.0)
    sweep.reported(began.name, 320, 3.1, 111.0)
    assert sweep.rate(111.0) == 16.0
    assert sweep.left_s(111.0) == (320 + 640) / 16


def test_states_never_call_best_what_diverged_and_show_rewards_as_they_are():
    sweep = state(objective=REWARD)
    for name, loss, status in (("a", -0.5, "finished"), ("b", -0.9, "diverged")):
        sweep.reported(name, 64, loss, 105.0)
        sweep.ended(name, status)
    assert "best so far: eval_reward 0.5000, a" in shown(sweep)


def test_progress_on_a_terminal_follows_the_groups_and_leaves_one_summary():
    looked, stream = threading.Event(), io.StringIO()

    def look() -> dict[str, list[str]]:
        looked.set()
        return {"group-0": ["a"]}

    console = Console(file=stream, width=120, height=20, force_terminal=True, color_system=None)
    with Progress(["a"], 0, 64, console, eval_every=16) as progress, progress.following(look, 1):
        progress.started("a")
        assert looked.wait(30)
        progress.reported("a", {"examples": 16, "eval_loss": 2.5})
        progress.note("still [here]")
        wait_until(lambda: "K=1" in stream.getvalue())
        progress.added("b")
        progress.ended("a", "finished", "")
    text = stream.getvalue()
    assert "still [here]" in text
    assert text.splitlines()[-2] == "1 waiting, 1 finished"  # before the cursor is shown again
    assert not [
        t for t in threading.enumerate() if t.name.startswith("Thread") and "_look" in t.name
    ]


def test_board_packs_are_the_trials_of_the_groups_that_are_ready():
    board = Board(2)
    board.open(2)
    shared = {"base": {}, "data": {}, "candidate": {"full_finetune": False}}
    board.enlist([({"name": name, **shared}, 0) for name in ("a", "b", "c")])
    assert board.packs() == {}
    board.begin("group-0", "x")
    board.hello("group-0", "i", {})
    board.begin("group-1", "x")
    assert board.packs() == {"group-0": ["a", "b"]}
