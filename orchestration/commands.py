"""What is asked of a running sweep from elsewhere: files in its folder, which its driver reads and answers.

commands/ID.json   a command, written whole by whoever asks; IDs sort by the time at which they were made
answers/ID.json    what became of it, written by the driver once it has obeyed or refused

A command without an answer is obeyed by the next driver (`tenfold resume`). Obeying one twice changes nothing.
Imports neither torch nor ray.
"""

import getpass
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trainers.integrity import DamagedError
from trainers.mirror import fetch, fetch_new, shown
from trainers.paths import RunPaths, read_state, write_state

Kind = Literal["stop", "clone"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    Attributes:
        id: its file's name.
        kind: stop, or clone.
        trial: whole name of the trial that it is about.
        changes: of a clone: key of the candidate -> its value.
        by: who asks, for a person.
    """

    id: str
    kind: Kind
    trial: str
    changes: dict[str, Any] = field(default_factory=dict)
    by: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a command: ok, and a line for a person. trial: of a clone, its name."""

    ok: bool
    line: str
    trial: str = ""


def post(run: RunPaths, kind: Kind, trial: str, changes: dict[str, Any] | None = None) -> Command:
    """Writes a command into a run, for its driver."""
    command = Command(
        id=f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}",
        kind=kind,
        trial=trial,
        changes=changes or {},
        by=_who(),
    )
    write_state(run.commands / f"{command.id}.json", asdict(command))
    return command


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "somebody"
    return f"{user} at {socket.gethostname()}"


def commands_of(run: RunPaths) -> Iterator[tuple[str, Command | None]]:
    """(id, command) of all that were ever asked, the first first; None where its file is damaged."""
    for path in sorted(run.commands.glob("*.json")):
        try:
            values = read_state(path)
            yield path.stem, Command(**values) if values.get("id") == path.stem else None
        except (DamagedError, TypeError):
            yield path.stem, None


def answer_of(run: RunPaths, command: str) -> Answer | None:
    """What became of a command; None where nobody has said so yet (or his word is damaged)."""
    path = run.answers / f"{command}.json"
    try:
        return Answer(**read_state(path)) if path.is_file() else None
    except (DamagedError, TypeError):
        return None


def answered(run: RunPaths, command: str, answer: Answer) -> None:
    """Writes what became of a command."""
    write_state(run.answers / f"{command}.json", asdict(answer))


def unanswered(run: RunPaths) -> list[tuple[str, Command | None]]:
    """Those of `commands_of` that have no answer."""
    return [(one, command) for one, command in commands_of(run) if answer_of(run, one) is None]


def wait_for_answer(run: RunPaths, command: Command, wait_s: float, poll_s: float) -> Answer | None:
    """Looks for an answer until the time is up."""
    deadline = time.monotonic() + wait_s
    while True:
        fetch(run.answers / f"{command.id}.json")
        found = answer_of(run, command.id)
        if found is not None or time.monotonic() > deadline:
            return found
        time.sleep(poll_s)


def fetch_commands(run: RunPaths) -> None:
    """Brings here what was asked on an object store meanwhile."""
    fetch_new(run.commands)


def damaged_answer(run: RunPaths, command: str) -> Answer:
    """Of a command that cannot be read."""
    place = shown(run.commands / f"{command}.json")
    return Answer(ok=False, line=f"{place}: must be a command as `tenfold trial` writes it, is not")
