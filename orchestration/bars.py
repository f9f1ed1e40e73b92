"""Bars on a terminal's stderr for what takes longer than a second in this process; nothing on pipes.

How much is left nobody knows before a file's last row is read, or a base is loaded: the bars move, and count.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from orchestration.beside import beside
from trainers.terminal import printable

AFTER_S = 1.0
"""What is over sooner needs no bar."""


@contextmanager
def reading() -> Iterator[None]:
    """Shows data being read and tokenized meanwhile."""
    if not sys.stderr.isatty():
        yield
        return
    from trainers.data.reading_progress import watched  # `tenfold --help` reads no data

    with watched(ReadingBar()):
        yield


@contextmanager
def working(text: str) -> Iterator[None]:
    """Shows that something goes on meanwhile, and for how long."""
    if not sys.stderr.isatty():
        yield
        return
    with beside(partial(_spin, text)):
        yield


def _spin(text: str, over: threading.Event) -> None:
    if over.wait(AFTER_S):
        return
    with _bar("") as bar:
        bar.add_task(printable(text), total=None)
        over.wait()


def _bar(counted: str) -> Any:
    """A bar with what is done, how many of it, and since when.

    Args:
        counted: what `completed` counts; empty: nothing.
    """
    from rich import progress as rich  # a fifth of `tenfold plan`, which mostly shows none
    from rich.console import Console

    count = [rich.TextColumn(f"{{task.completed:,}} {counted}", markup=False)] if counted else []
    return rich.Progress(
        rich.SpinnerColumn("line"),
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(20),
        *count,
        rich.TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


class ReadingBar:
    """The bar of one source after the other; see trainers.data.reading_progress.Watcher."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.task: Any = None

    def saw(self, path: str, num_rows: int, seconds: float) -> None:
        """So many rows were read, the last of a file."""
        if seconds < AFTER_S:
            return
        if self.bar is None:
            self.bar = _bar("rows")
            self.task = self.bar.add_task("", total=None)
            self.bar.start()
        text = f"reading and tokenizing {printable(path)}"
        self.bar.update(self.task, description=text, completed=num_rows)

    def done(self) -> None:
        """The source has no more rows, or nobody wants them."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
