"""The board between trials and groups: who gets which place, and what everyone is told."""

import asyncio
import math
import random
from collections.abc import Callable

import pytest

from orchestration.board import MAX_STARTS, STOP, Board
from orchestration.broker import Broker
from orchestration.suspects import MAX_DEATHS, SHARED_DEATHS
from trainers.metrics import DIVERGED_LOSS

BASE = {"model": "base", "quantization": "nf4"}
DATA = {"data": "rows.jsonl", "seq_len": 64}
ENDED_BY_SCHEDULER = {"status": "stopped", "reason": "stopped by its scheduler"}


def trial(name: str, *, full: bool = False, **other: dict) -> dict:
    """A trial's dict, as far as the board reads it."""
    parts = {"base": BASE, "data": DATA, "candidate": {"full_finetune": full}}
    return {"name": name} | parts | other


def row_event(name: str, index: int, *, last: bool = False) -> dict:
    return {"kind": "row", "trial": name, "index": index, "row": row(index), "last": last}


def end_event(name: str, status: str = "finished", reason: str = "") -> dict:
    return {"kind": "end", "trial": name, "status": status, "reason": reason}


def row(index: int) -> dict:
    return {"examples": 16 * (index + 1), "eval_loss": 3.0 - index}


def enter(name: str, index: int = 0) -> tuple:
    return ("enter", name, index)


def board_of(*groups: str, places: int = 2, one_run: bool = False) -> Board:
    """A board whose groups are ready and open."""
    board = Board(num_groups=len(groups), one_run=one_run)
    for name in groups:
        ready(board, name)
    board.open(places)
    return board


def ready(board: Board, group: str, incarnation: str = "first") -> None:
    """A group's workers start and have loaded the base."""
    assert board.begin(group, incarnation)
    board.hello(group, incarnation, {"max_tokens": 512})


def told(board: Board, group: str) -> list[tuple]:
    """What a group hears, as (kind, trial, index)."""
    return [
        (command["kind"], _name_of(command), command.get("index"))
        for command in board.take_commands(group)
    ]


def _name_of(command: dict) -> str | None:
    found = command.get("trial")
    return found["name"] if isinstance(found, dict) else found


def placed(board: Board) -> dict[str, list[str]]:
    """Group -> names of its trials, in the order in which they came."""
    return {name: [entry.name for entry in g.trials] for name, g in board.groups.items()}


def waiting(board: Board) -> list[str]:
    return [entry.name for entry in board.queue]


def ask_all(board: Board, *names: str) -> None:
    for name in names:
        board.ask(trial(name), 0)


def die(board: Board, group: str, incarnation: str) -> None:
    """A group's workers die while they train, and new ones come back."""
    board.take_commands(group)
    ready(board, group, incarnation)


# Places


def test_enlisted_trials_get_places_in_their_order_whoever_asks_first():
    board = Board(num_groups=1)
    ready(board, "g")
    board.enlist([(trial(name), 0) for name in "abcd"])
    ask_all(board, "d", "c", "b")
    board.open(2)
    assert placed(board) == {"g": ["a", "b"]}
    assert told(board, "g") == [enter("a"), enter("b")]
    board.hear([row_event("a", 0, last=True), end_event("a")])
    assert placed(board) == {"g": ["b", "c"]}
    board.ask(trial("a"), 0)  # its thin trial lives at last
    assert board.answer("a", 0) == {"row": row(0), "last": True}


def test_enlisted_trial_goes_on_from_the_evaluation_it_is_enlisted_with():
    board = board_of("g", places=1)
    board.enlist([(trial("a"), 3)])
    board.ask(trial("a"), 3)
    assert told(board, "g") == [enter("a", 3)]
    board.ask(trial("a"), 4)
    assert told(board, "g") == [("allow", "a", 4)]


def test_trials_put_ahead_get_the_next_places_in_their_order_before_those_of_the_plan():
    board = board_of("g", places=1)
    board.enlist([(trial(name), 0) for name in "abc"])
    for name in "xy":
        board.put_ahead(trial(name))
    assert (placed(board), waiting(board)) == ({"g": ["a"]}, ["x", "y", "b", "c"])
    ask_all(board, "x")
    board.hear([row_event("a", 0, last=True), end_event("a")])
    assert (placed(board), waiting(board)) == ({"g": ["x"]}, ["y", "b", "c"])


def test_cancelled_trial_ends_with_the_reason_that_it_is_cancelled_for():
    board = board_of("g", places=1)
    ask_all(board, "a", "b")
    told(board, "g")
    for name in "ba":
        board.cancel(name, "stopped by somebody")
    ended = {"status": "stopped", "reason": "stopped by somebody"}
    assert board.answer("a", 0) == board.answer("b", 0) == {"ended": ended, "row": None}
    assert told(board, "g") == [("cancel", "a", None)]
    assert (placed(board), waiting(board)) == ({"g": []}, [])


