"""Ctrl-C and SIGTERM to the `tenfold` command: the first ends it in order, the second at once.

In order: a KeyboardInterrupt, so that whatever was begun is ended on the way out (Ray, its workers, locks).
While Ray Tune runs its own end of a run takes the place of that: its trials stay as they are. What of it hangs
is broken off after ENDING_S by another KeyboardInterrupt, and ended at once after twice that. Either way
no process that was started here is left: Ray's agents would live on for a minute or two without their raylet.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from orchestration.exit_codes import INTERRUPTED, SIGNALLED

HANDLED = (signal.SIGINT, signal.SIGTERM)
CURSOR = "\x1b[?25h"
"""Shows a terminal's cursor again, which a live table hides."""
END_BY_THEMSELVES = ("wandb-core", "tracker_process.py")
"""They send and write what they were given, and end within tracker_process.CLOSE_S of their driver."""
ENDING_S = 60.0
"""How long an end in order may take; 10 to 25 s in the middle of a rung on a busy laptop, with the report."""
GONE_S = 10.0
"""How long a killed process may take to go."""


class _State:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.received: int | None = None
        self.in_tune = self.hurried = False
        self.below: list[Any] = []
        """What this process had started when a signal came."""


_state = _State()


@contextmanager
def handling() -> Iterator[None]:
    """Handles both signals in this process; what handled them before does so again afterwards, unless one
    came: then a second one still ends the rest of the way out.

    Elsewhere than in the main thread, where Python handles signals, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in HANDLED}
    _state.reset()
    _install()
    try:
        yield
    finally:
        if _state.received is None:
            for number, handler in before.items():
                signal.signal(number, handler)
        else:
            _end_what_is_below()
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def kept() -> Iterator[None]:
    """Around ray.init, which makes SIGTERM a sys.exit(15) of its own, and around ray.shutdown, which gives it
    back to the kernel: for the second in which Ray's processes end SIGTERM is what it is without a handler."""
    is_ours = signal.getsignal(signal.SIGTERM) is _handle
    try:
        yield
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        _receive(signal.SIGTERM)
        raise KeyboardInterrupt from None
    finally:
        if is_ours:
            _install()


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
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(how()) from stop


def received() -> bool:
    """Whether a signal has asked this process to end."""
    return _state.received is not None


def exit_code(code: int) -> int:
    """The exit code of an interrupted command, by the signal that came: 128 + its number."""
    return SIGNALLED + (_state.received or signal.SIGINT) if code == INTERRUPTED else code


def _install() -> None:
    for number in HANDLED:
        signal.signal(number, _handle)


def _handle(number: int, _: FrameType | None) -> None:
    if _state.received is not None:
        _end_at_once(number)
    _receive(number)
    if _state.in_tune:
        signal.raise_signal(signal.SIGUSR1)
    else:
        _interrupt()


def _receive(number: int) -> None:
    _state.received = number
    _say("ending (a second signal ends at once)")
    _state.below = _below()
    signal.signal(signal.SIGALRM, _hurry)
    signal.setitimer(signal.ITIMER_REAL, ENDING_S, ENDING_S)


def _hurry(*_: object) -> None:
    assert _state.received is not None
    if _state.hurried:
        _end_at_once(_state.received)
    _state.hurried = True
    _say(f"not ended within {ENDING_S:g} s: what hangs is broken off")
    _interrupt()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _end_at_once(number: int) -> None:
    """No clean-up that may hang: the kernel lets our locks go."""
    _kill_what_is_below()
    _say(f"{CURSOR if sys.stderr.isatty() else ''}ended at once, without cleaning up")
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
