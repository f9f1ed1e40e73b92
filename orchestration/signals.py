"""Ctrl-C, SIGTERM and SIGHUP to the `tenfold` command: the first ends it in order, the second at once.

In order: a KeyboardInterrupt, so that whatever was begun is ended on the way out (Ray, its workers, locks).
While Ray Tune runs its own end of a run takes the place of that: its trials stay as they are. What of it hangs
is broken off after ENDING_S by another KeyboardInterrupt, and ended at once after twice that. Either way
no process that was started here is left: Ray's agents would live on for a minute or two without their raylet.

Python handles a signal when the main thread comes back from C, where Ray can wait for ever, or for the minute
after which it ends the process: for a server of its own that the same signal ended (Slurm and systemd tell all
processes of a job). So a thread keeps the time, and gives an end in order up where Ray's servers have gone.
"""

import os
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from orchestration.exit_codes import INTERRUPTED, SIGNALLED
from trainers.terminal import takes_escapes

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STANDARD_FILES = (0, 1, 2)
CURSOR = "\x1b[?25h"
"""Shows a terminal's cursor again, which a live table hides."""
END_BY_THEMSELVES = ("wandb-core", "tracker_process.py")
"""They send and write what they were given, and end within tracker_process.CLOSE_S of their driver."""
SERVERS = ("gcs_server", "raylet")
LOST_S = 5.0
"""How long a command whose Ray has gone may take to find out by itself."""
UNHEARD_S = 20.0
"""How long the main thread may be in C before a signal is taken to be unheard."""
ENDING_S = 60.0
"""How long an end in order may take; 10 to 25 s in the middle of a rung on a busy laptop, with the report."""
LOOK_S = 0.5
GONE_S = 10.0
"""How long a killed process may take to go."""


class _State:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.received: int | None = None
        self.in_tune = self.leaving_ray = self.broken_off = False
        self.how_to_go_on: Callable[[], str] = str
        self.below: list[Any] = []
        """What this process had started when a signal came."""


_state = _State()


@contextmanager
def handling() -> Iterator[None]:
    """Handles the signals in this process; what handled them before does so again afterwards, unless one
    came: then a second one still ends the rest of the way out.

    Elsewhere than in the main thread, where Python handles signals, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in HANDLED}
    _state.reset()
    with _watched():
        _install()
        try:
            yield
        finally:
            if _state.received is None:
                for number, handler in before.items():
                    signal.signal(number, handler)
            else:
                _end_what_is_below()


@contextmanager
def kept(*, leaving: bool = False) -> Iterator[None]:
    """Around ray.init, which makes SIGTERM a sys.exit(15) of its own, and around ray.shutdown, which gives it
    back to the kernel: for the second in which Ray's processes end SIGTERM is what it is without a handler.

    Args:
        leaving: it is ray.shutdown.
    """
    is_ours = signal.getsignal(signal.SIGTERM) is _handle
    _state.leaving_ray = leaving and not _has_lost_ray()
    try:
        yield
    except SystemExit as end:
        if not is_of_ray(end):
            raise
        raise KeyboardInterrupt from None
    finally:
        if is_ours:
            _install()


def is_of_ray(end: SystemExit) -> bool:
    """Whether it is what Ray makes of SIGTERM, which then counts as received. Where the signal came while ray.init was
    in C for long, Python handles it on the way out of there, where `kept` no longer sees it."""
    if end.code == signal.SIGTERM and _state.received is None:
        _receive(signal.SIGTERM)
    return end.code == signal.SIGTERM


@contextmanager
def ended_by_tune() -> Iterator[None]:
    """Around a run of Ray Tune, which ends it in order when SIGUSR1 comes.

    Raises:
        KeyboardInterrupt: a signal came before: nothing more is to be run.
    """
    if signal.getsignal(signal.SIGINT) is not _handle:  # not under `tenfold`: Tune has its own way
        yield
        return
    if _state.received is not None:
        raise KeyboardInterrupt
    # Tune's own handler would take the first Ctrl-C from ours, which then would not know the second.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    before = signal.signal(signal.SIGUSR1, _interrupt)  # until Tune has its own there
    _state.in_tune = True
    try:
        yield
    finally:
        _state.in_tune = False
        signal.signal(signal.SIGUSR1, before)


@contextmanager
def goes_on_by(how: Callable[[], str]) -> Iterator[None]:
    """Gives the KeyboardInterrupt of what is inside the words that tell how to go on."""
    _state.how_to_go_on = how
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(how()) from stop


def how_to_go_on() -> str:
    """What `goes_on_by` was told; empty where nothing goes on."""
    return _state.how_to_go_on()


def received() -> bool:
    """Whether a signal has asked this process to end."""
    return _state.received is not None


def is_broken_off() -> bool:
    """Whether threads were left behind that may still ask Ray for something: Ray's core ends the process with 1
    where one does after ray.shutdown."""
    return _state.broken_off


def exit_code(code: int) -> int:
    """The exit code of an interrupted command, by the signal that came: 128 + its number."""
    if code != INTERRUPTED:
        return code
    _forget_interrupts()
    return SIGNALLED + (_state.received or signal.SIGINT)


def _forget_interrupts() -> None:
    """CPython remembers a KeyboardInterrupt that left code run from text (what makes a dataclass while a module is
    imported), though it was caught, and under `python -m` then dies of SIGINT whatever the exit code says. It
    forgets when other text is run."""
    import ctypes

    ctypes.pythonapi.PyRun_SimpleString(b"")


def _install() -> None:
    for number in HANDLED:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _handle)


def _handle(number: int, _: FrameType | None) -> None:
    if _state.received is not None:
        return  # the second: it is the watching thread's
    _receive(number)
    if _state.in_tune:
        signal.raise_signal(signal.SIGUSR1)
    else:
        _interrupt()


def _receive(number: int) -> None:
    _leave_lost_terminal()
    _state.received = number
    _state.below += _below()


def _leave_lost_terminal() -> None:
    """A terminal that has gone (SIGHUP) takes nothing more: writing to it is an error, and none of ours."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for file in STANDARD_FILES:
        try:
            is_device = stat.S_ISCHR(os.fstat(file).st_mode)
        except OSError:  # it is closed
            continue
        if is_device and not os.isatty(file):
            os.dup2(nowhere, file)
    os.close(nowhere)