def test_enlisted_twice_is_one_trial():
    board = board_of("g", places=1)
    for _ in range(2):
        board.enlist([(trial("a"), 0), (trial("b"), 0)])
    assert placed(board) == {"g": ["a"]}
    assert waiting(board) == ["b"]


def test_ask_more_than_places_holds_only_places_and_the_rest_waits_in_order():
    board = board_of("g")
    ask_all(board, "a", "b", "c", "d")
    assert placed(board) == {"g": ["a", "b"]}
    assert waiting(board) == ["c", "d"]
    assert told(board, "g") == [enter("a"), enter("b")]


def test_ask_before_open_or_before_a_group_is_ready_waits_then_enters_in_the_order_of_asking():
    board = Board(num_groups=1)
    ask_all(board, "c", "a", "b")
    ready(board, "g")
    assert told(board, "g") == []
    board.open(2)
    assert told(board, "g") == [enter("c"), enter("a")]
    assert waiting(board) == ["b"]


def test_open_a_second_time_with_more_places_lets_the_waiting_in():
    board = board_of("g", places=1)
    ask_all(board, "a", "b", "c")
    board.open(3)
    assert told(board, "g") == [enter("a"), enter("b"), enter("c")]


def test_open_with_fewer_places_lets_nobody_in_before_there_is_room():
    board = board_of("g", places=2)
    ask_all(board, "a", "b", "c")
    board.open(1)
    board.cancel("a")
    assert placed(board) == {"g": ["b"]}
    board.cancel("b")
    assert placed(board) == {"g": ["c"]}


def test_ask_two_groups_takes_the_emptier_one():
    board = board_of("g", "h", places=2)
    ask_all(board, "a", "b", "c", "d", "e")
    assert placed(board) == {"g": ["a", "c"], "h": ["b", "d"]}
    assert waiting(board) == ["e"]


def test_group_that_comes_later_takes_those_that_wait():
    board = board_of("g", places=1)
    ask_all(board, "a", "b", "c")
    ready(board, "h")
    assert placed(board) == {"g": ["a"], "h": ["b"]}


# Asking


@pytest.mark.parametrize("times", [1, 2, 5])
def test_ask_again_changes_nothing(times):
    board = board_of("g")
    for _ in range(times):
        board.ask(trial("a"), 0)
    assert told(board, "g") == [enter("a")]
    for _ in range(times):
        board.ask(trial("a"), 1)
    assert told(board, "g") == [("allow", "a", 1)]
    board.ask(trial("a"), 0)  # a new actor of the trial starts over
    assert told(board, "g") == []


def test_ask_the_next_allows_only_that_trial():
    board = board_of("g")
    ask_all(board, "a", "b")
    told(board, "g")
    board.hear([row_event("a", 0), row_event("b", 0)])
    assert told(board, "g") == []  # nobody asked for more yet
    board.ask(trial("b"), 1)
    assert told(board, "g") == [("allow", "b", 1)]


def test_ask_further_while_waiting_enters_with_the_last_number():
    board = board_of("g", places=1)
    ask_all(board, "a", "b")
    board.ask(trial("b"), 2)
    assert told(board, "g") == [enter("a")]
    board.cancel("a")
    assert told(board, "g") == [("cancel", "a", None), enter("b", 2)]


def test_take_commands_tells_each_command_once():
    board = board_of("g")
    ask_all(board, "a")
    assert told(board, "g") == [enter("a")]
    assert told(board, "g") == []


def test_take_commands_of_a_board_that_stops_ends_with_stop_every_time():
    board = board_of("g")
    ask_all(board, "a")
    board.stopping = True
    assert told(board, "g") == [enter("a"), ("stop", None, None)]
    assert told(board, "g") == [("stop", None, None)]


# Answers


def test_answer_is_none_until_the_row_is_there():
    board = Board(num_groups=1)
    ask_all(board, "a")
    assert board.answer("a", 0) is None  # no group yet
    ready(board, "g")
    board.open(1)
    assert board.answer("a", 0) is None
    board.hear([row_event("a", 0)])
    assert board.answer("a", 0) == {"row": row(0), "last": False}
    assert board.answer("a", 1) is None


def test_answer_of_the_last_row_says_so_and_earlier_rows_are_answered_as_before():
    board = board_of("g")
    ask_all(board, "a")
    board.hear([row_event("a", 0), row_event("a", 1, last=True), end_event("a")])
    assert board.answer("a", 1) == {"row": row(1), "last": True}
    assert board.answer("a", 0) == {"row": row(0), "last": False}
    assert board.answer("a", 2) == {
        "ended": {"status": "finished", "reason": ""},
        "row": row(1),
    }


def test_answer_of_a_trial_that_diverged_gives_the_reason_and_its_last_row():
    board = board_of("g")
    ask_all(board, "a")
    board.hear([row_event("a", 0), end_event("a", "diverged", "train_loss nan at step 3")])
    ended = {"status": "diverged", "reason": "train_loss nan at step 3"}
    assert board.answer("a", 1) == {"ended": ended, "row": row(0)}
    assert DIVERGED_LOSS not in board.entries["a"].rows[0].values()


