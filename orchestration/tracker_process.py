"""The process of one tracker (see tracking.py): here its own package may fail, hang and print as it likes.

Reads a call a line from standard input and answers each on standard output, both JSON. It is run by its path
and imports no module of ours, so that nothing lies between the package and what goes wrong in it.
"""

import json
import os
import queue
import re
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

INIT_S = 15
"""How long wandb may try to reach its server when a run begins."""
FINISH_S = 15
"""How long wandb may send what is left when a run ends; the rest is in the run's file, for `wandb sync`."""
CLOSE_S = 20
"""How long this process outlives the driver, or its word that there is no more."""


class Wandb:
    """Weights & Biases: id = trial, group = sweep, step = examples; offline when there is no key.

    Args:
        mode: online or offline; None: as WANDB_MODE says, else by whether there is a key.
    """

    def __init__(self, sweep_name: str, folder: str, mode: str | None) -> None:
        import wandb

        self.wandb, self.sweep_name, self.folder = wandb, sweep_name, Path(folder) / "wandb"
        wandb.setup(settings=wandb.Settings(silent=True))
        self.mode = mode or os.environ.get("WANDB_MODE") or self._default_mode()
        self.runs: dict[str, Any] = {}

    def _default_mode(self) -> str:
        return "online" if self.wandb.login(prompt=False, verify=False) else "offline"

    def facts(self) -> dict[str, Any]:
        return {"mode": self.mode}

    def _run(self, name: str, candidate: dict[str, Any]) -> Any:
        if name not in self.runs:
            self.runs[name] = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tenfold"),
                group=self.sweep_name,
                name=name,
                id=re.sub(r"[^A-Za-z0-9._-]", "_", f"{self.sweep_name}-{name}"),
                resume="allow",
                config=candidate,
                dir=str(self.folder.parent),  # it makes the folder wandb there
                mode=self.mode,
                reinit="create_new",
                settings=self.wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=INIT_S,
                    finish_timeout=FINISH_S,
                    finish_timeout_raises=True,
                ),
            )
        return self.runs[name]

    def log(self, name: str, candidate: dict[str, Any], rows: list[list[Any]]) -> None:
        run = self._run(name, candidate)
        for step, values in rows:
            run.log(values, step=step)

    def end(self, name: str, status: str, reason: str) -> None:
        run = self.runs.pop(name)
        run.summary.update({"status": status, "reason": reason})
        run.finish()


class TensorBoard:
    """TensorBoard event files, a folder for each trial; step = examples."""

    def __init__(self, sweep_name: str, folder: str, mode: str | None) -> None:
        from tensorboardX import SummaryWriter

        self.make_writer, self.folder = SummaryWriter, Path(folder) / "tensorboard"
        self.writers: dict[str, Any] = {}

    def facts(self) -> dict[str, Any]:
        return {}

    def log(self, name: str, candidate: dict[str, Any], rows: list[list[Any]]) -> None:
        if name not in self.writers:
            self.writers[name] = self.make_writer(str(self.folder / name))
        for step, values in rows:
            for metric, value in values.items():
                self.writers[name].add_scalar(metric, value, step)
        self.writers[name].flush()

    def end(self, name: str, status: str, reason: str) -> None:
        self.writers.pop(name).close()


KINDS = {"wandb": Wandb, "tensorboard": TensorBoard}


def _require_writable(folder: Path) -> None:
    """wandb turns to a temporary folder where it cannot write, and drops rows where a disk is full."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0")


def serve(calls: "queue.SimpleQueue[str]", answers: int) -> None:
    """Obeys every call until the empty one."""
    tracker: Any = None
    while line := calls.get():
        try:
            call = json.loads(line)
            kind, values = call.pop("call"), call
            if kind == "begin":
                tracker = KINDS[values.pop("kind")](**values)
                answer = tracker.facts()
            else:
                _require_writable(tracker.folder)
                answer = getattr(tracker, kind)(**values) or {}
        except Exception as error:  # the boundary of this process: the driver decides
            answer = {"error": _one_line(error)}
        os.write(answers, (json.dumps(answer) + "\n").encode())


def _one_line(error: Exception) -> str:
    text = " ".join(f"{error}".split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def main() -> None:
    """Runs until standard input ends, and a little while longer at most."""
    answers = os.dup(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # the terminal is the sweep's, and standard output holds the answers
        os.dup2(silence, descriptor)
    calls: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            calls.put(line)
        calls.put("")
        ending = threading.Timer(CLOSE_S, os._exit, (1,))
        ending.daemon = True
        ending.start()

    threading.Thread(target=read, daemon=True).start()
    serve(calls, answers)


if __name__ == "__main__":
    main()
