"""Tells of a running sweep: a live view on a terminal, a line per evaluation elsewhere."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.live import Live

from orchestration.beside import beside
from orchestration.console import PlainConsole
from orchestration.live_view import view
from orchestration.objective import LOSS, Objective
from orchestration.results import TrialRecord
from orchestration.trial_states import SweepState, TrialState
from orchestration.verbosity import is_verbose
from trainers.terminal import printable

REFRESHES_PER_S = 2
LOOK_S = 1.0
"""How often the view asks which trials share a group."""

Packs = Mapping[str, list[str]]
"""Worker group that is ready -> the trials that share its forwards now."""


class Progress:
    """State of all trials, told as they report. Use as a context manager.

    Args:
        names: trials that are known already.
        num_discarded: candidates that never became one.
        num_examples: of a whole trial.
        num_trials: that there will be; default: those that are known.
        eval_every: examples between two evaluations.
        discarded: rule -> how many candidates it discarded.
    """

    def __init__(
        self,
        names: list[str],
        num_discarded: int,
        num_examples: int,
        console: Console | None = None,
        num_trials: int | None = None,
        objective: Objective = LOSS,
        *,
        eval_every: int | None = None,
        discarded: Mapping[str, int] | None = None,
    ) -> None:
        self.console = console or PlainConsole()
        self.state = SweepState(
            objective=objective,
            num_examples=num_examples,
            eval_every=eval_every,
            num_trials=num_trials or len(names),
            num_discarded=num_discarded,
            discarded=dict(discarded or {}),
            began=time.monotonic(),
            trials={name: TrialState(name) for name in names},
        )
        # Events come from Tune's loop, and the view is drawn by a thread of rich's.
        self.lock = threading.RLock()
        # Ray writes where it likes: under its output a view would be torn.
        self.live = self._live() if self.console.is_terminal and not is_verbose() else None

    def _live(self) -> Live:
        return Live(
            console=self.console,
            get_renderable=self.view,
            refresh_per_second=REFRESHES_PER_S,
        )

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            with self.lock:
                self.state.is_over = True
            self.live.stop()

    def view(self) -> Any:
        """What is on the terminal now."""
        with self.lock:
            return view(self.state, time.monotonic(), *self.console.size)

    @contextmanager
    def following(self, look: Callable[[], Packs], num_groups: int) -> Iterator[None]:
        """Shows, on a terminal, which worker groups are ready and which trials share one.

        Args:
            look: asks them; it gives nothing where they do not answer.
        """
        if self.live is None:
            yield
            return
        with self.lock:
            self.state.num_groups = num_groups
        with beside(partial(self._look, look)):
            yield

    def _look(self, look: Callable[[], Packs], over: threading.Event) -> None:
        while not over.wait(LOOK_S):
            packs = look()
            with self.lock:
                self.state.saw_packs(packs, time.monotonic())

    def note(self, text: str) -> None:
        """Says something of the sweep as a whole."""
        with self.lock:
            self.state.last_line = printable(text)
        self._tell(text)

    def say(self, text: str) -> None:
        """Says what must not be overlooked; it stays above the view."""
        if self.live:
            self.live.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)
        else:
            self._tell(text)

    def added(self, name: str) -> None:
        """A trial that was not planned is to be run, too."""
        with self.lock:
            if name not in self.state.trials:
                self.state.trials[name] = TrialState(name)
                self.state.num_trials += 1

    def known(self, records: Iterable[TrialRecord]) -> None:
        """Trials that an earlier driver left, ended or not."""
        with self.lock:
            for record in records:
                self.state.was(record)

    def started(self, name: str) -> None:
        """A trial may train from now on; its first evaluation is what is told of it."""
        with self.lock:
            self.state.started(name, time.monotonic())

    def reported(self, name: str, result: dict[str, Any]) -> None:
        """A trial was evaluated."""
        with self.lock:
            self.state.reported(name, result["examples"], result["eval_loss"], time.monotonic())
            done = self.state.trials[name].examples >= self.state.num_examples
        if not done:  # the line of its end says this, too
            self._tell(f"{name}: {self._standing(name)}")

    def ended(self, name: str, status: str, reason: str) -> None:
        """A trial has ended."""
        with self.lock:
            self.state.ended(name, status)
        whole = f", {self._standing(name)}" if status == "finished" else ""
        self._tell(f"{name}: {status}{whole}{f' ({reason})' if reason else ''}")

    def _standing(self, name: str) -> str:
        trial, score = self.state.trials[name], self.state.objective
        seen = f"{trial.examples}/{self.state.num_examples} examples"
        return seen if trial.last is None else f"{seen}, {score.key} {score.text(trial.last)}"

    def _tell(self, line: str) -> None:
        if self.live:
            self.live.refresh()
            return
        self.console.print(
            f"[{time.monotonic() - self.state.began:5.0f} s] {printable(line)}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
