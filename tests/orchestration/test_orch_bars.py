"""Bars of what takes long in this process: on a terminal after a second, nothing on a pipe."""

import contextlib
import io
import os
import pty
import re
import sys
import time

import pytest

from orchestration import bars
from orchestration.bars import ReadingBar, reading, working
from tests.orchestration.sweeps import wait_until
from trainers.data.reading_progress import ReadingProgress, watched
from trainers.data.records import BadRows
from trainers.data.row_reader import RowReader
from trainers.data.sources import resolve_source
from trainers.data.spec import DataSpec


class Terminal:
    """A pseudo-terminal in the place of stderr. To be opened within a test: pytest sets stderr anew for its call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours, theirs = pty.openpty()
        os.set_blocking(self.ours, False)
        self.stream, self.written = os.fdopen(theirs, "w"), bytearray()
        monkeypatch.setattr(sys, "stderr", self.stream)
        monkeypatch.setenv("TERM", "xterm")

    def __call__(self) -> str:
        """What was written there so far, without what steers it."""
        self.stream.flush()
        with contextlib.suppress(BlockingIOError):
            self.written.extend(os.read(self.ours, 1 << 16))
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.written.decode())


@pytest.fixture
def on_terminal(monkeypatch):
    """Puts a pseudo-terminal in the place of stderr when called."""
    opened: list[Terminal] = []

    def begin() -> Terminal:
        opened.append(Terminal(monkeypatch))
        return opened[-1]

    yield begin
    for one in opened:
        one.stream.close()
        os.close(one.ours)


def test_working_shows_a_bar_after_a_while_and_takes_it_away(on_terminal, monkeypatch):
    terminal = on_terminal()
    monkeypatch.setattr(bars, "AFTER_S", 0.0)
    with working("loading [the] base\x1b[2J"):
        wait_until(lambda: "loading [the] base\\x1b[2J" in terminal())
    assert "0:00" in terminal()


def test_working_on_a_pipe_or_soon_over_says_nothing(on_terminal, monkeypatch):
    terminal = on_terminal()
    with working("loading the base"):
        pass
    assert terminal() == ""
    monkeypatch.setattr(bars, "AFTER_S", 0.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with working("loading the base"):
        time.sleep(0.05)
    assert sys.stderr.getvalue() == ""


def test_working_lets_errors_through(on_terminal):
    on_terminal()
    with pytest.raises(ValueError, match="no base"), working("loading the base"):
        raise ValueError("no base")


def test_reading_bar_counts_rows_of_each_file_and_is_gone_when_they_are_read(on_terminal):
    terminal = on_terminal()
    bar = ReadingBar()
    bar.saw("soon.jsonl", 256, 0.2)
    assert bar.bar is None
    bar.saw("big[1].jsonl", 5_120, 2.0)
    wait_until(lambda: "reading and tokenizing big[1].jsonl" in terminal())
    assert "5,120 rows" in terminal()
    bar.done()
    assert bar.bar is None
    bar.done()  # of a source that was soon over


def test_reading_on_a_pipe_keeps_the_lines(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with reading():
        progress = ReadingProgress(clock=lambda: now[0], say=lines.append)
        now[0] = 6.0
        for _ in range(256):
            progress.saw("big.jsonl")
        progress.done()
    assert lines == ["reading big.jsonl: 256 rows, 43 a second"]


class Told:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def saw(self, path: str, num_rows: int, seconds: float) -> None:
        self.seen.append(num_rows)

    def done(self) -> None:
        self.seen.append("done")


def test_row_reader_tells_a_watcher_of_its_rows_and_of_their_end_whoever_stops(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a word"}\n' * 600)
    told = Told()
    reader = RowReader(DataSpec(data=str(path)), BadRows())
    with watched(told):
        assert len(list(reader.rows(resolve_source(str(path))))) == 600
        assert told.seen == [256, 512, "done"]
        rows = reader.rows(resolve_source(str(path)))
        next(rows)
        rows.close()
    assert told.seen[3:] == ["done"]
