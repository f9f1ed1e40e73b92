"""The pack server over a scripted link: who is evaluated when, what is on disk when it is told, how
trials end, and restarts. The oracle of the numbers is the same trial trained alone by train_trial."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainers.links import (
    STOP,
    FakeLink,
    allow,
    cancel,
    enter,
    serve,
)
from tests.trainers.trials import numbers
from trainers import recorder
from trainers.comm import Comm
from trainers.pack_server import PackServer
from trainers.paths import TrialPaths, read_json_lines, read_state
from trainers.sft_trainer import Station


def assert_close(rows: list[dict], expected: list[dict]) -> None:
    """Rows told of a trial against those of the whole trial, the base's row apart."""
    assert len(rows) == len(expected) - 1
    for row, other in zip(rows, expected[1:], strict=True):
        assert row["examples"] == other["examples"]
        for key in ("eval_loss", "train_loss"):
            assert row[key] == pytest.approx(other[key], abs=1e-9)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Asking


def test_server_trial_waits_at_every_evaluation_that_nobody_asked_for(make, alone):
    spec = make("a")
    link = FakeLink([enter(spec, 0)], [allow(spec, 1)], [allow(spec, 2)])
    serve(link)
    # Idle: before it came, then with 1, 2 and 3 rows (and the end) told; on disk is the base's beside.
    assert link.told_when_idle == [0, 1, 2, 4]
    assert link.written_when_idle == [0, 2, 3, 4]
    for number, told in enumerate(link.told[:3]):
        assert [row["examples"] for row in told.rows] == [0, 4, 8, 12][: number + 2]
    assert [row["examples"] for row in link.rows(spec)] == [4, 8, 12]
    whole = read_json_lines(TrialPaths(spec.folder).metrics)
    assert whole[1:] == link.rows(spec)
    assert numbers(whole) == alone(spec)


def test_server_trial_asked_for_while_it_trains_does_not_wait(make):
    spec = make("a")
    link = FakeLink([enter(spec, 0)], (lambda: len(link.told) == 1, [allow(spec, 2)]))
    serve(link)
    assert link.told_when_idle == [0, 4]
    assert link.end(spec) == {"kind": "end", "trial": "a", "status": "finished", "reason": ""}


def test_server_evaluation_that_was_already_given_is_not_a_question_for_the_next(make):
    spec = make("a")
    link = FakeLink([enter(spec, 0)], [allow(spec, 0)], [allow(spec, 1)])
    serve(link)
    assert link.told_when_idle == [0, 1, 1, 2]
    assert len(read_json_lines(TrialPaths(spec.folder).metrics)) == 3


def test_server_waiting_trial_lets_its_neighbour_train_on(make, alone, fp64):
    waiting, going = make("a", base=fp64), make("b", base=fp64, seed=4)
    link = FakeLink([enter(waiting, 0), enter(going)], [allow(waiting, 2)])
    serve(link)
    assert link.told_when_idle[1] == 1 + 3 + 1  # a's first row, b's three and its end
    for spec in (waiting, going):
        assert_close(link.rows(spec), alone(spec))


def test_server_row_is_on_disk_and_the_last_with_its_status_before_it_is_told(make):
    specs = [make("a"), make("b", seed=4, global_batch_size=5)]
    link = FakeLink([enter(spec) for spec in specs])
    serve(link)
    lasts = 0
    for told in link.told:
        if told.event["kind"] == "row":
            assert told.rows[-1] == told.event["row"]
            assert (told.status is not None) == told.event["last"]
            lasts += told.event["last"]
        assert told.status is None or told.status["status"] == "finished"
    assert lasts == 2
    assert [link.end(spec)["status"] for spec in specs] == ["finished", "finished"]


def test_server_writes_the_end_of_a_trial_once(make, monkeypatch):
    finished, diverging = make("a"), make("b", learning_rate=1e6)
    written, write = [], recorder.write_state
    monkeypatch.setattr(
        recorder, "write_state", lambda path, values: (written.append(path), write(path, values))
    )
    link = FakeLink([enter(finished), enter(diverging)])
    serve(link)
    assert [link.end(t)["status"] for t in (finished, diverging)] == ["finished", "diverged"]
    assert sorted(written) == [TrialPaths(t.folder).status for t in (finished, diverging)]


def test_server_entering_twice_is_one_trial(make):
    spec = make("a")
    link = FakeLink([enter(spec, 0), enter(spec, 0)], [enter(spec, 1)])
    server = serve(link)
    assert len(server.members) == 1
    assert len(link.rows(spec)) == 1


def test_server_stop_ends_at_once_in_the_middle_of_training(make):
    spec = make("a")
    # A batch is two forwards: the second command is heard inside the first batch.
    link = FakeLink([enter(spec)], (lambda: link.polls == 2, [STOP]))
    serve(link)
    assert not link.told
    assert [row["examples"] for row in read_json_lines(TrialPaths(spec.folder).metrics)] == [0]


# Ends


