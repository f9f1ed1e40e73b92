"""The pack server that is killed and starts again, that serves other bases and data, and on two workers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.trainers.links import (
    FakeLink,
    Killed,
    allow,
    enter,
    serve,
)
from tests.trainers.test_pack_server import assert_close, files
from tests.trainers.trials import numbers
from trainers.base_model import load_base
from trainers.comm import Comm
from trainers.pack_server import PackServer
from trainers.paths import read_json, write_json
from trainers.sft_trainer import Station, TrialSpec

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