@contextmanager
def _watched() -> Iterator[None]:
    """Tells a thread of each signal as it comes, until the command has ended."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGALRM, _interrupt)  # the thread's word to the main one
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


def _watch(reading: int) -> None:
    """Ends the process where a signal asked for it and it does not end."""
    first = _next_signal(reading, None)
    if first:
        _leave_lost_terminal()
        _say("ending (a second signal ends at once)")
        _state.below += _below()
    if first and _goes_on(reading, UNHEARD_S, first):
        if _state.received is None:
            _end_at_once(first)
        if _goes_on(reading, ENDING_S - UNHEARD_S, first):
            _say(f"not ended within {ENDING_S:g} s: what hangs is broken off")
            _state.broken_off = True
            signal.pthread_kill(_main_thread(), signal.SIGALRM)
            if _goes_on(reading, ENDING_S, first):
                _end_at_once(first)
    os.close(reading)


def _goes_on(reading: int, seconds: float, first: int) -> bool:
    """Whether the command takes so long; a second signal ends it, and that its Ray has gone."""
    until, lost_s = time.monotonic() + seconds, 0.0
    while (left := until - time.monotonic()) > 0:
        number = _next_signal(reading, min(LOOK_S, left))
        if number == 0:
            return False
        lost_s = lost_s + LOOK_S if not _state.leaving_ray and _has_lost_ray() else 0.0
        if number or lost_s >= LOST_S:
            _end_at_once(number or first)
    return True


def _has_lost_ray() -> bool:
    """Whether a server of the Ray that was started here has ended since the signal came."""
    import psutil

    for process in list(_state.below):
        try:
            if process.name() in SERVERS and process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            continue
    return False


def _next_signal(reading: int, seconds: float | None) -> int | None:
    """Its number, 0 when the command has ended, None when the time is up."""
    until = None if seconds is None else time.monotonic() + seconds
    while select.select([reading], [], [], until and max(0.0, until - time.monotonic()))[0]:
        told = os.read(reading, 1)
        if not told or told[0] in HANDLED:
            return told[0] if told else 0
    return None


def _main_thread() -> int:
    ident = threading.main_thread().ident
    assert ident is not None
    return ident


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _end_at_once(number: int) -> None:
    """No clean-up that may hang: the kernel lets our locks go."""
    _kill_what_is_below()
    cursor, how = CURSOR if sys.stderr.isatty() and takes_escapes() else "", how_to_go_on()
    _say(f"{cursor}ended at once, without cleaning up{f'; {how}' if how else ''}")
    os._exit(SIGNALLED + number)


def _below() -> list[Any]:
    import psutil  # 20 ms that `tenfold plan` has no use for

    return psutil.Process().children(recursive=True)


def _kill_what_is_below() -> list[Any]:
    """Kills what was started here, also what has lost its parent since the signal came."""
    import psutil

    left = []
    for process in {*_state.below, *_below()}:
        try:
            if not any(part.endswith(END_BY_THEMSELVES) for part in process.cmdline()):
                process.kill()
                left.append(process)
        except psutil.NoSuchProcess:
            continue
    return left


def _end_what_is_below() -> None:
    import psutil

    psutil.wait_procs(_kill_what_is_below(), timeout=GONE_S)


def _say(text: str) -> None:
    os.write(2, f"tenfold: {text}\n".encode())  # print fails where the signal came inside a print