def test_answer_of_a_trial_that_failed_before_any_row_has_none():
    board = board_of("g")
    ask_all(board, "a")
    board.hear([end_event("a", "failed", "no such layer")])
    ended = {"status": "failed", "reason": "no such layer"}
    assert board.answer("a", 0) == {"ended": ended, "row": None}


def test_answer_of_a_cancelled_trial_says_stopped():
    board = board_of("g")
    ask_all(board, "a")
    board.cancel("a")
    assert board.answer("a", 0) == {"ended": ENDED_BY_SCHEDULER, "row": None}


def test_answer_with_no_group_left_names_each_reason_once():
    board = board_of("g", "h", "i")
    ask_all(board, "a")
    for group in ("g", "h"):
        board.lose(group, "OutOfMemoryError: 5 GB")
    assert board.answer("a", 0) is None  # one is left
    board.lose("i", "ValueError: no such file")
    with pytest.raises(ValueError, match="no worker group is left") as error:
        board.answer("a", 0)
    assert str(error.value).count("OutOfMemoryError: 5 GB") == 1
    assert "ValueError: no such file" in str(error.value)


def test_answer_with_a_group_that_still_loads_is_not_an_error():
    board = Board(num_groups=2)
    board.begin("g", "first")
    board.begin("h", "first")
    board.lose("g", "OutOfMemoryError")
    board.open(1)
    ask_all(board, "a")
    assert board.answer("a", 0) is None
    ready(board, "h")
    assert told(board, "h") == [enter("a")]


def test_answer_of_rows_that_are_there_outlives_the_groups():
    board = board_of("g")
    ask_all(board, "a", "b")
    board.hear([row_event("a", 0), end_event("b", "failed", "no")])
    board.lose("g", "gone")
    assert board.answer("a", 0) == {"row": row(0), "last": False}
    assert board.answer("b", 0) == {"ended": {"status": "failed", "reason": "no"}, "row": None}
    with pytest.raises(ValueError, match="gone"):
        board.answer("a", 1)


# Rows and ends


def test_row_told_twice_is_one_row():
    board = board_of("g", places=1)
    ask_all(board, "a", "b")
    events = [row_event("a", 0), row_event("a", 1, last=True), end_event("a")]
    board.hear(events)
    board.hear(events)
    assert board.answer("a", 0) == {"row": row(0), "last": False}
    assert board.answer("a", 1) == {"row": row(1), "last": True}
    assert placed(board) == {"g": ["b"]}
    assert waiting(board) == []


def test_events_that_overtake_each_other_are_heard_in_the_order_in_which_they_were_told():
    board = board_of("g", "h", places=1)
    ask_all(board, "a", "b")
    board.hear_from("g", 1, end_event("a"))
    board.hear_from("h", 0, row_event("b", 0))
    assert board.answer("a", 0) is None
    assert board.answer("b", 0) == {"row": row(0), "last": False}
    board.hear_from("g", 0, row_event("a", 0, last=True))
    assert board.answer("a", 0) == {"row": row(0), "last": True}
    assert placed(board) == {"g": [], "h": ["b"]}


def test_events_of_new_workers_are_numbered_from_0_again():
    board = board_of("g", places=1)
    ask_all(board, "a")
    board.hear_from("g", 0, row_event("a", 0))
    board.hear_from("g", 2, end_event("a"))
    die(board, "g", "second")
    board.hear_from("g", 0, row_event("a", 0))
    assert board.answer("a", 1) is None
    board.hear_from("g", 1, row_event("a", 1, last=True))
    assert board.answer("a", 1) == {"row": row(1), "last": True}


def test_end_frees_the_place_at_once_and_the_first_end_counts():
    board = board_of("g", places=1)
    ask_all(board, "a", "b")
    told(board, "g")
    board.hear([end_event("a", "diverged", "nan"), end_event("a", "finished")])
    assert told(board, "g") == [enter("b")]  # the group itself ended a, and need not be told
    assert board.answer("a", 0) == {"ended": {"status": "diverged", "reason": "nan"}, "row": None}


def test_row_of_a_cancelled_trial_does_not_bring_it_back():
    board = board_of("g", places=1)
    ask_all(board, "a", "b")
    board.cancel("a")
    board.hear([row_event("a", 0), end_event("a")])
    assert placed(board) == {"g": ["b"]}
    assert board.answer("a", 1) == {"ended": ENDED_BY_SCHEDULER, "row": row(0)}


# Cancelling


def test_cancel_frees_the_place_and_the_next_enters_after_the_cancel_in_one_list():
    board = board_of("g", places=2)
    ask_all(board, "a", "b", "c", "d")
    told(board, "g")
    board.cancel("b")
    board.cancel("a")
    assert told(board, "g") == [
        ("cancel", "b", None),
        enter("c"),
        ("cancel", "a", None),
        enter("d"),
    ]
    assert placed(board) == {"g": ["c", "d"]}


