"""The board of groups that are one run or cannot take every trial, and any order of events."""

import random
from collections.abc import Callable

import pytest

from orchestration.board import Board
from orchestration.suspects import MAX_DEATHS
from tests.orchestration.boards import (
    BASE,
    DATA,
    ask_all,
    board_of,
    end_event,
    placed,
    ready,
    row_event,
    trial,
    waiting,
)

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
