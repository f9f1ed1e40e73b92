"""Experiment trackers, fed by the driver from the trials' own files: one run per trial, whatever the
number of workers."""

import os
import re
import sys
from typing import Any, Protocol

from orchestration.results import TrialRecord
from trainers.paths import RunPaths

METRICS = (
    "train_loss",
    "eval_loss",
    "eval_bits_per_byte",
    "retention_loss",
    "lr",
    "grad_norm",
    "tokens",
    "peak_bytes",
)


class Tracker(Protocol):
    """Where metrics go beside runs/NAME. Calls are idempotent: a row is logged once."""

    def update(self, record: TrialRecord) -> None:
        """Logs the trial's rows that were not logged yet."""
        ...

    def finish(self, record: TrialRecord) -> None:
        """Logs the rest and closes the trial's run."""
        ...


def make_trackers(names: list[str], sweep_name: str, run: RunPaths) -> list[Tracker]:
    """The trackers that sweep.yaml asks for.

    Raises:
        ValueError: an unknown tracker.
    """
    kinds = {"wandb": WandbTracker, "tensorboard": TensorBoardTracker}
    unknown = [name for name in names if name not in kinds]
    if unknown:
        raise ValueError(f"tracking must be among {', '.join(kinds)}, got {', '.join(unknown)}")
    return [kinds[name](sweep_name, run) for name in names]


def new_rows(record: TrialRecord, logged: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of a trial above the number of examples that was logged last."""
    last = logged.get(record.name, -1)
    return [row for row in record.rows if row["examples"] > last]


def metrics_of(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row that a tracker draws (the base's row has no train_loss)."""
    return {name: row[name] for name in METRICS if row.get(name) is not None}


class WandbTracker:
    """Weights & Biases: id = trial, group = sweep, step = examples; offline when there is no key."""

    def __init__(self, sweep_name: str, run: RunPaths) -> None:
        import wandb

        self.wandb, self.sweep_name, self.folder = wandb, sweep_name, run.root
        self.mode = os.environ.get("WANDB_MODE") or self._default_mode()
        self.runs: dict[str, Any] = {}
        self.logged: dict[str, int] = {}

    def _default_mode(self) -> str:
        if self.wandb.login(prompt=False, verify=False):
            return "online"
        print(
            f"wandb: no API key, runs stay offline in {self.folder / 'wandb'}; wandb sync sends them",
            file=sys.stderr,
        )
        return "offline"

    def _run(self, record: TrialRecord) -> Any:
        if record.name not in self.runs:
            self.runs[record.name] = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tenfold"),
                group=self.sweep_name,
                name=record.name,
                id=re.sub(r"[^A-Za-z0-9._-]", "_", f"{self.sweep_name}-{record.name}"),
                resume="allow",
                config=record.candidate,
                dir=str(self.folder),
                mode=self.mode,
                reinit="create_new",
                settings=self.wandb.Settings(silent=True, console="off"),
            )
        return self.runs[record.name]

    def update(self, record: TrialRecord) -> None:
        for row in new_rows(record, self.logged):
            self._run(record).log(metrics_of(row), step=row["examples"])
            self.logged[record.name] = row["examples"]

    def finish(self, record: TrialRecord) -> None:
        self.update(record)
        run = self._run(record)
        run.summary.update({"status": record.status, "reason": record.reason})
        run.finish()


class TensorBoardTracker:
    """TensorBoard event files, runs/NAME/tensorboard/TRIAL; step = examples."""

    def __init__(self, sweep_name: str, run: RunPaths) -> None:
        self.folder = run.root / "tensorboard"
        self.writers: dict[str, Any] = {}
        self.logged: dict[str, int] = {}

    def _writer(self, record: TrialRecord) -> Any:
        from tensorboardX import SummaryWriter

        if record.name not in self.writers:
            self.writers[record.name] = SummaryWriter(str(self.folder / record.name))
        return self.writers[record.name]

    def update(self, record: TrialRecord) -> None:
        for row in new_rows(record, self.logged):
            for name, value in metrics_of(row).items():
                self._writer(record).add_scalar(name, value, row["examples"])
            self.logged[record.name] = row["examples"]

    def finish(self, record: TrialRecord) -> None:
        self.update(record)
        self._writer(record).close()