def test_cancel_of_a_trial_that_waits_takes_it_out_of_the_line_and_tells_no_group():
    board = board_of("g", places=1)
    ask_all(board, "a", "b", "c")
    told(board, "g")
    board.cancel("b")
    assert told(board, "g") == []
    assert waiting(board) == ["c"]


@pytest.mark.parametrize("first", ["cancel", "end"])
def test_cancel_of_what_has_ended_changes_nothing(first):
    board = board_of("g", places=1)
    ask_all(board, "a", "b")
    if first == "cancel":
        board.cancel("a")
    else:
        board.hear([end_event("a")])
    told(board, "g")
    answer = board.answer("a", 0)
    board.cancel("a")
    assert told(board, "g") == []
    assert board.answer("a", 0) == answer


def test_put_off_gives_the_place_to_the_next_and_waits_to_be_asked_for_again():
    board = board_of("g", places=1)
    board.enlist([(trial(name), 0) for name in "abc"])
    told(board, "g")
    board.put_off("a")
    assert told(board, "g") == [("cancel", "a", None), enter("b")]
    assert waiting(board) == ["c"]
    board.hear([end_event("b"), end_event("c")])
    assert placed(board) == {"g": []}
    ask_all(board, "a", "a")
    assert told(board, "g") == [enter("c"), enter("a")]
    assert placed(board) == {"g": ["a"]}


def test_put_off_of_a_trial_that_waits_takes_it_out_of_the_line_until_it_is_asked_for():
    board = board_of("g", places=1)
    board.enlist([(trial(name), 0) for name in "abc"])
    told(board, "g")
    board.put_off("b")
    assert waiting(board) == ["c"]
    ask_all(board, "b")
    assert waiting(board) == ["c", "b"]
    assert told(board, "g") == []


def test_put_off_keeps_the_rows_that_are_there_and_an_end_that_was_on_its_way():
    board = board_of("g", places=1)
    board.enlist([(trial("a"), 0)])
    board.hear([row_event("a", 0)])
    board.put_off("a")
    board.hear([end_event("a", "diverged", "NaN")])
    ask_all(board, "a")
    assert board.answer("a", 0) == {"row": row(0), "last": False}
    assert placed(board) == {"g": []}


@pytest.mark.parametrize("name", ["nobody", "ended"])
def test_put_off_of_what_is_not_there_or_has_ended_changes_nothing(name):
    board = board_of("g", places=1)
    ask_all(board, "ended", "b")
    board.hear([end_event("ended")])
    told(board, "g")
    board.put_off(name)
    assert told(board, "g") == []
    assert placed(board) == {"g": ["b"]}


def test_cancel_of_a_trial_that_never_asked_changes_nothing():
    board = board_of("g")
    board.cancel("nobody")
    ask_all(board, "a")
    assert placed(board) == {"g": ["a"]}


# Deaths


def test_hello_after_a_death_lets_its_trials_in_again_first_and_in_their_order():
    board = board_of("g", places=2)
    ask_all(board, "a", "b", "c", "d")
    board.hear([row_event("a", 0)])
    board.ask(trial("a"), 1)
    die(board, "g", "second")
    assert told(board, "g") == [enter("a", 1), enter("b")]
    assert waiting(board) == ["c", "d"]
    assert [board.entries[name].blame.deaths for name in "abcd"] == [1, 1, 0, 0]


def test_begin_after_a_death_gives_the_trials_to_others_before_the_base_is_loaded_again():
    board = board_of("g", "h", places=2)
    ask_all(board, "a", "b", "c", "d")  # a and c in g
    board.cancel("b")
    told(board, "g")
    told(board, "h")
    board.begin("g", "second")
    assert placed(board) == {"g": [], "h": ["d", "a"]}
    assert told(board, "h") == [enter("a")]
    assert waiting(board) == ["c"]
    ready(board, "g", "second")
    assert told(board, "g") == [enter("c")]


def test_workers_whose_place_others_took_are_told_to_stop():
    async def heard(incarnation: str) -> list:
        broker = Broker(1, one_run=False)
        await broker.begin("g", "second")
        await broker.hello("g", "second", {})
        return await broker.commands("g", incarnation, 0.01)

    assert asyncio.run(heard("first")) == [STOP]
    assert asyncio.run(heard("second")) == []


def test_begin_after_a_death_lets_nobody_into_the_group_that_loads():
    board = board_of("g", places=2)
    ask_all(board, "a")
    board.take_commands("g")
    board.begin("g", "second")
    ask_all(board, "b")
    assert placed(board) == {"g": []}
    board.hello("g", "second", {})
    assert told(board, "g") == [enter("a"), enter("b")]
    assert [board.entries[name].blame.deaths for name in "ab"] == [1, 0]


