"""The board when groups lose their workers: nodes that die, that are taken away, and that do not come back."""

import asyncio

import pytest

from orchestration.board import DEADLINE_GRACE_S, MAX_STARTS, Board
from orchestration.broker import Broker
from orchestration.group_watch import how_it_died, was_preempted
from orchestration.suspects import MAX_DEATHS
from tests.orchestration.boards import (
    ask_all,
    board_of,
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

NOW, WAIT_S = 1000.0, 60.0


def crashes(board: Board) -> dict[str, int]:
    return {name: entry.blame.deaths for name, entry in board.entries.items()}


def preempt(board: Board, group: str, deadline: float = NOW + 30) -> None:
    number = board.groups[group].num_heard
    board.hear_from(group, number, {"kind": "preempted", "deadline": deadline})


def back(name: str) -> dict:
    return {"kind": "back", "trial": name}


def two_groups(*, places: int = 2) -> Board:
    """g with a and c, h with b."""
    board = Board(num_groups=2, wait_s=WAIT_S)
    for name in ("g", "h"):
        ready(board, name)
    board.open(places)
    ask_all(board, "a", "b", "c")
    for name in ("g", "h"):
        board.take_commands(name)
    return board


# Nodes that die


def test_gone_group_gives_its_trials_to_another_before_its_next_workers_begin():
    board = two_groups()
    board.gone("g", NOW)
    assert placed(board) == {"g": [], "h": ["b", "a"]}
    assert waiting(board) == ["c"]
    assert told(board, "h") == [enter("a")]
    assert crashes(board) == {"a": 1, "b": 0, "c": 1}
    assert not board.is_current("g", "first")


def test_gone_then_begun_counts_one_death():
    board = two_groups()
    board.gone("g", NOW)
    board.gone("g", NOW + 1)  # the controller asks again and again
    ready(board, "g", "second")
    assert crashes(board) == {"a": 1, "b": 0, "c": 1}
    assert placed(board)["g"] == ["c"]
    board.expire(NOW + 10 * WAIT_S)
    assert not board.groups["g"].lost


def test_gone_while_the_base_is_loaded_is_nobodys_death_and_waits_for_a_node():
    board = Board(num_groups=1, wait_s=WAIT_S)
    board.begin("g", "first")
    ask_all(board, "a")
    board.gone("g", NOW)
    assert board.groups == {}  # it never said what it is
    assert crashes(board) == {"a": 0}
    board.expire(NOW + WAIT_S)
    assert board.answer("a", 0) is None
    board.expire(NOW + WAIT_S + 0.1)
    with pytest.raises(ValueError, match="it was without workers for 60 s"):
        board.answer("a", 0)


def test_expire_gives_a_group_up_that_was_without_workers_too_long_and_no_other():
    board = two_groups()
    board.gone("g", NOW)
    board.expire(NOW + WAIT_S)
    assert not board.groups["g"].lost
    board.expire(NOW + WAIT_S + 0.1)
    assert "was without workers" in board.groups["g"].lost
    assert not board.groups["h"].lost
    assert placed(board)["h"] == ["b", "a"]


def test_expire_of_a_group_that_never_had_workers():
    board = Board(num_groups=2, wait_s=WAIT_S)
    board.open(1)
    for name in ("g", "h"):
        board.gone(name, NOW)
    ready(board, "h")
    ask_all(board, "a")
    board.expire(NOW + 2 * WAIT_S)
    assert board.groups["g"].lost
    assert placed(board)["h"] == ["a"]


def test_group_that_was_given_up_serves_again_when_its_node_comes_back_after_all():
    board = two_groups()
    board.gone("g", NOW)
    board.expire(NOW + 2 * WAIT_S)
    assert board.begin("g", "second")
    assert not board.groups["g"].lost
    board.hello("g", "second", {})
    assert placed(board) == {"g": ["c"], "h": ["b", "a"]}


def test_group_whose_workers_die_while_they_load_is_given_up_though_it_was_lost_before():
    board = Board(num_groups=1, wait_s=WAIT_S)
    board.gone("g", NOW)
    board.expire(NOW + 2 * WAIT_S)
    assert [board.begin("g", str(k)) for k in range(MAX_STARTS + 1)][-2:] == [True, False]
    assert "while they loaded" in board.groups["g"].lost


# Nodes that are taken away


def test_preempted_group_gets_no_more_trials_and_keeps_its_own():
    board = two_groups(places=3)
    preempt(board, "g")
    ask_all(board, "d", "e", "f")
    assert placed(board) == {"g": ["a", "c"], "h": ["b", "d", "e"]}
    assert waiting(board) == ["f"]
    board.hear([row_event("a", 0)])
    assert board.answer("a", 0) == {"row": row(0), "last": False}
    board.hear([end_event("a")])
    assert waiting(board) == ["f"]


def test_preempted_group_gives_its_trials_back_and_no_death_is_counted():
    board = two_groups()
    preempt(board, "g")
    board.hear_from("g", 1, back("a"))
    assert placed(board) == {"g": ["c"], "h": ["b", "a"]}
    assert told(board, "h") == [enter("a")]
    board.hear_from("g", 2, back("c"))
    assert waiting(board) == ["c"]
    assert board.is_current("g", "first")  # its workers must not be told to stop
    ready(board, "g", "second")
    assert placed(board) == {"g": ["c"], "h": ["b", "a"]}
    assert crashes(board) == {"a": 0, "b": 0, "c": 0}


def test_preempted_as_often_as_one_likes_is_no_failure():
    board = board_of("g", places=1)
    ask_all(board, "a")
    for number in range(3 * MAX_DEATHS):
        preempt(board, "g", NOW)
        ready(board, "g", f"{number}")  # its workers were gone before they could give it back
        assert placed(board) == {"g": ["a"]}
    assert crashes(board) == {"a": 0}


def test_node_taken_away_without_a_notice_is_no_failure_either():
    board = two_groups()
    board.gone("g", NOW, preempted=True)
    assert placed(board) == {"g": [], "h": ["b", "a"]}
    assert crashes(board) == {"a": 0, "b": 0, "c": 0}


def test_death_after_a_preemption_counts_again():
    board = two_groups()
    preempt(board, "g")
    ready(board, "g", "second")
    assert placed(board) == {"g": ["c"], "h": ["b", "a"]}
    board.gone("g", NOW)
    assert crashes(board) == {"a": 0, "b": 0, "c": 1}


def test_preempted_group_that_was_not_heard_again_loses_its_trials_after_its_deadline():
    board = two_groups()
    preempt(board, "g", NOW)
    board.expire(NOW + DEADLINE_GRACE_S)
    assert placed(board)["g"] == ["a", "c"]
    board.expire(NOW + DEADLINE_GRACE_S + 0.1)
    assert placed(board) == {"g": [], "h": ["b", "a"]}
    assert crashes(board) == {"a": 0, "b": 0, "c": 0}
    board.expire(NOW + WAIT_S + 0.1)
    assert "was without workers" in board.groups["g"].lost


def test_trial_given_back_that_was_ended_meanwhile_stays_ended():
    board = two_groups()
    preempt(board, "g")
    board.cancel("a")
    board.put_off("c")
    board.hear([back("a"), back("c")])
    assert waiting(board) == []
    assert placed(board)["g"] == []
    board.ask(trial("c"), 0)
    assert placed(board)["h"] == ["b", "c"]


# What says so


class Health(Exception):
    """As Ray Train wraps what it found when it asked a worker for its state."""

    def __init__(self, failure: Exception) -> None:
        self.health_check_failure = failure


def test_was_preempted_reads_rays_flag_also_where_train_wraps_it_and_others_die_of_it():
    from ray.exceptions import RayActorError

    node, crash = RayActorError(preempted=True), RayActorError()
    assert was_preempted({0: node})
    assert was_preempted({0: Health(node)})
    assert was_preempted({0: RuntimeError("connection reset"), 1: Health(node)})
    assert not was_preempted({0: crash, 1: Health(crash), 2: ValueError("no")})
    assert not was_preempted({})


def test_broker_names_the_controllers_of_groups_without_workers():
    async def waiting_after() -> list[dict]:
        broker = Broker(3, one_run=False)
        seen = []
        await broker.gone(["f", "g", "h"])
        seen.append(await broker.waiting())
        for name in ("g", "h"):
            await broker.begin(name, "first")
        seen.append(await broker.waiting())  # those that load will hear that they must stop
        for name in ("g", "h"):
            await broker.hello(name, "first", {})
        await broker.gone(["g"], preempted=True, controller="controller of g")
        seen.append(await broker.waiting())
        return seen

    assert asyncio.run(waiting_after()) == [
        {"f": None, "g": None, "h": None},
        {"f": None},
        {"f": None, "g": "controller of g"},
    ]


def test_how_it_died_is_the_telling_line_of_what_ray_wraps():
    class Wrapped(Exception):
        health_check_failure = RuntimeError("first\nWorker exit type: SYSTEM_ERROR\nlast")

    assert how_it_died(Wrapped()) == "RuntimeError: Worker exit type: SYSTEM_ERROR"
    assert how_it_died(ValueError("x is 3")) == "ValueError: x is 3"
    assert how_it_died(ValueError()) == "ValueError: "