def test_server_diverging_trial_ends_with_its_reason_and_its_neighbour_goes_on(make, alone, fp64):
    good = make("good", base=fp64)
    # Each step multiplies the weights by 1e30.
    grows = {"learning_rate": 1e15, "weight_decay": 1e15, "max_grad_norm": 0.0, "warmup": 0.0}
    bad = make("bad", base=fp64, global_batch_size=2, **grows)
    link = FakeLink([enter(good), enter(bad)])
    server = serve(link)
    end = link.end(bad)
    assert end is not None
    assert end["status"] == "diverged"
    assert "nan" in end["reason"] or "inf" in end["reason"]
    status = read_state(TrialPaths(bad.folder).status)
    assert (status["status"], status["reason"]) == ("diverged", end["reason"])
    assert link.rows(bad) == []
    assert link.told[-1].event["trial"] == "good"
    assert_close(link.rows(good), alone(good))
    assert not server.members


def test_server_cancelled_trial_frees_its_slot_at_once_and_nothing_more_is_written(
    make, alone, fp64
):
    stays, goes, comes = (make(name, base=fp64, seed=n) for n, name in enumerate("abc"))
    seen = {}

    def a_row_of_each() -> bool:
        return len(link.told) == 2

    def after() -> bool:
        slots = server.station.pack.slots
        seen.setdefault("slots", set(slots))
        seen.setdefault("members", set(server.members))
        seen.setdefault("files", files(goes.folder))
        return True

    link = FakeLink(
        [enter(stays), enter(goes)],
        (a_row_of_each, [cancel(goes), enter(comes)]),
        (after, []),
    )
    server = PackServer(link, Comm(), Station)
    server.serve()
    assert seen["slots"] == {0, 1}  # the newcomer has the place of the one that went
    assert seen["members"] == {"a", "c"}
    assert len(link.rows(goes)) == 1
    assert link.end(goes) is None
    assert files(goes.folder) == seen["files"]
    assert not TrialPaths(goes.folder).status.exists()
    for spec in (stays, comes):
        assert_close(link.rows(spec), alone(spec))


def test_server_cancelled_while_it_waits_is_gone(make):
    spec = make("a")
    link = FakeLink([enter(spec, 0)], [cancel(spec)], [allow(spec, 1), cancel(spec)])
    server = serve(link)
    assert not server.members
    assert len(link.told) == 1


def test_server_cancelled_trial_that_enters_again_goes_on_from_what_it_wrote(make, alone):
    spec = make("a")
    # It was put off: the board's next `enter` may come in the same list as the `cancel`.
    link = FakeLink([enter(spec, 0)], [cancel(spec), enter(spec, 0)], [allow(spec, 2)])
    serve(link)
    first, again, *_ = [told.event for told in link.told]
    assert first == again  # what is on disk is told again
    assert [told.event.get("index") for told in link.told] == [0, 0, 1, 2, None]
    assert numbers(read_json_lines(TrialPaths(spec.folder).metrics)) == alone(spec)
    assert link.end(spec)["status"] == "finished"


@pytest.mark.parametrize("target", [("no_such_proj",), ("experts",)])
def test_server_target_that_the_model_does_not_have_fails_that_trial_alone(
    make, alone, target, fp64
):
    good, bad = make("good", base=fp64), make("bad", base=fp64, target=target)
    link = FakeLink([enter(good), enter(bad)])
    serve(link)
    end = link.end(bad)
    assert end is not None
    assert end["status"] == "failed"
    assert target[0] in end["reason"]
    paths = TrialPaths(bad.folder)
    assert read_state(paths.status)["status"] == "failed"
    assert read_state(paths.status)["reason"] == end["reason"]
    assert "Traceback" in paths.error.read_text()
    assert_close(link.rows(good), alone(good))


@pytest.mark.parametrize("full_finetune", [False, True])
def test_server_trial_whose_checkpoint_lacks_its_weights_fails_alone_and_leaves_no_slot(
    make, full_finetune
):
    changes = {"full_finetune": True, "lora_rank": 0, "dropout": 0.0} if full_finetune else {}
    broken, good = make("broken", **changes), make("good")
    state = TrialPaths(broken.folder).checkpoint / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    slots = []

    def seen() -> bool:
        slots.append(list(server.station.pack.slots))
        return True

    link = FakeLink([enter(broken)], [enter(good)], (seen, []))
    server = PackServer(link, Comm(), Station)
    server.serve()
    assert link.end(broken)["status"] == "failed"
    assert "no checkpoint is whole" in link.end(broken)["reason"]
    assert link.end(good)["status"] == "finished"
    assert slots == [[0]]  # of the good one


def test_server_whose_first_trial_fails_serves_the_next(make, fp32):
    bad = make("bad", base=replace(fp32, model="/absent"))
    good = make("good")
    link = FakeLink([enter(bad)], [enter(good)])
    serve(link)
    assert link.end(bad)["status"] == "failed"
    assert link.end(good)["status"] == "finished"