def test_is_current_is_true_of_the_living_workers_alone():
    board = board_of("g")
    assert board.is_current("g", "first")
    assert not board.is_current("h", "first")
    board.begin("g", "second")
    assert not board.is_current("g", "first")
    board.hello("g", "second", {})
    assert not board.is_current("g", "first")
    assert board.is_current("g", "second")
    board.lose("g", "gone")
    assert not board.is_current("g", "second")


def test_commands_for_dead_workers_are_not_told_to_the_new_ones():
    board = board_of("g", places=2)
    ask_all(board, "a", "b")
    board.hear([row_event("a", 0)])
    board.ask(trial("a"), 1)
    board.cancel("b")
    die(board, "g", "second")
    assert told(board, "g") == [enter("a", 1)]


def test_pack_that_died_twice_is_parted_and_each_half_has_a_group_for_itself():
    board = board_of("g", places=4)
    ask_all(board, "a", "b", "c", "d")
    for number in range(SHARED_DEATHS):
        assert placed(board) == {"g": ["a", "b", "c", "d"]}
        die(board, "g", f"after {number}")
    assert placed(board) == {"g": ["a", "b"]}
    ask_all(board, "e")  # it may share, but those before it must come to their turn
    die(board, "g", "once more")
    assert placed(board) == {"g": ["a"]}
    assert waiting(board) == ["b", "c", "d", "e"]


def test_half_that_comes_to_its_next_evaluations_is_cleared_and_makes_room_for_the_other():
    board = board_of("g", places=4)
    ask_all(board, "a", "b", "c", "d", "e")
    for number in range(SHARED_DEATHS):
        die(board, "g", f"after {number}")
    told(board, "g")
    board.hear([row_event("a", 0)])
    assert placed(board) == {"g": ["a", "b"]}  # b must show it too
    board.hear([row_event("b", 0)])
    assert placed(board) == {"g": ["c", "d"]}
    assert told(board, "g") == [
        ("cancel", "b", None),
        ("cancel", "a", None),
        enter("c"),
        enter("d"),
    ]
    assert waiting(board) == ["a", "b", "e"]
    board.hear([row_event("c", 0), end_event("d")])
    assert placed(board) == {"g": ["c", "a", "b", "e"]}  # nobody is under suspicion any more
    assert [entry.blame.deaths for entry in board.entries.values()] == [0, 0, 0, SHARED_DEATHS, 0]


def test_half_that_waits_takes_no_group_while_another_may_come_back_empty():
    board = board_of("g", "h", places=2)
    ask_all(board, "a", "b", "c", "d")  # a and c in g
    for number in range(SHARED_DEATHS):
        board.gone("g", 0.0, deaths={"g": "SIGKILL"})
        if number == 0:
            ready(board, "g", f"after {number}")
    assert placed(board) == {"g": [], "h": ["b", "d"]}
    ready(board, "g", "at last")
    assert placed(board) == {"g": ["a"], "h": ["b", "d"]}
    assert waiting(board) == ["c"]
    board.hear([row_event("a", 0)])
    assert placed(board) == {"g": ["c"], "h": ["b", "d"]}
    assert waiting(board) == ["a"]


@pytest.mark.parametrize("size", range(1, 10))
def test_trial_that_kills_its_workers_fails_alone_and_the_others_go_on(size):
    for culprit in range(size):
        board = board_of("g", places=size)
        names = [f"t{number}" for number in range(size)]
        killer = names[culprit]
        ask_all(board, *names)
        others = [name for name in names if name != killer]
        deaths = steps = 0
        while not board.entries[killer].ended or sorted(placed(board)["g"]) != others:
            steps += 1
            assert steps < 40
            inside = placed(board)["g"]
            if killer in inside:
                deaths += 1
                board.gone("g", 0.0, deaths={"g": "exit code 139"})
                ready(board, "g", f"after {deaths}")
                continue
            for name in inside:  # they come to their next evaluations
                index = len(board.entries[name].rows)
                board.ask(trial(name), index)
                board.hear([row_event(name, index)])
        assert deaths <= max(MAX_DEATHS, SHARED_DEATHS + math.ceil(math.log2(size)) + 1)
        answer = board.answer(killer, 0)
        assert answer is not None
        assert answer["ended"]["status"] == "failed"
        assert f"its worker died {deaths} times" in answer["ended"]["reason"]
        assert answer["ended"]["reason"].endswith("the last time: exit code 139")
        assert [name for name in others if board.entries[name].ended] == []


def test_deaths_that_no_trial_causes_add_up_to_nothing():
    board = board_of("g", places=2)
    ask_all(board, "a", "b")
    for number in range(50):  # a worker dies between any two evaluations of both
        board.gone("g", 0.0, deaths={"g": "SIGKILL"})
        ready(board, "g", f"after {number}")
        for name in ("a", "b"):
            board.ask(trial(name), number + 1)
            board.hear([row_event(name, number)])
    assert placed(board) == {"g": ["a", "b"]}
    assert [entry.ended for entry in board.entries.values()] == [None, None]


