"""SIGINT and SIGTERM to `tenfold` at every moment of its life: exit 130 or 143, one line that says how to go on,
no process left, and a run that goes on to its end."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.orchestration.sweeps import (
    ROOT,
    SHORT,
    TIMEOUT_S,
    ended,
    start,
    told,
    write_config,
)
from tests.orchestration.watched import (
    CODES,
    GONE_S,
    Watched,
    one_line_with,
)

SWEEP = SHORT | {"cpus_per_worker": 2}
"""One group: a third less of what takes long here, starting workers."""


# ---- without Ray: while nothing has been started


@pytest.mark.parametrize("number", CODES)
def test_signal_while_the_data_is_read_leaves_nothing_and_the_command_begins_again(
    tmp_path, number
):
    run = write_config(tmp_path, data="rows.jsonl", capacity_policy="advisory", **SWEEP)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(_row(index) for index in range(40_000)))  # seconds of reading
    watched = Watched(start(tmp_path, "sweep", "sweep.yaml"))
    watched.wait_for(lambda: list((tmp_path / "cache" / "sets").glob(".*.tmp")))
    done = watched.interrupted(number)
    assert one_line_with("tenfold: interrupted; nothing was trained: the same command", done)
    assert "Traceback" not in done.stderr
    assert not run.exists()
    assert list((tmp_path / "cache" / "sets").iterdir()) == []
    data.write_text("".join(_row(index) for index in range(100)))
    again = ended(start(tmp_path, "plan", "sweep.yaml"))
    assert again.returncode == 0, told(again)


def _row(index: int) -> str:
    return json.dumps({"prompt": f"{index} plus one?", "completion": f" It is {index + 1}."}) + "\n"


HANGING = """
import signal, subprocess, sys, time
from orchestration import signals
with signals.handling():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    try:
        print(child.pid, flush=True)
        time.sleep(1000)
    finally:
        print("cleaning up", flush=True)
        time.sleep(1000)
"""
"""A command whose clean-up hangs."""


@pytest.mark.parametrize("first", CODES)
@pytest.mark.parametrize("second", CODES)
def test_second_signal_ends_a_clean_up_that_hangs_with_all_its_processes(first, second):
    process = _python(HANGING)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    process.send_signal(first)
    assert process.stdout.readline() == "cleaning up\n"
    process.send_signal(second)
    done = ended(process)
    assert done.returncode == CODES[second], told(done)
    assert done.stderr.splitlines() == [
        "tenfold: ending (a second signal ends at once)",
        "tenfold: ended at once, without cleaning up",
    ]
    psutil.wait_procs([child], timeout=GONE_S)
    assert not child.is_running()


ENDS_WITH_A_MARK = """
import pathlib, sys, time
from orchestration import signals
with signals.handling():
    try:
        print("begun", flush=True)
        time.sleep(1000)
    except KeyboardInterrupt:
        print("a report", flush=True)
        pathlib.Path(sys.argv[1]).write_text("ended in order")
        sys.exit(signals.exit_code(130))
"""


def test_terminal_that_goes_ends_a_command_in_order(tmp_path):
    mark = tmp_path / "mark"
    master, slave = os.openpty()
    command = [sys.executable, "-c", ENDS_WITH_A_MARK, str(mark)]
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: _take_terminal(slave),
        pass_fds=[slave],
    )
    os.close(slave)
    said = b""
    while not said.endswith(b"\n"):
        said += os.read(master, 100)
    os.close(master)  # and the kernel sends SIGHUP to whoever it was the terminal of
    assert process.wait(TIMEOUT_S) == 128 + signal.SIGHUP
    assert mark.read_text() == "ended in order"


def _take_terminal(slave: int) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may be under nohup
    os.login_tty(os.dup(slave))


def test_command_that_outlives_its_terminal_by_nohup_goes_on(tmp_path):
    mark = tmp_path / "mark"
    process = _python(ENDS_WITH_A_MARK, str(mark), before=("nohup",))
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert ended(process).returncode == 143
    assert mark.read_text() == "ended in order"


BREAKS = """
import os, signal, sys
from orchestration import cli, signals

