"""Tenfold from Python: `Sweep` has the verbs of the command line, and does what they do (docs/api.md).

It may be called from any thread, beside a running asyncio loop (Jupyter) and inside a process that is connected to a
Ray of its own, which then stays. Nothing is printed but what a sweep says while it runs; no signal is handled.
"""

import numbers
import os
import posixpath
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.config import SweepConfig, load_config, make_config
from orchestration.exit_codes import INTERRUPTED
from orchestration.planning import run_name
from orchestration.run_folder import run_at
from orchestration.saved import SOURCE, saved_config, saved_sweep
from orchestration.yaml_file import read_values
from trainers.object_store import is_url
from trainers.paths import RunPaths, storage_problem
from trainers.terminal import printable

if TYPE_CHECKING:
    import pandas
    from rich.console import Console

_running = threading.Lock()
AS_FLAGS = {"name", "address"}
"""Keys that `tenfold sweep` takes as flags: sweep.yaml is kept as it is written."""


class Sweep:
    """A sweep that is to be run, or one that was.

    Args:
        config: a sweep.yaml; None: the keys alone.
        keys: of sweep.yaml (docs/configuration.md); they win over the file.

    Raises:
        ValueError: a key or value that cannot be used, one line for each.
    """

    def __init__(self, config: str | os.PathLike[str] | None = None, **keys: Any) -> None:
        with _one_line():
            self.config, self._source = _read(config, keys)
        self._place: str | None = None

    @classmethod
    def open(cls, place: str | os.PathLike[str]) -> "Sweep":
        """A sweep that was begun, by whomever: from its folder or URL.

        Raises:
            ValueError: there is none.
        """
        with _one_line():
            saved = saved_sweep(run_at(str(place)), str(place))
            opened = cls.__new__(cls)
            opened.config = saved_config(saved.run, saved.resolved, str(place))
            opened._source, opened._place = saved.resolved[SOURCE], str(place)
        return opened

    @property
    def place(self) -> str:
        """Folder or URL of its run."""
        if self._place is not None:
            return self._place
        storage, name = self.config.storage, run_name(self.config)
        return posixpath.join(storage, name) if is_url(storage) else str(Path(storage, name))

    def __repr__(self) -> str:
        return f"Sweep({self.place!r})"

    # Before it runs

    def check(self, *, num_shown: int = 0, base_loss: bool = False) -> dict[str, Any]:
        """What `tenfold check --json` prints: pitfalls and the data's audit. "refusals" says why a sweep would end
        at once."""
        from orchestration.check import CheckOptions, checked_config

        with _one_line():
            return checked_config(
                self.config, CheckOptions(num_shown=num_shown, base_loss=base_loss)
            )

    def plan(self) -> dict[str, Any]:
        """What `tenfold plan --json` prints: every candidate, admitted or discarded and why."""
        from orchestration.placing import asked_inventory, placed_plan

        with _one_line():
            return placed_plan(self.config, asked_inventory(self.config))

    # Running

    def run(self, *, resume: bool = False, quiet: bool = False) -> "Sweep":
        """`tenfold sweep`: trains the candidates, and returns when all have ended.

        Args:
            resume: go on with the run of this name, if there is one.
            quiet: say nothing meanwhile.

        Raises:
            ValueError: whatever can be known before a trial starts, or ends the sweep as a whole.
            KeyboardInterrupt: it was interrupted; the message says how to go on.
        """
        from orchestration.run import run_sweep

        with _one_line(), _alone():
            self._ended(
                run_sweep(self.config, self._source, resume=resume, console=_console(quiet))
            )
        return self

    def resume(self, *, address: str | None = None, quiet: bool = False) -> "Sweep":
        """`tenfold resume`: goes on after a kill, anywhere; args and errors as `run`."""
        from orchestration.run import resume_sweep

        with _one_line(), _alone():
            self._ended(resume_sweep(self.place, address, _console(quiet)))
        return self

    def _ended(self, code: int) -> None:
        if code == INTERRUPTED:
            from orchestration.run import how_to_go_on

            raise KeyboardInterrupt(how_to_go_on(self._run()))

    def stop_trial(self, trial: str) -> str:
        """`tenfold trial stop`: ends a trial at its next evaluation at the latest.

        Args:
            trial: its name, or the beginning of it.

        Returns:
            What became of it.
        """
        from orchestration.trial_verb import stop_trial

        with _one_line():
            return "\n".join(stop_trial(self.place, trial))

    def clone_trial(self, trial: str, **changes: Any) -> str:
        """`tenfold trial clone`: a trial of another's candidate, with keys of it changed.

        Args:
            trial: as `stop_trial`.
            changes: learning_rate=3e-4, lora_rank=32, ...

        Returns:
            The new trial's name.

        Raises:
            ValueError: a candidate that the sweep has, or that its pruner discards, with the numbers.
        """
        from orchestration.trial_verb import clone_trial

        with _one_line():
            return clone_trial(self.place, trial, _plain(changes))[0]

    # What there is of it

    def status(self) -> dict[str, Any]:
        """What `tenfold status --json` prints."""
        from orchestration.status import status_of

        with _one_line():
            return status_of(self.place)

    def results(self) -> "pandas.DataFrame":
        """A row for each trial, best first; see frames.results_frame."""
        from orchestration.frames import results_frame

        with _one_line():
            return results_frame(self._run())

    def metrics(self) -> "pandas.DataFrame":
        """A row for each evaluation of each trial; see frames.metrics_frame."""
        from orchestration.frames import metrics_frame

        with _one_line():
            return metrics_frame(self._run())

    def report(self) -> str:
        """`tenfold report`: writes report.html again; returns where it is."""
        from orchestration.report_verb import write_report_again

        with _one_line():
            return write_report_again(self.place)

    def export(
        self,
        *,
        trial: str | None = None,
        output: str | os.PathLike[str] | None = None,
        merge: bool = False,
        server: str | None = None,
    ) -> Path:
        """`tenfold export`: a trial's adapter, or its merged weights, in a new folder.

        Args:
            trial: default: the best one.
            output: default: export/adapter or export/merged in the run's folder.
            server: what it must run on ('vllm').
        """
        from orchestration.export import default_output, export

        with _one_line():
            target = default_output(self._run(), merge=merge) if output is None else Path(output)
            export(self.place, trial=trial, output=target, merge=merge, server=server)
        return target

    def _run(self) -> RunPaths:
        return saved_sweep(run_at(self.place), self.place).run