def test_begin_more_often_than_the_limit_gives_the_group_up():
    board = Board(num_groups=1)
    ask_all(board, "a")
    assert [board.begin("g", str(k)) for k in range(MAX_STARTS + 1)] == [
        *[True] * MAX_STARTS,
        False,
    ]
    with pytest.raises(ValueError, match=f"died {MAX_STARTS} times while they loaded the base"):
        board.answer("a", 0)


def test_begin_counts_the_starts_in_a_row_alone():
    board = Board(num_groups=2)
    for number in range(3):
        assert all(board.begin("g", f"{number} {k}") for k in range(MAX_STARTS))
        board.hello("g", str(number), {})
    assert board.begin("h", "first")  # another group's starts are its own
    assert all(board.begin("g", f"last {k}") for k in range(MAX_STARTS))
    assert not board.begin("g", "one more")


def test_lose_gives_the_trials_to_others_and_keeps_the_first_reason():
    board = board_of("g", "h", places=2)
    ask_all(board, "a", "b", "c")  # a and c in g
    board.lose("g", "OutOfMemoryError")
    board.lose("g", "it was told to stop")
    assert placed(board) == {"g": [], "h": ["b", "a"]}
    assert waiting(board) == ["c"]
    assert board.groups["g"].lost == "OutOfMemoryError"


def test_lost_group_gets_no_trial():
    board = board_of("g", "h", places=1)
    board.lose("g", "gone")
    ask_all(board, "a", "b")
    assert placed(board) == {"g": [], "h": ["a"]}
    assert waiting(board) == ["b"]


# Groups that are one run: the death of one group's worker restarts all of them


def test_one_run_death_of_a_worker_counts_once_for_every_trial_and_keeps_their_order():
    board = board_of("g", "h", places=2, one_run=True)
    ask_all(board, "a", "b", "c", "d", "e")
    board.begin("h", "second")
    assert placed(board) == {"g": [], "h": []}
    assert waiting(board) == ["a", "c", "b", "d", "e"]  # those of g, those of h, who waited
    board.hello("h", "second", {})
    assert placed(board) == {"g": [], "h": ["b", "d"]}  # each where its forwards are known
    board.begin("g", "second")  # of the same death
    board.hello("g", "second", {})
    assert placed(board) == {"g": ["a", "c"], "h": ["b", "d"]}
    assert [board.entries[name].blame.deaths for name in "abcde"] == [1, 1, 1, 1, 0]


def test_one_run_death_of_one_group_s_worker_is_laid_to_its_own_trials_alone():
    board = board_of("g", "h", places=1, one_run=True)
    ask_all(board, "a", "b")
    for name in ("g", "h"):  # Ray Train ends both, and says whose worker died
        board.gone(name, 0.0, deaths={"h": "SIGKILL"})
    assert [board.entries[name].blame.deaths for name in "ab"] == [0, 1]
    for name in ("g", "h"):
        ready(board, name, "second")
    assert placed(board) == {"g": ["a"], "h": ["b"]}  # each where its forwards are known


def test_one_run_group_that_still_loads_does_not_hide_the_next_death_of_the_other():
    board = board_of("g", "h", places=1, one_run=True)
    ask_all(board, "a", "b")
    ready(board, "g", "second")
    assert placed(board)["g"] == ["a"]
    ready(board, "g", "third")
    assert [board.entries[name].blame.deaths for name in "ab"] == [2, 1]
    ready(board, "h", "third")
    assert placed(board) == {"g": ["a"], "h": ["b"]}


def test_one_run_group_that_died_while_it_loaded_does_not_bury_the_others_of_the_next_start():
    board = board_of("g", "h", places=1, one_run=True)
    ready(board, "g", "second")
    board.begin("h", "second")  # and dies before it is ready
    ready(board, "h", "third")
    assert not board.is_current("g", "second")
    ready(board, "g", "third")
    assert board.is_current("h", "third")
    assert board.is_current("g", "third")
    ask_all(board, "a", "b")
    assert placed(board) == {"g": ["a"], "h": ["b"]}


def test_one_run_trial_that_kills_its_worker_fails_alone_and_takes_no_other_with_it():
    board = board_of("g", "h", places=1, one_run=True)
    ask_all(board, "killer", "b", "c")
    deaths = 0
    while board.entries["killer"].ended is None:
        (where,) = (name for name, names in placed(board).items() if "killer" in names)
        deaths += 1
        for group in ("g", "h"):
            board.gone(group, 0.0, deaths={where: "SIGKILL"})
        for group in ("g", "h"):
            ready(board, group, f"after {deaths}")
    assert deaths == MAX_DEATHS
    assert [board.entries[name].blame.deaths for name in "bc"] == [0, 0]


