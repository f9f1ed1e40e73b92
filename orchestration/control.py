"""The driver's side of what is asked of its sweep: trials are stopped, clones are taken up, and each command is
answered (orchestration/commands.py)."""

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from orchestration.clones import Admission, clone_records, record_clone
from orchestration.commands import (
    Answer,
    Command,
    answer_of,
    answered,
    commands_of,
    damaged_answer,
    fetch_commands,
    unanswered,
)
from orchestration.progress import Progress
from orchestration.results import read_trial
from orchestration.saved import has_ended, saved_sweep
from orchestration.trials import TrialMaker, end_stopped, known_names
from search_spaces.candidate import trial_name
from trainers.mirror import mirror_of, shown
from trainers.object_store import StoreError
from trainers.paths import RunPaths

CLONES_BESIDE = 4
LOOK_S, STORE_LOOK_S = 0.5, 5.0
"""How often a driver looks for commands: in a folder, and on an object store, which wants money for it."""


class Live(Protocol):
    """The searcher of a sweep that runs (live_searcher.py)."""

    def add(self, clone: dict[str, Any]) -> None: ...

    def drop(self, name: str) -> bool: ...


class Control:
    """Obeys commands.

    Args:
        maker: of the sweep's trials.
        cancel: frees the place of a trial at once, with a reason; None: it trains to its next evaluation.
        put_ahead: lets a clone in before Tune starts it; None: it has no place to wait for.
    """

    def __init__(
        self,
        run: RunPaths,
        maker: TrialMaker,
        progress: Progress,
        cancel: Callable[[str, str], None] | None = None,
        put_ahead: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.run, self.maker, self.progress, self.cancel = run, maker, progress, cancel
        self.put_ahead = put_ahead or (lambda trial: None)
        self.beside = CLONES_BESIDE if put_ahead else 0
        """Clones that run beside as many planned trials as there would be without them."""
        self.stopped: dict[str, str] = {}
        """Trial that is to end -> why. Whoever decides on a trial looks here first."""
        self.is_search_over = False
        """Whether the best two are already trained again on new seeds, so that a clone would come too late."""
        self.live: Live | None = None
        self.end_unbegun: Callable[..., None] = lambda name, reason: None
        self._every_s = STORE_LOOK_S if mirror_of(run.root) else LOOK_S
        self._looked_at = -self._every_s

    def attach(self, live: Live, end_unbegun: Callable[..., None]) -> None:
        """Tells what the commands are for from now on.

        Args:
            end_unbegun: (name, reason=): ends a trial of which Tune will not hear any more.
        """
        self.live, self.end_unbegun = live, end_unbegun

    def look(self) -> None:
        """Obeys what was asked since the last look; often called, it looks every few seconds."""
        if time.monotonic() > self._looked_at + self._every_s:
            self.look_now()

    def look_now(self) -> None:
        """Obeys what was asked since the last look."""
        fetch_commands(self.run)
        for name, command in unanswered(self.run):
            answer = self._obeyed(command) if command else damaged_answer(self.run, name)
            answered(self.run, name, answer)
            self.progress.say(answer.line)
        self._looked_at = time.monotonic()

    def _obeyed(self, command: Command) -> Answer:
        try:
            if command.kind == "stop":
                return self._stop(command)
            if command.kind == "clone":
                return self._clone(command)
            raise ValueError(f"a command must be stop or clone, is {command.kind!r}")
        except StoreError:
            raise  # nobody can say what is there
        except ValueError as error:
            return Answer(ok=False, line=str(error))

    def _stop(self, command: Command) -> Answer:
        at_once = require_open(self.run, command) or self.stop_trial(
            command.trial, stop_reason(command)
        )
        when = "stopped" if at_once else "stops at its next evaluation at the latest"
        return Answer(ok=True, line=f"{command.trial}: {when} ({command.by})")

    def stop_trial(self, name: str, reason: str) -> bool:
        """Ends a trial for a reason; True: it has ended, False: it will, at its next evaluation at the latest."""
        self.stopped[name] = reason
        if self.cancel is not None:
            self.cancel(name, reason)
        if self.live is None or not self.live.drop(name):
            return False
        self.end_unbegun(name, reason=reason)
        return True

    def stop_all(self, names: Iterable[str], reason: str) -> None:
        """Ends every trial of these that has no end yet."""
        for name in names:
            if not has_ended(self.run.trial(name)):
                self.stop_trial(name, reason)

    def _clone(self, command: Command) -> Answer:
        made = {r["command"]: name for name, r in clone_records(self.run).items()}
        name = made.get(command.id) or self._made(command)
        return Answer(ok=True, line=f"{name}: cloned of {command.trial} ({command.by})", trial=name)

    def _made(self, command: Command) -> str:
        if self.is_search_over:
            raise ValueError(
                f"{command.trial}: a clone must come before the search has ended, the best two are trained on new "
                "seeds already; begin a new run"
            )
        saved = saved_sweep(self.run, shown(self.run.root))
        candidate = Admission(saved, shown(self.run.root)).clone(command.trial, command.changes)
        record_clone(self.run, candidate, command)
        trial = self.maker.write(candidate)
        self.progress.added(trial["name"])
        if self.live is not None:
            self.live.add(trial)
        return trial_name(candidate)


def require_open(run: RunPaths, command: Command) -> bool:
    """Whether a stop was obeyed by an earlier driver.

    Raises:
        ValueError: the trial is none of this run, or has ended otherwise.
    """
    name, paths = command.trial, run.trial(command.trial)
    if name not in known_names(run):
        raise ValueError(f"{shown(run.root)}: has no trial {name!r} that could be stopped")
    if not has_ended(paths):
        return False
    record = read_trial(paths)
    if record.reason == stop_reason(command):
        return True
    raise ValueError(f"{name}: must be a trial that has not ended, it is {record.status}")


def stop_reason(command: Command) -> str:
    """What status.json says of a trial that a command ended."""
    return f"stopped by {command.by} (tenfold trial stop)"


def stop_left(run: RunPaths) -> None:
    """Ends the trials whose stop an earlier driver was asked for and did not live to write. Nobody trains now."""
    for name, command in commands_of(run):
        if command is None or command.kind != "stop":
            continue
        answer, paths = answer_of(run, name), run.trial(command.trial)
        is_known = command.trial in known_names(run)
        if (answer is None or answer.ok) and is_known and not has_ended(paths):
            end_stopped(paths, stop_reason(command))
