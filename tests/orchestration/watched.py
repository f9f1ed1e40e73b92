"""A `tenfold` process that is watched with everything that it starts, and what is asked of it after a signal."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.orchestration.sweeps import ended, rows, start, statuses, told, wait_until

STUBS = "tests.orchestration.stubs"
GONE_S = 10
"""How long processes of a `tenfold` that has ended may take to go: the kernel and Ray's dashboard, seconds."""
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Watched:
    """A `tenfold` process, and every process that was ever seen below it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.below = process, set()

    def look(self) -> list[psutil.Process]:
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self.below |= set(found)
        return found

    def runs(self, name: str) -> bool:
        """Whether a process below has a part of its command line that ends so."""
        return any(_part_ends(child, name) for child in self.look())

    def wait_for(self, condition: Callable[[], object]) -> None:
        wait_until(lambda: (self.look(), condition())[1], self.process)

    def interrupted(self, number: int, *, group: bool = False) -> subprocess.CompletedProcess[str]:
        """Sends a signal, and asserts how the process ends and that it leaves no other."""
        self.look()
        (os.killpg if group else os.kill)(self.process.pid, number)
        done = ended(self.process)
        assert done.returncode == CODES[signal.Signals(number)], told(done)
        self.assert_gone()
        return done

    def assert_gone(self) -> None:
        _, alive = psutil.wait_procs(self.below, timeout=GONE_S)
        assert not alive, alive


def _part_ends(process: psutil.Process, name: str) -> bool:
    try:
        return any(part.endswith(name) for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def one_line_with(text: str, done: subprocess.CompletedProcess[str]) -> bool:
    return sum(text in line for line in (done.stdout + done.stderr).splitlines()) == 1


def assert_goes_on(folder: Path, done: subprocess.CompletedProcess[str], examples: int) -> None:
    """What was said at the end is true: `tenfold resume` finishes every trial."""
    assert one_line_with("`tenfold resume runs/run` goes on", done), told(done)
    after = ended(start(folder, "resume", "runs/run", module=STUBS))
    assert after.returncode == 0, told(after)
    assert {status["status"] for status in statuses(folder / "runs" / "run").values()} == {
        "finished"
    }
    for trial in (folder / "runs" / "run" / "trials").iterdir():
        assert [row["examples"] for row in rows(trial)] == list(range(0, examples + 1, 32))
