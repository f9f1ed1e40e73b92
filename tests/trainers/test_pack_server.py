"""The pack server over a scripted link: who is evaluated when, what is on disk when it is told, how
trials end, and restarts. The oracle of the numbers is the same trial trained alone by train_trial."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.trainers.links import (
    STOP,
    FakeLink,
    Killed,
    allow,
    cancel,
    enter,
    serve,
)
from tests.trainers.tiny import tiny_model
from tests.trainers.trials import CANDIDATE, numbers, trial
from trainers import recorder
from trainers.base_model import BaseSpec, load_base
from trainers.comm import Comm
from trainers.pack_server import PackServer
from trainers.paths import TrialPaths, read_json, read_json_lines, read_state, write_json
from trainers.sft_trainer import Station, TrialSpec, train_trial


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    """A random model of two layers with the vocabulary of the shipped tokenizer."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    tiny_model(torch.float32, vocab_size=3072).save_pretrained(folder)
    return folder


@pytest.fixture
def fp32(tiny_folder) -> BaseSpec:
    return BaseSpec(model=tiny_folder, quantization="none", dtype="fp32")


@pytest.fixture
def fp64(fp32) -> BaseSpec:
    """Neighbours change the rounding: trials in packs are compared in float64."""
    return replace(fp32, dtype="fp64")


@pytest.fixture
def make(data_file, tmp_path, fp32):
    """make(name, base=..., lora_rank=...): a trial with evaluations after 4, 8 and 12 examples, one
    step of two forwards each."""

    def made(name: str, *, folder: str = "served", **changes) -> TrialSpec:
        own = {"num_examples": 12, "eval_every": 4, "micro_batch_size": 2, "base": fp32}
        own |= {k: changes.pop(k) for k in list(changes) if k in TrialSpec.__dataclass_fields__}
        candidate = replace(CANDIDATE, **({"global_batch_size": 4} | changes))
        return trial(data_file, tmp_path / folder / name, candidate=candidate, **own)

    return made


@pytest.fixture
def alone(tmp_path):
    """alone(spec): its numbers after training by itself, in a folder of its own."""

    def rows(spec: TrialSpec) -> list[dict]:
        folder = tmp_path / "alone" / spec.name
        return numbers(train_trial(replace(spec, folder=folder), lambda row: True).rows)

    return rows


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


# Restarts


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_server_restarted_alone_ends_in_bit_equal_numbers(make, alone, tmp_path, killed_at):
    spec = make("a")
    link = FakeLink([enter(spec)])
    link.kill = lambda event: event["kind"] == "row" and event["index"] == killed_at
    with pytest.raises(Killed):
        serve(link)
    questions = [[enter(spec, killed_at)], [allow(spec, 2)]]
    again = FakeLink(*questions[: 2 if killed_at < 2 else 1])
    serve(again)
    # What is on disk is told again, and nothing beyond what is asked for.
    assert again.told_when_idle[1:2] == [4 if killed_at == 2 else killed_at + 1]
    expected = alone(spec)
    assert numbers(again.rows(spec)) == expected[1:]
    best = "best/adapter_model.safetensors"
    assert files(spec.folder)[best] == files(tmp_path / "alone" / "a")[best]
    assert again.end(spec)["status"] == "finished"


def test_server_restarted_in_the_middle_of_a_batch_ends_in_bit_equal_numbers(make, alone):
    spec = make("a")

    def die() -> bool:
        raise Killed

    # A batch is two forwards: the fourth command is heard inside the second batch.
    link = FakeLink([enter(spec)], (lambda: link.polls == 4 and die(), []))
    with pytest.raises(Killed):
        serve(link)
    assert len(link.rows(spec)) == 1
    again = FakeLink([enter(spec)])
    serve(again)
    assert numbers(again.rows(spec)) == alone(spec)[1:]


def test_server_restarted_with_the_same_pack_ends_in_equal_numbers(make):
    def specs(folder):
        return [make(name, folder=folder, seed=n) for n, name in enumerate("ab")]

    def all_of(folder):
        return [enter(spec) for spec in specs(folder)]

    whole = FakeLink(all_of("whole"))
    serve(whole)
    cut = FakeLink(all_of("cut"))
    cut.kill = lambda event: event["trial"] == "b"  # a's first row was told, b's is on disk
    with pytest.raises(Killed):
        serve(cut)
    assert len(cut.told) == 1
    again = FakeLink(all_of("cut"))
    serve(again)
    for spec in specs("whole"):
        assert numbers(again.rows(spec)) == numbers(whole.rows(spec))


