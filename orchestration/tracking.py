"""Experiment trackers, fed by the driver from the trials' own files: one run per trial, whatever the
number of workers.

A tracker can never end a sweep or hold it up: it lives in a process of its own (tracker_process.py), which
is given up when a call fails or is not answered within ANSWER_S. A second process then takes over what had no
end, offline; when that fails too, the sweep goes on without the tracker. Each of the two is said in one line.
The trials' own metrics.jsonl are whole in any case.
"""

import json
import os
import select
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from orchestration.results import TrialRecord
from trainers.credentials import masked
from trainers.paths import RunPaths

METRICS = (
    "train_loss",
    "eval_loss",
    "eval_bits_per_byte",
    "eval_score",
    "retention_loss",
    "train_reward",
    "eval_reward",
    "kl",
    "entropy",
    "completion_length",
    "episodes",
    "lr",
    "grad_norm",
    "tokens",
    "peak_bytes",
)
ANSWER_S = 30.0
"""How long a call may take: a sweep waits for a tracker that hangs twice so long, once."""
CLOSE_S = 25.0
"""How long the end waits for a tracker's process, which ends itself before (tracker_process.CLOSE_S)."""
ROWS_PER_CALL = 100
"""A call must fit a pipe, 64 KiB: writing it then waits for nobody."""
PROCESS = Path(__file__).with_name("tracker_process.py")
OFFLINE = {"wandb": "its runs go on offline in {folder}/wandb; wandb sync sends them"}
"""What a tracker does that has lost its server; one that is not here has none."""


class Tracker(Protocol):
    """Where metrics go beside runs/NAME. Calls are idempotent: a row is logged once. They raise nothing."""

    def update(self, record: TrialRecord) -> None:
        """Logs the trial's rows that were not logged yet."""
        ...

    def finish(self, record: TrialRecord) -> None:
        """Logs the rest and closes the trial's run."""
        ...


class TrackerError(Exception):
    """What a tracker's process answered, or that it did not."""


def make_trackers(names: list[str], sweep_name: str, run: RunPaths) -> list[Tracker]:
    """The trackers that sweep.yaml asks for.

    Raises:
        ValueError: an unknown tracker.
    """
    kinds = ("wandb", "tensorboard")
    unknown = [name for name in names if name not in kinds]
    if unknown:
        raise ValueError(f"tracking must be among {', '.join(kinds)}, got {', '.join(unknown)}")
    return [ProcessTracker(name, sweep_name, run) for name in names]


def new_rows(record: TrialRecord, logged: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of a trial above the number of examples that was logged last."""
    last = logged.get(record.name, -1)
    return [row for row in record.rows if row["examples"] > last]


def metrics_of(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row that a tracker draws (the base's row has no train_loss)."""
    return {name: row[name] for name in METRICS if row.get(name) is not None}


class ProcessTracker:
    """A tracker of which only words reach this process.

    Args:
        kind: of tracker_process.KINDS.
    """

    def __init__(self, kind: str, sweep_name: str, run: RunPaths) -> None:
        self.kind, self.sweep_name, self.folder = kind, sweep_name, run.root
        self.logged: dict[str, int] = {}
        self.open: dict[str, tuple[TrialRecord, bool]] = {}
        """The latest record of each trial whose run is not closed, and whether it is to be."""
        self.link: Link | None = Link()  # it starts while the workers load

    def update(self, record: TrialRecord) -> None:
        self._track(record, ended=False)

    def finish(self, record: TrialRecord) -> None:
        self._track(record, ended=True)

    def _track(self, record: TrialRecord, *, ended: bool) -> None:
        if self.link is None:
            return
        self.open[record.name] = record, ended
        try:
            self._begin(self.link, None)
            self._send(self.link, record, ended=ended)
        except TrackerError as error:
            self.link.end()
            self.link = self._offline(self.link, error)

    def _begin(self, link: "Link", mode: str | None) -> None:
        if link.facts is not None:
            return
        values = {"kind": self.kind, "sweep_name": self.sweep_name, "folder": str(self.folder)}
        link.facts = link.ask("begin", **values, mode=mode)
        if link.facts.get("mode") == "offline" and not (mode or os.environ.get("WANDB_MODE")):
            self._say(
                f"no API key, runs stay offline in {self.folder / 'wandb'}; wandb sync sends them"
            )

    def _send(self, link: "Link", record: TrialRecord, *, ended: bool) -> None:
        rows = [[row["examples"], metrics_of(row)] for row in new_rows(record, self.logged)]
        # The run begins with its first rows, or with its end where there are none.
        for part in _parts(rows) if rows or record.name in self.logged else [[]]:
            link.ask("log", name=record.name, candidate=record.candidate, rows=part)
        self.logged[record.name] = rows[-1][0] if rows else self.logged.get(record.name, -1)
        if ended:
            link.ask("end", name=record.name, status=record.status, reason=record.reason)
            del self.open[record.name], self.logged[record.name]

    def _offline(self, failed: "Link", error: TrackerError) -> "Link | None":
        """Another process that has everything of the runs that have no end; None: there is none."""
        if self.kind in OFFLINE and not failed.is_second:
            link, self.logged = Link(is_second=True), {}
            try:
                self._begin(link, "offline")
                for record, ended in list(self.open.values()):
                    self._send(link, record, ended=ended)
            except TrackerError as again:
                link.end()
                error = again
            else:
                self._say(f"{error}; {OFFLINE[self.kind].format(folder=self.folder)}")
                return link
        self._say(
            f"{error}; nothing more is tracked there, the sweep goes on; its metrics are in "
            f"{self.folder / 'trials'}"
        )
        return None

    def _say(self, text: str) -> None:
        print(f"{self.kind}: {masked(text)}", file=sys.stderr)


def _parts(rows: list[list[Any]]) -> Iterator[list[list[Any]]]:
    for start in range(0, len(rows), ROWS_PER_CALL):
        yield rows[start : start + ROWS_PER_CALL]


class Link:
    """A tracker's process, from start to end; it ends with this object or with the interpreter.

    Attributes:
        facts: what it said when it began.
        is_second: it took over from one that failed.
    """

    def __init__(self, *, is_second: bool = False) -> None:
        self.facts: dict[str, Any] | None = None
        self.is_second = is_second
        self.process = subprocess.Popen(
            # -P: nothing of the working directory takes a package's place.
            [sys.executable, "-P", str(PROCESS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is the driver's
        )
        self._closing = weakref.finalize(self, _close, self.process)

    def ask(self, call: str, **values: Any) -> dict[str, Any]:
        """Makes a call and returns its answer.

        Raises:
            TrackerError: it failed, or was not answered within ANSWER_S.
        """
        calls, answers = _pipes(self.process)
        try:
            calls.write((json.dumps({"call": call} | values) + "\n").encode())
            calls.flush()
        except BrokenPipeError:
            answer = b""
        else:
            if not select.select([answers], [], [], ANSWER_S)[0]:
                raise TrackerError(f"no answer within {ANSWER_S:g} s")
            answer = answers.readline()
        if not answer:
            raise TrackerError(f"its process ended with exit code {self.process.wait()}")
        found = json.loads(answer)
        if "error" in found:
            raise TrackerError(found["error"])
        return found

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self._closing()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _close(process: subprocess.Popen[bytes]) -> None:
    calls, answers = _pipes(process)
    with suppress(BrokenPipeError):  # of a call that it did not live to read
        calls.close()
    try:
        process.wait(CLOSE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    answers.close()