def broken(args):
    with signals.goes_on_by(lambda: "`tenfold resume` goes on"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise {error}

cli._check = broken
sys.exit(cli.main(["check", "sweep.yaml"]))
"""


@pytest.mark.parametrize("error", ["RuntimeError", "ValueError", "OSError", "SystemExit(15)"])
def test_command_that_breaks_by_what_a_signal_ended_was_interrupted(error):
    done = ended(_python(BREAKS.format(error=error)))
    assert done.returncode == 143, told(done)
    assert done.stderr.splitlines() == [
        "tenfold: ending (a second signal ends at once)",
        "tenfold: interrupted; `tenfold resume` goes on",
    ]


CAUGHT = """
import sys
from orchestration import exit_codes, signals
try:
    exec("raise KeyboardInterrupt")  # as in the midst of an import that makes a dataclass
except KeyboardInterrupt:
    sys.exit(signals.exit_code(exit_codes.INTERRUPTED))
"""
"""A command that was interrupted in code run from text, which CPython remembers."""


def test_interrupt_that_left_code_run_from_text_ends_in_its_exit_code(tmp_path):
    (tmp_path / "caught.py").write_text(CAUGHT)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    command = [sys.executable, "-m", "caught"]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode == 130


STUCK = """
import ctypes, sys, threading
from orchestration import signals
signals.UNHEARD_S = {unheard_s}
sys.setswitchinterval(1000)  # another thread runs when this one is in C, and not before
with signals.handling():
    libc, mutex, gate = ctypes.CDLL(None), ctypes.create_string_buffer(64), threading.Lock()
    gate.acquire()
    threading.Thread(target=lambda: (gate.acquire(), print("stuck", flush=True))).start()
    libc.pthread_mutex_lock(mutex)
    gate.release()
    libc.pthread_mutex_lock(mutex)
"""
"""A command whose main thread never comes back from C, so that Python never handles a signal."""


@pytest.mark.parametrize(("unheard_s", "num_signals"), [(1, 1), (1000, 2)])
def test_signal_ends_a_command_that_never_comes_back_from_c(unheard_s, num_signals):
    process = _python(STUCK.format(unheard_s=unheard_s))
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    assert process.stderr is not None
    process.send_signal(signal.SIGTERM)
    assert "a second signal ends at once" in process.stderr.readline()
    if num_signals == 2:
        process.send_signal(signal.SIGTERM)
    done = ended(process)
    assert done.returncode == 143, told(done)
    assert done.stderr == "tenfold: ended at once, without cleaning up\n"


BROKEN_OFF = """
import time
from orchestration import signals
signals.UNHEARD_S, signals.ENDING_S = 1, 2
with signals.handling():
    try:
        try:
            print("begun", flush=True)
            time.sleep(1000)
        finally:
            time.sleep(1000)
    except KeyboardInterrupt:
        print("broken off")
"""


def test_clean_up_that_hangs_is_broken_off_when_its_time_is_up():
    process = _python(BROKEN_OFF)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert (done.returncode, done.stdout) == (0, "broken off\n"), told(done)
    assert done.stderr.splitlines()[1:] == [
        "tenfold: not ended within 2 s: what hangs is broken off"
    ]


ENDED = """
import contextlib, signal, subprocess, sys
from orchestration import signals
with signals.handling():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    print(child.pid, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    try:
        with signals.ended_by_tune():
            print("Tune ran")
    except KeyboardInterrupt:
        print("nothing more was begun")
"""


def test_signal_that_came_before_a_run_of_tune_keeps_it_from_beginning():
    process = _python(ENDED)
    done = ended(process)
    child, said = done.stdout.splitlines()
    assert said == "nothing more was begun"
    assert not psutil.pid_exists(int(child))


def test_signals_are_handled_as_before_once_a_command_has_ended():
    code = (
        "import signal\nfrom orchestration import signals\n"
        "before = [signal.getsignal(n) for n in signals.HANDLED]\n"
        "with signals.handling():\n"
        "    assert [signal.getsignal(n) for n in signals.HANDLED] != before\n"
        "assert [signal.getsignal(n) for n in signals.HANDLED] == before\n"
    )
    assert ended(_python(code)).returncode == 0


def _python(code: str, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