def test_server_trial_that_had_ended_is_told_again_whole(make):
    spec = make("a")
    first, again = FakeLink([enter(spec)]), FakeLink([enter(spec, 0)])
    serve(first)
    before = files(spec.folder)
    serve(again)
    assert [told.event for told in again.told] == [told.event for told in first.told]
    assert files(spec.folder) == before


# Stations


def test_server_full_fine_tuning_between_adapters_gives_the_base_back(make):
    first, second = make("first"), make("second")
    full = make("full", full_finetune=True, lora_rank=0, learning_rate=1e-3, dropout=0.0)
    models = []

    def seen() -> bool:
        models.append(server.station.model)
        return True

    link = FakeLink([enter(first)], [enter(full)], (seen, []), [enter(second)], (seen, []))
    server = PackServer(link, Comm(), Station)
    server.serve()
    assert [link.end(spec)["status"] for spec in (first, full, second)] == ["finished"] * 3
    assert numbers(link.rows(first)) == numbers(link.rows(second))
    # The full one trained: its base is not that of the others.
    assert link.rows(full)[-1]["eval_loss"] < link.rows(full)[0]["eval_loss"]
    assert models[0] is models[1]
    base = dict(load_base(first.base).named_parameters())
    server.station.close()
    own = dict(models[0].named_parameters())
    assert own.keys() == base.keys()
    for name, parameter in base.items():
        assert torch.equal(own[name], parameter)
        assert own[name].grad is None
        assert not own[name].requires_grad


@pytest.mark.parametrize("what", ["data", "base"])
def test_server_trial_with_other_data_or_base_gets_a_new_station(make, alone, what, fp64):
    first = make("first")
    other = make("other", lora_rank=2)
    changes = {"data": replace(other.data, eval=0.3), "base": fp64}
    other = replace(other, **{what: changes[what]})
    stations = []

    def seen() -> bool:
        stations.append(server.station)
        return True

    link = FakeLink(
        [enter(first)], (seen, []), [enter(other)], (seen, []), [enter(make("third"))], (seen, [])
    )
    server = PackServer(link, Comm(), Station)
    server.serve()
    assert len({id(station) for station in stations}) == 3
    assert (stations[0].model is stations[1].model) is (what == "data")
    assert numbers(link.rows(first)) == numbers(link.rows(make("third")))
    assert numbers(link.rows(other)) == alone(other)[1:]


def test_server_trial_with_the_same_base_and_data_shares_the_station(make):
    stations = []

    def seen() -> bool:
        stations.append(server.station)
        return True

    link = FakeLink([enter(make("a"))], (seen, []), [enter(make("b", seed=5))], (seen, []))
    server = PackServer(link, Comm(), Station)
    server.serve()
    assert stations[0] is stations[1]


# Two workers


class Deaf(FakeLink):
    """The link of a worker that is not the first: it must not be used."""

    def commands(self, *, idle):
        raise AssertionError("only world rank 0 asks")

    def tell(self, event):
        raise AssertionError("only world rank 0 tells")


def _work(rank: int, folder: str, specs: list[TrialSpec]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    a, b = specs
    script = [[enter(a, 0), enter(b)], [allow(a, 2)]]
    link = FakeLink(*script) if rank == 0 else Deaf()
    serve(link, Comm())
    if rank == 0:
        write_json(Path(folder) / "rows.json", [link.rows(spec) for spec in specs])
    dist.destroy_process_group()


@pytest.mark.slow
def test_server_on_two_workers_tells_what_one_tells(make, alone, tmp_path, monkeypatch, fp64):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    specs = [make("a", base=fp64), make("b", base=fp64, seed=4, lora_rank=2)]
    mp.spawn(_work, args=(str(tmp_path), specs), nprocs=2)
    for rows, spec in zip(read_json(tmp_path / "rows.json"), specs, strict=True):
        assert_close(rows, alone(spec))
