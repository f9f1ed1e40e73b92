"""The stub worker of a soak: a warm group whose trials train nothing, and some of which go wrong as told.

Faults of a trial (its dict's "fault"), at its first evaluation:
    kill once      the worker is killed
    kill           the worker is killed whenever the trial enters
    hang once      the worker falls silent
    diverge, fail  the trial ends so
    damage         its status.json and one row of its metrics are damaged after it ended
"""

import os
import signal
import time
import zlib
from pathlib import Path
from typing import Any

from trainers.integrity import seal_folder
from trainers.paths import (
    TrialPaths,
    replace_folder,
    temporary_folder,
    write_json,
    write_json_lines,
    write_state,
)

FAULTS = ("kill once", "kill", "hang once", "diverge", "fail", "damage")
NUM_EVALUATIONS = 3
EVALUATION_S = 0.2
"""So that kills of others find trials at work."""


def loss_of(name: str, index: int) -> float:
    """eval_loss of a trial's evaluation: any number that is always the same."""
    return 2.0 + zlib.crc32(f"{name} {index}".encode()) / 2**32 - 0.1 * index


def serve(config: dict[str, Any]) -> None:
    """A Train function in the place of trainers.worker.serve_worker."""
    from orchestration.broker_link import link_of
    from trainers.run_lock import hold_run

    link = link_of(config)
    link.here()
    if not link.begin():
        return
    with hold_run(Path(config["warm"]["folder"])):
        link.hello({"max_tokens": 512})
        members: dict[str, Member] = {}
        while True:
            for command in link.commands(idle=True):
                if command["kind"] == "stop":
                    return
                _obey(link, members, command)


class Member:
    """A trial in the stub's pack."""

    def __init__(self, trial: dict[str, Any], link: Any) -> None:
        self.trial, self.link = trial, link
        self.paths = TrialPaths(Path(trial["folder"]))
        self.rows: list[dict[str, Any]] = []

    def go_to(self, index: int) -> bool:
        """Evaluates up to a number; whether the trial has ended."""
        while len(self.rows) <= index:
            number, name = len(self.rows), self.trial["name"]
            if number == 0 and self._ends_at_once():
                return True
            time.sleep(EVALUATION_S)
            examples = number + 1
            row = {"examples": examples, "steps": examples, "eval_loss": loss_of(name, number)}
            self.rows.append(row)
            write_json_lines(self.paths.metrics, self.rows)
            self._save()
            last = examples == NUM_EVALUATIONS
            if last:
                self._end("finished", "")
            self.link.tell(
                {"kind": "row", "trial": name, "index": number, "row": row, "last": last}
            )
            if last:
                self._tell_end("finished", "")
                return True
        return False

    def _ends_at_once(self) -> bool:
        fault, mark = self.trial["fault"], self.paths.root / "happened"
        first = not mark.exists()
        mark.touch()
        if fault == "kill" or (fault == "kill once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        while fault == "hang once" and first:
            time.sleep(1)
        if fault in ("diverge", "fail"):
            status = {"diverge": "diverged", "fail": "failed"}[fault]
            self._end(status, "as told")
            self._tell_end(status, "as told")
            return True
        return False

    def _save(self) -> None:
        folder = temporary_folder(self.paths.checkpoint)
        write_json(folder / "trainer_state.json", {"examples": len(self.rows), "rows": self.rows})
        seal_folder(folder)
        replace_folder(folder, self.paths.checkpoint, keep_previous=True)

    def _end(self, status: str, reason: str) -> None:
        at = {"examples": len(self.rows), "steps": len(self.rows)}
        write_state(self.paths.status, {"status": status, "reason": reason} | at)
        if self.trial["fault"] == "damage":
            for path in (self.paths.status, self.paths.metrics):
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 1
                path.write_bytes(data)

    def _tell_end(self, status: str, reason: str) -> None:
        event = {"kind": "end", "trial": self.trial["name"], "status": status, "reason": reason}
        self.link.tell(event)


def _obey(link: Any, members: dict[str, Member], command: dict[str, Any]) -> None:
    if command["kind"] == "enter":
        name = command["trial"]["name"]
        members[name] = Member(command["trial"], link)
    else:
        name = command["trial"]
    if command["kind"] == "cancel":
        members.pop(name, None)
    elif name in members and members[name].go_to(command["index"]):
        del members[name]