def test_enlisted_trials_go_to_the_groups_that_an_earlier_driver_gave_them():
    board = Board(num_groups=2, one_run=True)
    board.enlist([(trial(name), 0) for name in "abcd"], {"a": "h", "b": "h", "c": "g", "d": "k"})
    board.open(2)
    board.gone("h", 0.0)
    ready(board, "g")
    assert placed(board) == {"g": ["c", "d"]}  # there is no group k any more
    ready(board, "h")
    assert placed(board) == {"g": ["c", "d"], "h": ["a", "b"]}


# Who may share a group


def test_full_finetune_has_a_group_for_itself_and_those_behind_it_wait():
    board = board_of("g", places=2)
    ask_all(board, "a")
    board.ask(trial("full", full=True), 0)
    ask_all(board, "b")
    assert placed(board) == {"g": ["a"]}
    assert waiting(board) == ["full", "b"]
    board.hear([end_event("a")])
    assert placed(board) == {"g": ["full"]}
    board.hear([end_event("full")])
    assert placed(board) == {"g": ["b"]}


@pytest.mark.parametrize(
    "other",
    [
        {"base": BASE | {"quantization": "none"}},
        {"base": BASE | {"model": "another"}},
        {"data": DATA | {"seq_len": 32}},
    ],
)
def test_trial_of_another_base_or_data_enters_another_group_or_an_empty_one(other):
    board = board_of("g", "h", places=2)
    ask_all(board, "a")
    board.ask(trial("x", **other), 0)
    board.ask(trial("y", **other), 0)
    ask_all(board, "b")
    assert placed(board) == {"g": ["a", "b"], "h": ["x", "y"]}
    board.ask(trial("z", **other), 0)
    board.hear([end_event("a")])
    assert waiting(board) == ["z"]  # there is room in g, but not for it
    ask_all(board, "c")
    assert placed(board)["g"] == ["b", "c"]
    board.hear([end_event("b"), end_event("c")])
    assert placed(board) == {"g": ["z"], "h": ["x", "y"]}


def test_pack_key_does_not_depend_on_the_order_of_keys():
    board = board_of("g", places=2)
    ask_all(board, "a")
    board.ask(trial("b", base=dict(reversed(BASE.items()))), 0)
    assert placed(board) == {"g": ["a", "b"]}


# Any order of events


