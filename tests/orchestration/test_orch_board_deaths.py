"""The board when trials are cancelled or put off, and when workers die."""

import asyncio
import math

import pytest

from orchestration.board import MAX_STARTS, STOP, Board
from orchestration.broker import Broker
from orchestration.suspects import MAX_DEATHS, SHARED_DEATHS
from tests.orchestration.boards import (
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
