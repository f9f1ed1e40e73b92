"""A link to a pack server without Ray: a script of what is asked and when, and a record of what is told."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from trainers.comm import Comm
from trainers.pack_server import PackServer
from trainers.paths import TrialPaths, read_json_lines, read_state
from trainers.sft_trainer import Station, TrialSpec

ALL_INDICES = 99
"""An evaluation number that no trial reaches: it never has to wait."""


def as_command(spec: TrialSpec) -> dict[str, Any]:
    """A trial as it travels and as config.json has it."""
    values = {name: getattr(spec, name) for name in TrialSpec.__dataclass_fields__}
    parts = {
        "folder": str(spec.folder),
        "base": asdict(spec.base),
        "data": asdict(spec.data),
        "candidate": spec.candidate.to_dict(),
    }
    parts |= {
        name: vars(part) if (part := getattr(spec, name)) else None for name in ("rl", "task")
    }
    parts |= {"judge": vars(spec.judge)}
    return json.loads(json.dumps(values | parts))


def enter(spec: TrialSpec, index: int = ALL_INDICES) -> dict[str, Any]:
    return {"kind": "enter", "trial": as_command(spec), "index": index}


def allow(spec: TrialSpec, index: int) -> dict[str, Any]:
    return {"kind": "allow", "trial": spec.name, "index": index}


def cancel(spec: TrialSpec) -> dict[str, Any]:
    return {"kind": "cancel", "trial": spec.name}


STOP = {"kind": "stop"}
LOOK = {"kind": "look"}


class Killed(Exception):
    """The worker dies."""


@dataclass(frozen=True)
class Told:
    """An event, and what was on disk when it was told."""

    event: dict[str, Any]
    rows: list[dict[str, Any]]
    status: dict[str, Any] | None


When = Callable[[], bool]


class FakeLink:
    """Says the next batch of commands as soon as its condition holds; without one, when the server has
    nothing to do. Says stop after the last one. A server that has nothing to do while the script waits
    for something else fails the test."""

    def __init__(self, *script: list[dict[str, Any]] | tuple[When, list[dict[str, Any]]]) -> None:
        self.script = [part if isinstance(part, tuple) else (None, part) for part in script]
        self.folders: dict[str, TrialPaths] = {}
        self.told: list[Told] = []
        self.told_when_idle: list[int] = []
        """Events told so far, at each time when the server had nothing to do."""
        self.written_when_idle: list[int] = []
        """Rows on disk of all trials, at the same times."""
        self.polls = 0
        self.kill: Callable[[dict[str, Any]], bool] = lambda event: False
        self.goes_at: float | None = None
        """When the node will be taken away, as it is told to who looks."""

    def commands(self, *, idle: bool) -> list[dict[str, Any]]:
        self.polls += 1
        if idle:
            self.told_when_idle.append(len(self.told))
            written = [read_json_lines(paths.metrics) for paths in self.folders.values()]
            self.written_when_idle.append(sum(map(len, written)))
        if not self.script:
            return [STOP] if idle else []
        when, commands = self.script[0]
        if not (idle if when is None else when()):
            if idle:
                pytest.fail("the server waits, and nobody will ask it for anything")
            return []
        self.script.pop(0)
        for command in commands:
            if command["kind"] == "enter":
                values = command["trial"]
                self.folders[values["name"]] = TrialPaths(TrialSpec.from_dict(values).folder)
        return commands

    def tell(self, event: dict[str, Any]) -> None:
        if self.kill(event):
            raise Killed
        if "trial" not in event:
            self.told.append(Told(copy.deepcopy(event), [], None))
            return
        paths = self.folders[event["trial"]]
        status = read_state(paths.status) if paths.status.exists() else None
        self.told.append(Told(copy.deepcopy(event), read_json_lines(paths.metrics), status))

    def deadline(self) -> float | None:
        return self.goes_at

    def rows(self, spec: TrialSpec) -> list[dict[str, Any]]:
        """The rows told of a trial, in order; their numbers must count up from 0."""
        events = [told.event for told in self.told if told.event.get("trial") == spec.name]
        events = [event for event in events if event["kind"] == "row"]
        assert [event["index"] for event in events] == list(range(len(events)))
        return [event["row"] for event in events]

    def end(self, spec: TrialSpec) -> dict[str, Any] | None:
        """How a trial ended, if it was told; it must be the last that was told of it."""
        events = [told.event for told in self.told if told.event.get("trial") == spec.name]
        assert all(event["kind"] == "row" for event in events[:-1])
        return events[-1] if events and events[-1]["kind"] == "end" else None


def serve(link: FakeLink, comm: Comm | None = None) -> PackServer:
    """Runs a new server until the script has ended."""
    server = PackServer(link, comm or Comm(), Station)
    server.serve()
    return server
