"""Lines on stderr while a large file is read, so that minutes are not silent."""

import sys
import time
from collections.abc import Callable

FIRST_AFTER_S, EVERY_S = 5.0, 10.0
ROWS_BETWEEN_LOOKS = 256


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
        if now >= self._next:
            self._next = now + EVERY_S
            per_second = self.num_rows / (now - self._began)
            self.say(f"reading {path}: {self.num_rows:,} rows, {per_second:,.0f} a second")
