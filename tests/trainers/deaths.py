"""Packs whose worker dies at a forward that a test chooses."""

from collections.abc import Callable
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

    def assert_same_after_any(self, make: Callable[[str], Pack], *, least: int) -> Pack:
        """A pack killed before any of its forwards, of which there must be `least`, ends in the numbers of an
        undisturbed one, which it gives."""
        whole = make("whole")
        whole.serve()
        expected, num_forwards = whole.results(), self.count
        ghosts = 0
        for killed_at in range(1, num_forwards + 1):
            pack = make(f"killed at {killed_at}")
            self.count, self.killed_at, self.num_ghosts = 0, killed_at, 0
            with pytest.raises(Killed):
                pack.serve()
            self.killed_at = 0
            pack.serve()
            assert pack.results() == expected, f"killed before {killed_at} of {num_forwards}"
            ghosts += self.num_ghosts
        assert num_forwards >= least
        assert ghosts > 0
        return whole


def shared(log: Path) -> int:
    """Forwards of more than one trial."""
    rows = [row for row in read_json_lines(log) if "parts" in row]
    return sum(len(row["parts"]) > 1 for row in rows)