def _read(config: str | os.PathLike[str] | None, keys: dict[str, Any]) -> tuple[SweepConfig, str]:
    """A config, and the text that is kept as its sweep.yaml."""
    import yaml

    given = _plain(keys)
    if config is None:
        if not given:
            raise ValueError("Sweep must be given a sweep.yaml, or model= and data=, got nothing")
        return make_config(dict(given), "Sweep"), yaml.safe_dump(given, sort_keys=False)
    path = Path(config)
    checked = load_config(path, **given)
    if given.keys() <= AS_FLAGS:
        return checked, path.read_text(encoding="utf-8")
    return checked, yaml.safe_dump(read_values(path) | given, sort_keys=False)


def _plain(value: Any) -> Any:
    """A value as YAML holds it: paths are texts, tuples lists, numbers of numpy numbers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, int) else value


def _console(quiet: bool) -> "Console":
    from orchestration.console import PlainConsole

    console = PlainConsole()
    console.quiet = quiet
    return console


@contextmanager
def _alone() -> Iterator[None]:
    """A sweep is its process's only one: they would share Ray, and one would end it under the other."""
    if not _running.acquire(blocking=False):
        raise ValueError(
            "a process must run one sweep at a time, another runs already; wait for it, or use `tenfold sweep`"
        )
    try:
        yield
    finally:
        _running.release()


@contextmanager
def _one_line() -> Iterator[None]:
    """What the command line says in a line is a ValueError of that line."""
    try:
        yield
    except ValueError as error:
        if printable(str(error)) == str(error):
            raise
        raise ValueError(printable(str(error))) from None
    except OSError as error:
        if line := storage_problem(error):
            raise ValueError(line) from error
        raise
