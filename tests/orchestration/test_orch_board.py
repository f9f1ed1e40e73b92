"""The board between trials and groups: who gets which place, and what everyone is told."""

import pytest

from orchestration.board import Board
from tests.orchestration.boards import (
    ENDED_BY_SCHEDULER,
    ask_all,
    board_of,
    die,
    end_event,
    enter,
    placed,
    ready,
    row,
    row_event,
    told,
    trial,
    waiting,
)
from trainers.metrics import DIVERGED_LOSS

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
