"""SIGINT and SIGTERM to `tenfold` at every moment of its life: exit 130 or 143, one line that says how to go on,
no process left, and a run that goes on to its end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.orchestration.sweeps import (
    ROOT,
    SHORT,
    TIMEOUT_S,
    ended,
    processes_of,
    rows,
    start,
    statuses,
    told,
    write_config,
)
from tests.orchestration.watched import (
    CODES,
    GONE_S,
    STUBS,
    Watched,
    assert_goes_on,
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


# ---- with Ray


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "process"),
    [(signal.SIGINT, "gcs_server"), (signal.SIGTERM, "dashboard/agent.py")],
    ids=["SIGINT-gcs", "SIGTERM-agents"],  # agents live on for a minute or two without their raylet
)
def test_signal_while_ray_starts_ends_what_it_had_started(tmp_path, number, process):
    run = write_config(tmp_path, **SWEEP)
    watched = Watched(start(tmp_path, "sweep", "sweep.yaml", own_session=True))
    watched.wait_for(lambda: watched.runs(process))
    done = watched.interrupted(number, group=number == signal.SIGINT)  # as a terminal sends it
    assert one_line_with("tenfold: interrupted; nothing was trained: the same command", done)
    assert not run.exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("process", ["gcs_server", "dashboard/agent.py"])
def test_sigterm_to_every_process_while_ray_starts_leaves_none(tmp_path, process):
    # As Slurm and systemd send it. Ray may wait for ever for a server of its own that has just ended.
    run = write_config(tmp_path, **SWEEP)
    watched = Watched(start(tmp_path, "sweep", "sweep.yaml", own_session=True))
    watched.wait_for(lambda: watched.runs(process))
    done = watched.interrupted(signal.SIGTERM, group=True)
    assert "Traceback" not in done.stderr
    assert not run.exists()


LONG = SWEEP | {"examples": 640}
"""Trials that no signal's end outlasts."""


def _driven(folder: Path, *command: str, **variables: str) -> Watched:
    """A `tenfold` with stub workers, as a terminal starts it."""
    paced = {"TENFOLD_STUB_PACE_S": "0.5"} | variables
    return Watched(start(folder, *command, module=STUBS, own_session=True, **paced))


def _in_a_rung(folder: Path, *command: str, **variables: str) -> Watched:
    """A driver whose workers have just told more evaluations of a run."""
    run = folder / "runs" / "run"
    before = _num_rows(run)
    watched = _driven(folder, *command, **variables)
    watched.wait_for(lambda: _num_rows(run) >= before + 4)
    return watched


def _writing_its_report(folder: Path) -> Watched:
    held = folder / "report-held"
    held.touch()
    watched = _driven(
        folder, "resume", "runs/run", TENFOLD_STUB_PACE_S="0", TENFOLD_STUB_REPORT_HELD=str(held)
    )
    watched.wait_for(lambda: list(folder.glob("report-held.*")))
    return watched


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.faults
def test_c15_run_that_signals_end_again_and_again_goes_on_to_its_end(tmp_path):
    run, held = write_config(tmp_path, **LONG), tmp_path / "held"
    held.touch()
    watched = _driven(tmp_path, "sweep", "sweep.yaml", TENFOLD_STUB_HELD=str(held))
    watched.wait_for(lambda: list(tmp_path.glob("held.*")))  # its workers load
    watched.interrupted(signal.SIGTERM)
    assert statuses(run) == {}
    _interrupt_twice(_in_a_rung(tmp_path, "resume", "runs/run"))
    before = _num_rows(run)
    # Field case C15: Ctrl-C to a stub trial with a DataLoader of 2 workers.
    watched = _in_a_rung(tmp_path, "resume", "runs/run", TENFOLD_STUB_LOADERS="2")
    loaders = [p for p in watched.look() if p.name() == "pt_data_worker"]
    assert len(loaders) >= 2, [p.name() for p in watched.below]
    done = watched.interrupted(signal.SIGINT, group=True)
    assert not processes_of(tmp_path)
    assert one_line_with("`tenfold resume runs/run` goes on", done)
    assert (run / "report.html").is_file()  # of what there is
    assert _num_rows(run) >= before + 4
    watched = _in_a_rung(tmp_path, "resume", "runs/run")
    done = watched.interrupted(signal.SIGTERM, group=True)  # as Slurm and systemd send it
    assert "failed" not in {status["status"] for status in statuses(run).values()}, told(done)
    done = _writing_its_report(tmp_path).interrupted(signal.SIGINT, group=True)
    assert_goes_on(tmp_path, done, LONG["examples"])


def _interrupt_twice(watched: Watched) -> None:
    """A second Ctrl-C ends at once."""
    driver = watched.process
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.stderr is not None
    assert "a second signal ends at once" in driver.stderr.readline()
    watched.look()
    os.killpg(driver.pid, signal.SIGINT)
    done = ended(driver)
    assert done.returncode == 130, told(done)
    words = "ended at once, without cleaning up; `tenfold resume runs/run` goes on"
    assert done.stderr == f"tenfold: {words}\n"
    watched.assert_gone()


@pytest.mark.slow
@pytest.mark.faults
def test_sigterm_to_a_study_without_ray_ends_the_processes_that_measure(tmp_path):
    watched = Watched(start(tmp_path, "study", "compute", "--preset", "smoke", "--name", "run"))
    watched.wait_for(lambda: watched.runs("trainers.step_cost"))
    done = watched.interrupted(signal.SIGTERM)
    assert one_line_with(
        "`tenfold study compute --preset smoke --name run` goes on with it", done
    ), told(done)


def _num_rows(run: Path) -> int:
    return sum(len(rows(trial)) for trial in run.glob("trials/*"))
