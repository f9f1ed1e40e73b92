"""What is told while a large file is read, so that minutes are not silent: lines on stderr, or what a watcher makes
of it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

FIRST_AFTER_S, EVERY_S = 5.0, 10.0
ROWS_BETWEEN_LOOKS = 256


class Watcher(Protocol):
    """Shows the reading in the place of lines, as a terminal's bar does."""

    def saw(self, path: str, num_rows: int, seconds: float) -> None:
        """So many rows were read since so long, the last of a file."""
        ...

    def done(self) -> None:
        """Nothing more is read for now."""
        ...


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tells a watcher of what is read meanwhile."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class ReadingProgress:
    """Counts rows, and says so now and then.

    Args:
        clock: seconds.
        say: prints a line.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self.clock, self.say, self.num_rows = clock, say, 0
        self._began = clock()
        self._next = self._began + FIRST_AFTER_S

    def saw(self, path: str) -> None:
        """Counts a row of a file."""
        self.num_rows += 1
        if self.num_rows % ROWS_BETWEEN_LOOKS:
            return
        now = self.clock()
        if (watcher := _watcher.get()) is not None:
            watcher.saw(path, self.num_rows, now - self._began)
        elif now >= self._next:
            self._next = now + EVERY_S
            per_second = self.num_rows / (now - self._began)
            self.say(f"reading {path}: {self.num_rows:,} rows, {per_second:,.0f} a second")

    def done(self) -> None:
        """There are no more rows."""
        if (watcher := _watcher.get()) is not None:
            watcher.done()
