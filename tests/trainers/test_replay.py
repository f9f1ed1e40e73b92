"""A pack whose worker dies at any forward: each of its trials ends in the bits of an undisturbed one."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainers.links import FakeLink, Killed, enter
from tests.trainers.trials import CANDIDATE, numbers, trial
from trainers.base_model import BaseSpec
from trainers.comm import Comm
from trainers.composition import CompositionLog
from trainers.loop import Trainer
from trainers.pack_server import PackServer
from trainers.paths import TrialPaths, read_json_lines
from trainers.replay import Memory
from trainers.sft_trainer import Station, TrialSpec

TRIALS = {
    "a": {"lora_rank": 4, "global_batch_size": 4, "seed": 3},
    "b": {"lora_rank": 2, "global_batch_size": 2, "seed": 4, "dropout": 0.0, "target": ("attn",)},
    "c": {"lora_rank": 8, "global_batch_size": 3, "seed": 5, "learning_rate": 1e-2},
    "d": {"lora_rank": 1, "global_batch_size": 4, "seed": 6, "variant": "rslora"},
}
BUDGETS = {"a": 16, "b": 12, "c": 16, "d": 8}
"""d ends first, and leaves the others to do its rows again without it."""


class Pack:
    """A pack of the four trials, as often as it is begun."""

    def __init__(self, data_file: Path, folder: Path, model: str, name: str) -> None:
        self.root = folder / name
        base = BaseSpec(model=model, quantization="none", dtype="fp32")
        self.specs = {
            key: trial(
                data_file,
                self.root / "trials" / key,
                base=base,
                candidate=replace(CANDIDATE, **changes),
                num_examples=BUDGETS[key],
                eval_every=8,
                micro_batch_size=None,
                max_tokens=400,
            )
            for key, changes in TRIALS.items()
        }
        self.log = self.root / "composition" / "g.jsonl"

    def serve(self, *, remember: bool = True) -> PackServer:
        """A new worker, with the trials that have no end."""
        left = [spec for spec in self.specs.values() if not TrialPaths(spec.folder).status.exists()]
        server = PackServer(FakeLink([enter(spec) for spec in left]), Comm(), Station)
        if remember:
            server.memory = Memory(CompositionLog(self.log), server.comm)
        server.serve()
        return server

    def results(self) -> dict[str, list[dict]]:
        return {key: rows_of(spec) for key, spec in self.specs.items()}


def rows_of(spec: TrialSpec) -> list[dict]:
    return numbers(read_json_lines(TrialPaths(spec.folder).metrics))


@pytest.fixture
def make(data_file, tmp_path, tiny_folder):
    return lambda name: Pack(data_file, tmp_path, tiny_folder, name)


class Deaths:
    """Counts the forwards of a process, kills it before one of them, and counts the stand-ins' rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.killed_at, self.num_ghosts = 0, 0, 0
        forward = Trainer.forward

        def counted(trainer, parts, ghosts=()):
            self.count += 1
            if self.count == self.killed_at:
                raise Killed
            self.num_ghosts += len(ghosts)
            return forward(trainer, parts, ghosts)

        monkeypatch.setattr(Trainer, "forward", counted)


def shared(log: Path) -> int:
    """Forwards of more than one trial."""
    rows = [row for row in read_json_lines(log) if "parts" in row]
    return sum(len(row["parts"]) > 1 for row in rows)


def test_pack_killed_before_any_forward_ends_in_the_bits_of_an_undisturbed_one(make, monkeypatch):
    deaths = Deaths(monkeypatch)
    whole = make("whole")
    whole.serve()
    expected, num_forwards = whole.results(), deaths.count
    assert num_forwards > 10
    assert shared(whole.log) > 4
    ghosts = 0
    for killed_at in range(1, num_forwards + 1):
        pack = make(f"killed at {killed_at}")
        deaths.count, deaths.killed_at, deaths.num_ghosts = 0, killed_at, 0
        with pytest.raises(Killed):
            pack.serve()
        deaths.killed_at = 0
        pack.serve()
        assert pack.results() == expected, f"killed before forward {killed_at} of {num_forwards}"
        ghosts += deaths.num_ghosts
    assert ghosts > 0


def test_pack_killed_again_while_it_does_its_forwards_again(make, monkeypatch):
    deaths = Deaths(monkeypatch)
    whole, pack = make("whole"), make("killed")
    whole.serve()
    for killed_at in (9, 2, 4, 7):
        deaths.count, deaths.killed_at = 0, killed_at
        with pytest.raises(Killed):
            pack.serve()
    deaths.killed_at = 0
    pack.serve()
    assert pack.results() == whole.results()


def test_pack_without_its_log_ends_in_numbers_that_differ_by_rounding_alone(make, monkeypatch):
    deaths = Deaths(monkeypatch)
    whole, pack = make("whole"), make("killed")
    whole.serve()
    deaths.count, deaths.killed_at = 0, 9
    with pytest.raises(Killed):
        pack.serve()
    deaths.killed_at = 0
    pack.serve(remember=False)
    found, expected = pack.results(), whole.results()
    assert found != expected  # or the log would not be needed, and the test above not show anything
    for key, rows in expected.items():
        assert [row["eval_loss"] for row in found[key]] == pytest.approx(
            [row["eval_loss"] for row in rows], abs=1e-5
        )


def test_pack_whose_log_is_damaged_trains_on_without_it(make, monkeypatch):
    deaths = Deaths(monkeypatch)
    pack = make("killed")
    deaths.killed_at = 9
    with pytest.raises(Killed):
        pack.serve()
    deaths.killed_at = 0
    lines = pack.log.read_text().splitlines(keepends=True)
    pack.log.write_text("".join([*lines[:5], lines[5][:-3] + '0"}\n', *lines[6:]]))
    pack.serve()
    assert all(TrialPaths(spec.folder).status.exists() for spec in pack.specs.values())
    assert shared(pack.log) > 0


def test_ghosts_leave_the_pack_when_all_is_done_again(make, monkeypatch):
    deaths = Deaths(monkeypatch)
    pack = make("killed")
    deaths.killed_at = 10
    with pytest.raises(Killed):
        pack.serve()
    deaths.killed_at = 0
    server = pack.serve()
    assert server.station is not None
    assert not server.station.pack.slots
    assert server.replay is None
