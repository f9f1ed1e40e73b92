"""`tenfold sweep` and `tenfold resume` as a user starts them: processes in a folder of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from trainers.paths import read_json_lines

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "trainers" / "assets" / "tiny-llama"
FUNCTIONS = ROOT / "trainers" / "assets" / "demo" / "functions.jsonl"
TIMEOUT_S = 800
SHORT: dict[str, Any] = {
    "lora_rank": 4,
    "learning_rate": [1e-3, 3e-3, 1e-2],
    "examples": 160,
    "eval_every": 32,
    "eval": 0.01,
    "quantization": "none",
    "dtype": "fp32",
    "scheduler": "fifo",
}
"""Three trials of five evaluations, on nine rows: with the usual 48 they take longer than training."""
WHOLE = SHORT | {"pack_size": 1, "data": "functions.jsonl", "cpus_per_worker": 2}
"""What the fixture `whole_sweep` ran undisturbed. One adapter in a pack: its composition is then the same whenever a
trial enters, and the numbers of a disturbed run must be equal, not near. One group, whose start is what costs."""


def start(
    folder: Path,
    *arguments: str,
    cache: str = "cache",
    module: str = "orchestration.cli",
    own_session: bool = False,
    **variables: str,
) -> subprocess.Popen[str]:
    """Starts `tenfold ...` in a folder, with its cache there.

    Args:
        module: what takes the place of `tenfold` (see stubs.py).
        own_session: as a terminal starts it: its process group can be signalled.
        variables: of its environment.
    """
    places = {"TENFOLD_CACHE": str(folder / cache), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=os.environ | places | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=own_session,
    )


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Waits for a process that `start` started."""
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def write_config(folder: Path, **config: object) -> Path:
    """Writes sweep.yaml for the shipped base and the demo's functions; returns the run's folder.

    Runs of one folder (by other names) share its cache, and with it the measured size of a forward:
    only then can their losses be equal to the last bit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {"model": str(BASE), "data": str(FUNCTIONS), "name": "run", "global_batch_size": 16}
    values |= config
    (folder / "sweep.yaml").write_text(yaml.safe_dump(values))
    return folder / "runs" / str(values["name"])


def sweep(folder: Path, **config: object) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Runs a sweep to its end; returns the run's folder and the finished process."""
    run = write_config(folder, **config)
    return run, ended(start(folder, "sweep", "sweep.yaml"))


def resume(folder: Path, name: str = "run") -> subprocess.CompletedProcess[str]:
    """Runs `tenfold resume` to its end."""
    return ended(start(folder, "resume", f"runs/{name}"))


def told(done: subprocess.CompletedProcess[str]) -> str:
    """What a process printed, for the message of a failed assertion."""
    return f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[str] | None = None
) -> None:
    """Waits for a state of a running sweep: that of a process, which must live, or this process's own."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process is None or process.poll() is None, process and told(ended(process))
        assert time.monotonic() < deadline, "the sweep never came to the awaited state"
        time.sleep(0.1)


def statuses(run: Path) -> dict[str, dict]:
    """Trial -> status.json, of the trials that ended."""
    return {
        path.parent.name: json.loads(path.read_text()) for path in run.glob("trials/*/status.json")
    }


def rows(trial: Path) -> list[dict]:
    """The metrics rows of a trial, which may have none yet."""
    return read_json_lines(trial / "metrics.jsonl")


def losses(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Trial -> (examples, eval_loss) of every evaluation."""
    return {
        trial.name: [(row["examples"], row["eval_loss"]) for row in rows(trial)]
        for trial in sorted((run / "trials").iterdir())
    }


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that name a folder."""
    lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(folder) in line]


def candidate_dict(**values: object) -> dict[str, object]:
    """A trial's candidate as its config.json has it."""
    shared = {"lora_alpha": 32.0, "lr_schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}
    shared |= {"max_grad_norm": 1.0, "dropout": 0.0, "seed": 0, "global_batch_size": 16}
    return shared | {"learning_rate": 1e-3, "lora_rank": 4, "target": ["mlp"]} | values
