"""The log of who shared which forward: what a script says, what a kill leaves, what is left out."""

from pathlib import Path

import pytest

from trainers import composition
from trainers.composition import CompositionLog, Part, members


def trial(name: str) -> dict:
    return {"name": name, "num_examples": 8}


def part(name: str, step: int, start: int = 0, rows: int = 4) -> Part:
    return Part(name, step, start, rows, done=4.0 * step + start)


@pytest.fixture
def log(tmp_path: Path) -> CompositionLog:
    """Three steps of a and b together, the second step of b alone in two forwards."""
    log = CompositionLog(tmp_path / "composition" / "g.jsonl")
    log.enter(trial("a"), 0)
    log.enter(trial("b"), 0)
    log.forward([part("a", 0), part("b", 0)])
    log.forward([part("b", 1, 0, 2)])
    log.forward([part("a", 1), part("b", 1, 2, 2)])
    log.forward([part("b", 2), part("a", 2)])
    return log


def names(script) -> list[list[str]]:
    return [[f"{p.name}{p.step}" for p in forward] for forward in script.forwards]


def test_script_holds_the_forwards_that_somebody_still_needs(log):
    assert names(log.script({"a": 0, "b": 0})) == [["a0", "b0"], ["b1"], ["a1", "b1"], ["b2", "a2"]]
    assert names(log.script({"a": 2, "b": 1})) == [["b1"], ["a1", "b1"], ["b2", "a2"]]
    assert names(log.script({"a": 2})) == [["b2", "a2"]]
    assert names(log.script({"a": 3})) == []
    assert names(log.script({"c": 0})) == []
    script = log.script({"a": 2})
    assert script.trials == {"a": trial("a"), "b": trial("b")}
    assert script.done == {"a": 12.0, "b": 12.0}


def test_script_leaves_out_what_stands_before_a_trial_s_last_entry(log):
    log.enter(trial("b"), 1)
    log.forward([part("b", 1)])
    script = log.script({"b": 1})
    assert names(script) == [["b1"]]
    assert names(log.script({"a": 1})) == [["a1", "b1"], ["b2", "a2"]]
    assert [p.is_void for p in log.script({"a": 1}).forwards[0]] == [False, True]


def test_script_leaves_out_a_batch_that_was_done_again(log):
    log.again("a", 2)
    log.forward([part("a", 2, 0, 2)])
    log.forward([part("a", 2, 2, 2)])
    assert names(log.script({"a": 2})) == [["a2"], ["a2"]]


def test_log_cut_anywhere_in_its_last_line_gives_the_lines_before(log):
    data = log.path.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    for length in range(last, len(data)):
        log.path.write_bytes(data[:length])
        again = CompositionLog(log.path)
        expected = ["a1", "b1"] if length < len(data) - 1 else ["b2", "a2"]
        assert names(again.script({"a": 0}))[-1] == expected
        again.forward([part("a", 3)])
        assert names(CompositionLog(log.path).script({"a": 3})) == [["a3"]]


def test_log_with_a_line_lost_in_the_middle_is_no_script(log):
    lines = log.path.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace("2", "3", 1)
    log.path.write_text("".join(lines))
    again = CompositionLog(log.path)
    assert again.script({"a": 0}).forwards == ()
    again.enter(trial("a"), 3)
    again.forward([part("a", 3)])
    assert names(again.script({"a": 3})) == [["a3"]]


def test_compact_leaves_out_what_nobody_needs(log, monkeypatch):
    before = log.script({"a": 1, "b": 1})
    log.compact({"a": 1, "b": 1})
    assert log.num_lines == 6  # the file is short
    monkeypatch.setattr(composition, "MOST_LINES", 5)
    log.compact({"a": 1, "b": 1})
    assert log.num_lines == len(log.path.read_text().splitlines()) == 5
    assert log.script({"a": 1, "b": 1}).forwards == before.forwards
    log.forward([part("a", 3)])
    assert names(CompositionLog(log.path).script({"a": 3})) == [["a3"]]


def test_members_are_in_the_order_of_their_last_entry(log):
    assert members(log.path) == ["a", "b"]
    log.enter(trial("c"), 0)
    log.enter(trial("a"), 2)
    assert members(log.path) == ["b", "c", "a"]
    assert members(log.path.with_name("none.jsonl")) == []
