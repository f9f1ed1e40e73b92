"""Runs of sweeps as their drivers leave them on disk, written without a driver."""

from pathlib import Path
from typing import Any

from cluster.inventory import Inventory
from orchestration.commands import Answer, answer_of, unanswered
from orchestration.config import make_config
from orchestration.control import Control
from orchestration.packs import plan_packs, trial_demand
from orchestration.plan_json import plan_to_dict
from orchestration.planning import Plan, make_plan
from orchestration.progress import Progress
from orchestration.results import mark_ended
from orchestration.trials import TrialMaker
from search_spaces.candidate import trial_name
from tests.orchestration.sweeps import BASE
from trainers.paths import RunPaths, write_json_lines, write_state, write_text

MACHINE = Inventory(num_cpus=2, num_gpus=0, where="this machine", memory_bytes=32 << 30)
KEYS: dict[str, Any] = {
    "model": str(BASE),
    "data": "good.jsonl",
    "lora_rank": 4,
    "learning_rate": [1e-3, 3e-3],
    "global_batch_size": 16,
    "examples": 64,
    "eval_every": 16,
    "quantization": "none",
    "dtype": "fp32",
    "name": "run",
}
"""Two trials of four evaluations."""


class WrittenRun:
    """runs/run of a sweep in the current folder, whose driver has written its inputs and its trials' configs.

    Args:
        keys: of sweep.yaml, beside KEYS.
    """

    def __init__(self, **keys: Any) -> None:
        config = make_config(KEYS | keys, "test")
        self.plan: Plan = make_plan(config, None, MACHINE)
        self.paths = RunPaths(Path("runs") / "run")
        self.packs = plan_packs(self.plan, MACHINE)
        demand = trial_demand(config, MACHINE)
        self.maker = TrialMaker(self.plan, demand, self.packs, self.paths)
        as_json = plan_to_dict(self.plan)
        resolved = {"config": config.model_dump(mode="json"), "sweep_yaml": "", "versions": {}}
        write_text(self.paths.config, "")
        write_state(self.paths.resolved, resolved)
        write_state(self.paths.plan, as_json)
        write_state(self.paths.packs, vars(self.packs))
        self.names = [trial_name(candidate) for candidate in self.plan.pruned.admitted]
        for candidate in self.plan.pruned.admitted:
            self.maker.write(candidate)

    def trains(self, name: str, *losses: float, status: str = "", reason: str = "") -> None:
        """A trial's rows: that of the untouched base, and one for each loss; and how it ended, where it did."""
        paths = self.paths.trial(name)
        write_json_lines(
            paths.metrics, [row_of(at, loss) for at, loss in enumerate((3.5, *losses))]
        )
        if status:
            mark_ended(paths, status, reason)

    def edit_plan(self, **values: Any) -> None:
        """Another plan.json than the sweep's own."""
        write_state(self.paths.plan, plan_to_dict(self.plan) | values)


def row_of(evaluation: int, loss: float) -> dict[str, Any]:
    row: dict[str, Any] = {"examples": 16 * evaluation, "steps": evaluation, "eval_loss": loss}
    row |= {"train_loss": loss if evaluation else None, "eval_bits_per_byte": loss, "tokens": 9}
    return row | {"seconds": 2.0 * evaluation, "lr": 1e-3, "grad_norm": 1.0, "peak_bytes": 0}


class Given:
    """A searcher that holds some trials still, and takes clones."""

    def __init__(self, *waiting: str) -> None:
        self.waiting, self.added = list(waiting), []

    def add(self, clone: dict[str, Any]) -> None:
        self.added.append(clone["name"])

    def drop(self, name: str) -> bool:
        return name in self.waiting


class Driver:
    """A driver's control of a written run, and what it did."""

    def __init__(self, sweep: WrittenRun, *waiting: str) -> None:
        self.cancelled: list[tuple[str, str]] = []
        self.ended: list[str] = []
        self.given = Given(*waiting)
        self.progress = Progress(sweep.names, 0, 64)
        self.control = Control(
            sweep.paths, sweep.maker, self.progress, lambda *told: self.cancelled.append(told)
        )
        self.control.attach(self.given, lambda name, reason: self.ended.append(name))

    def obeys(self, sweep: WrittenRun) -> list[Answer]:
        """What it answers to all that was asked since the last time."""
        names = [name for name, _ in unanswered(sweep.paths)]
        self.control.look_now()
        answers = [answer_of(sweep.paths, name) for name in names]
        assert None not in answers
        return [answer for answer in answers if answer]