class Sweep:
    """A random sweep over a board: its groups live, die and are lost, its trials ask and end."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.groups = [f"g{i}" for i in range(self.rng.randint(1, 3))]
        self.one_run = self.rng.random() < 0.5
        self.board = Board(num_groups=len(self.groups), one_run=self.one_run)
        self.names = [f"t{i}" for i in range(self.rng.randint(1, 9))]
        self.kinds = {name: self._kind() for name in self.names}
        self.places = self.rng.randint(1, 4)
        self.board.open(self.places)
        self.incarnations = self.attempt = 0
        self.begun: dict[str, int] = {}
        self.living: dict[str, str] = {}
        self.put_off: set[str] = set()
        self.cleared: set[str] = set()

    def _kind(self) -> dict:
        other = [{"base": BASE | {"model": "another"}}, {"full": True}]
        return self.rng.choice([{}, {}, {}, *other])

    def step(self) -> None:
        """Something happens."""
        events: list[Callable[[], None]] = [self._ask] * 6 + [self._worker_speaks] * 6
        events += [self._cancel, self._take, self._take, self._group_starts, self._group_starts]
        events += [self._put_off, self._workers_die, self._node_will_go, self._give_back]
        if self.rng.random() < 0.02:
            events = [self._lose]
        self.rng.choice(events)()

    def _ask(self) -> None:
        name = self.rng.choice(self.names)
        entry = self.board.entries.get(name)
        index = entry.asked + self.rng.randint(0, 1) if entry else 0
        self.board.ask(trial(name, **self.kinds[name]), index)
        self.put_off.discard(name)

    def _put_off(self) -> None:
        name = self.rng.choice(self.names)
        self.board.put_off(name)
        if name in self.board.entries:
            self.put_off.add(name)

    def _cancel(self) -> None:
        self.board.cancel(self.rng.choice(self.names))

    def _take(self) -> None:
        name = self.rng.choice(self.groups)
        if name in self.board.groups:
            self.board.take_commands(name)

    def _worker_speaks(self) -> None:
        if not self._inside():
            return
        entry = self.rng.choice(self._inside())
        if len(entry.rows) <= entry.asked:
            self.cleared.add(entry.name)
            self.board.hear([row_event(entry.name, len(entry.rows))])
        elif self.rng.random() < 0.5:
            status = self.rng.choice(["finished", "diverged", "failed"])
            self.board.hear([end_event(entry.name, status)])

    def _group_starts(self) -> None:
        """A group's workers start: in one run all do, in any order, until the next death."""
        name = self.rng.choice(self.groups)
        if self.board.groups.get(name, LOST).lost:
            return
        if not self.one_run or self.begun.get(name, 0) == self.attempt:
            self.attempt += 1
        self.begun[name] = self.attempt
        for dead in self.groups if self.one_run else [name]:
            if self.begun.get(dead) != self.attempt or dead == name:
                self.living.pop(dead, None)
        if not self.board.begin(name, str(self.attempt)):
            return
        if self.rng.random() < 0.7:
            self.incarnations += 1
            self.living[name] = str(self.incarnations)
            self.board.hello(name, self.living[name], {})

    def _lose(self) -> None:
        name = self.rng.choice(self.groups)
        self.living.pop(name, None)
        self.board.lose(name, "gone")

    def _workers_die(self) -> None:
        if self.living:
            name = self.rng.choice(sorted(self.living))
            del self.living[name]
            self.board.gone(name, 0.0, preempted=self.rng.random() < 0.5)

    def _node_will_go(self) -> None:
        if self.living:
            name = self.rng.choice(sorted(self.living))
            event = {"kind": "preempted", "deadline": 1.0}
            self.board.hear_from(name, self.board.groups[name].num_heard, event)

    def _give_back(self) -> None:
        for entry in [e for g in self.board.groups.values() if g.leaving for e in g.trials][:1]:
            self.board.hear([{"kind": "back", "trial": entry.name}])

    def check(self) -> None:
        """What must hold after every event."""
        groups = self.board.groups.values()
        current = {name: g.incarnation for name, g in self.board.groups.items() if g.incarnation}
        assert current == self.living
        for group in groups:
            assert len(group.trials) <= self.places
            assert not (group.lost and group.trials)
            assert len({self._sort(entry.name) for entry in group.trials}) <= 1
            alone = [entry for entry in group.trials if "full" in self.kinds[entry.name]]
            assert not alone or len(group.trials) == 1
            self._check_cohort(group)
        inside = [entry.name for entry in self._inside()]
        queue = waiting(self.board)
        ended = [name for name, entry in self.board.entries.items() if entry.ended]
        idle = [name for name in self.put_off if name not in ended]
        assert sorted(inside + queue + ended + idle) == sorted(self.board.entries)
        self._check_that_nobody_waits_in_vain()

    def _sort(self, name: str) -> str:
        return str(self.kinds[name].get("base"))

    def _inside(self) -> list:
        return [entry for group in self.board.groups.values() for entry in group.trials]

    def _check_cohort(self, group) -> None:
        """Who is under suspicion has none beside it but those that are so for the same deaths, and those of
        them that were cleared since."""
        cohorts = {entry.blame.cohort for entry in group.trials} - {0}
        assert len(cohorts) <= 1
        innocent = {entry.name for entry in group.trials if not entry.blame.cohort}
        assert not cohorts or innocent <= self.cleared

    def _comes_back(self, name: str | None) -> bool:
        """Whether a group was there, is not lost, and has no workers now."""
        known = name is not None and name in self.board.groups
        return known and not self.board.groups[name].lost and name not in self.living

    def _check_that_nobody_waits_in_vain(self) -> None:
        ready = [g for g in self.board.groups.values() if g.incarnation and not g.leaving]
        for entry in self.board.queue:
            if self.one_run and self._comes_back(entry.home):
                continue  # it waits for the group whose forwards it shared
            needs_itself = "full" in self.kinds[entry.name] or entry.blame.cohort
            for group in ready:
                assert group.trials, f"{entry.name} waits, and a group is empty"
                others = group.trials
                same = self._sort(others[0].name) == self._sort(entry.name)
                full = any("full" in self.kinds[e.name] for e in (entry, *others))
                cohort = all(e.blame.cohort == entry.blame.cohort for e in others)
                room = len(others) < self.places
                assert not (same and cohort and room and not full)
            if needs_itself:
                return  # whoever stands behind it waits for it


@pytest.mark.parametrize("block", range(10))
def test_board_any_order_of_events_keeps_the_places_and_lets_nobody_wait_in_vain(block):
    for seed in range(40 * block, 40 * (block + 1)):
        sweep = Sweep(seed)
        for _ in range(120):
            sweep.step()
            sweep.check()


@pytest.mark.parametrize("block", range(5))
def test_board_any_sweep_ends_when_its_groups_stay_alive(block):
    for seed in range(20 * block, 20 * (block + 1)):
        sweep = Sweep(seed)
        for _ in range(60):
            sweep.step()
        board = sweep.board
        living = [name for name in sweep.groups if not board.groups.get(name, LOST).lost]
        if not living:
            continue
        for name in living:
            board.begin(name, "last")
            board.hello(name, f"last of {name}", {})
        for name in sweep.names:
            board.ask(trial(name, **sweep.kinds[name]), 0)
        for _ in sweep.names:
            for name in [entry.name for g in board.groups.values() for entry in list(g.trials)]:
                board.hear([end_event(name)])
        assert all(board.entries[name].ended for name in sweep.names)
        assert waiting(board) == []


class LOST:
    lost = ""
