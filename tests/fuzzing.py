"""One `tenfold` command of a fuzz test, run in this process, and what was wrong with how it ended.

Right is: exit 0 and a silent stderr; or exit 2 and one printable line for each problem; or, where Ray or the
processes of a study would now begin, `Started`. Never a traceback, a warning, a hang, or a file left behind.
"""

import faulthandler
import io
import os
import re
import resource
import shutil
import signal
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "trainers" / "assets" / "tiny-llama"
LIMIT_S = 120
"""A case takes some 50 ms: who is not done by then on any machine hangs."""
LIMIT_BYTES = 4 << 30
"""What a case may take beyond what the process has: a case that needs more would end a user's machine."""
LONGEST_LINE = 2000
CACHE, MAX_CACHED = "cache", 60
"""Its name, and its most entries."""
CONTINUED = ("tenfold: ", "sweep.yaml: ")
"""How a line of stderr begins: every problem of a config is a line of its own, with the file's name."""
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}|<class ")


class Started(Exception):
    """The command would have begun to use the machine: what can be checked before is checked."""


class Hung(BaseException):
    """The command did not end."""


@dataclass(frozen=True)
class Ending:
    """How a command ended.

    Attributes:
        code: the exit code; None where it would have started, or was not ended by itself.
        fault: what was wrong, in one line; None: nothing.
    """

    code: int | None
    fault: str | None
    out: str = ""
    err: str = ""


def quick_settings(num_examples: int) -> settings:
    """Examples of one test: `num_examples` and always the same, or TENFOLD_FUZZ_EXAMPLES new ones."""
    asked = os.environ.get("TENFOLD_FUZZ_EXAMPLES")
    return settings(
        deadline=None,
        derandomize=asked is None,
        database=None,
        max_examples=int(asked or num_examples),
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )


@contextmanager
def fuzz_folder(parent: Path) -> Iterator[Path]:
    """The current folder of a user without GPU and network, deep enough below `parent` for `../..`."""
    work = parent / "home" / "projects" / "work"
    work.mkdir(parents=True)
    home, before = str(parent / "home"), Path.cwd()
    values = {"HOME": home, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, values))
        for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            value = True if name == "HF_HUB_OFFLINE" else str(parent / "hub")
            stack.enter_context(mock.patch(f"huggingface_hub.constants.{name}", value))
        stack.enter_context(mock.patch("datasets.config.HF_HUB_OFFLINE", True))
        os.chdir(work)
        try:
            yield work
        finally:
            os.chdir(before)


def ended(folder: Path, argv: Sequence[str]) -> Ending:
    """Runs a command in `folder`, a `fuzz_folder`, and takes away what it left there.

    Only a study that would have started may have begun its run.
    """
    top = folder.parents[1]
    before = _files(top)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for kind in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        ending = _ran(argv, top.parent / CACHE)
    fault = ending.fault or _fault_in(ending)
    left = sorted(_files(top) - before)
    is_begun = argv[0] == "study" and (ending.code is None or _is_empty(top, left))
    if not fault and left and not is_begun:
        fault = f"left behind: {left[:5]}"
    unfinished = sorted(str(p) for p in top.parent.rglob("*.tmp"))
    if not fault and unfinished:
        fault = f"half-written: {unfinished[:5]}"
    if not fault and caught:
        fault = f"warned: {caught[0].category.__name__}: {caught[0].message}"
    _remove(top, left)
    _empty_cache(top.parent / CACHE)
    return Ending(ending.code, fault, ending.out, ending.err)


def _is_empty(top: Path, left: Sequence[str]) -> bool:
    """Whether what is left are folders for runs, in which the study's own was taken away again."""
    return all((top / name).is_dir() for name in left)


def _files(top: Path) -> set[str]:
    return {path.relative_to(top).as_posix() for path in top.rglob("*")}


def _remove(top: Path, names: list[str]) -> None:
    for name in names:
        path = top / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _empty_cache(cache: Path) -> None:
    """What many cases put there would have to be looked through after each."""
    if len(list(cache.glob("*/*"))) > MAX_CACHED:
        shutil.rmtree(cache)


def _ran(argv: Sequence[str], cache: Path) -> Ending:
    from orchestration.cli import main

    # As a terminal has them: half a character cannot be written to stdout.
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)
    err = io.TextIOWrapper(
        io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True
    )
    code, fault = None, None
    with _never_started(cache), redirect_stdout(out), redirect_stderr(err), _watched():
        try:
            code = main(list(argv))
        except Started:
            pass
        except (Exception, SystemExit, Hung) as error:
            fault = f"raised {_place(error)}"
    texts = [stream.buffer.getvalue().decode("utf-8") for stream in (out, err)]  # type: ignore[attr-defined]
    return Ending(code, fault, *texts)


def _place(error: BaseException) -> str:
    """Kind, text, and the last lines of ours that the error came through."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(f"{ROOT}/")
    ]
    ours = [f for f in frames if "/.venv/" not in f.filename and "/tests/" not in f.filename]
    places = [f"{Path(f.filename).relative_to(ROOT)}:{f.lineno}" for f in ours[-3:]]
    return f"{type(error).__name__}: {str(error)[:200]} ({' > '.join(places)})"


def _fault_in(ending: Ending) -> str | None:
    """What is wrong with what a command printed, for its exit code."""
    if ending.code not in (None, 0, 2):
        return f"exit {ending.code}"
    if ending.code == 2 and not ending.err.strip():
        return "exit 2 without a word"
    if ending.code != 2 and ending.err:
        return f"exit {ending.code} and on stderr: {ending.err[:300]!r}"
    for line in ending.err.removesuffix("\n").split("\n") if ending.err else ():
        if not line.startswith(CONTINUED) or not line.removeprefix("tenfold: ").strip():
            return f"a line of stderr that is no problem's first: {line[:300]!r}"
        if len(line) > LONGEST_LINE:
            return f"a line of {len(line)} characters: {line[:200]!r}"
        if ADDRESS.search(line):
            return f"a line that names objects of the program: {line[:300]!r}"
    for name, text in (("stdout", ending.out), ("stderr", ending.err)):
        odd = next((c for c in text if c not in "\n\t" and unicodedata.category(c) == "Cc"), None)
        if odd is not None:
            at = text.index(odd)
            return f"{name} holds a control character: {text[max(0, at - 80) : at + 20]!r}"
    return None


@contextmanager
def _never_started(cache: Path) -> Iterator[None]:
    """What would begin raises `Started`; what a command sets in the environment is taken back."""

    def start(*_: Any, **__: Any) -> None:
        raise Started

    names = ("orchestration.sweep.start_ray", "orchestration.studies.compute_run.run_compute")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"TENFOLD_CACHE": str(cache)}))
        for name in names:
            stack.enter_context(mock.patch(name, start))
        yield


@contextmanager
def _watched() -> Iterator[None]:
    """Ends a case that hangs, or that takes all memory.

    Raises:
        Hung: it was in Python; what hangs elsewhere ends the process, with its stack.
    """

    def stop(*_: Any) -> None:
        raise Hung(f"not done after {LIMIT_S} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, stop)
    faulthandler.dump_traceback_later(3 * LIMIT_S, exit=True, file=sys.__stderr__)
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, hard))
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, handler)


# Parts of cases.


def rarely(one_in: int) -> st.SearchStrategy[bool]:
    """True once in so many draws: hypothesis likes a list's first values, so that integers would not do."""
    return st.sampled_from((False,) * (one_in - 1) + (True,))


PIECES = (
    b"\0", b"\xff", b"\xc3", b"\n", b"\r", b"\t", b" ", b":", b": ", b"- ", b"[", b"]", b"{", b"}", b",",
    b"&a ", b"*a",
    b"!!", b"!!python/name:os.system ", b"#", b"'", b'"', b"\\", b"|", b">", b"?", b"%", b"@", b"`", b"~",
    b"<<: ", b"---\n",
    b"...", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\x1b[2J", b"0", b"-", b"e", b".", b"e400",
    b"99999999999999999999", b".nan", b"\n\n",
)  # fmt: skip


@st.composite
def mutated_bytes(draw: st.DrawFn, text: bytes, pieces: tuple[bytes, ...] = PIECES) -> bytes:
    """Bytes with one to six of them changed, left out, put in, or with an end or a part cut away."""
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3, 6)))):
        at = draw(st.integers(0, max(0, len(text) - 1)))
        match draw(st.integers(0, 6)):
            case 0:
                text = text[:at] + bytes([draw(st.integers(0, 255))]) + text[at + 1 :]
            case 1:
                text = text[:at] + text[at + draw(st.integers(1, 8)) :]
            case 2 | 3:
                text = text[:at] + draw(st.sampled_from(pieces)) + text[at:]
            case 4:
                text = text[:at]
            case 5:
                text = text[:at] + text[at : at + draw(st.integers(1, 200))] * 2 + text[at:]
            case _:
                text = (
                    text[:at] + bytes([text[at] ^ 1 << draw(st.integers(0, 7))]) + text[at + 1 :]
                    if text
                    else b""
                )
    return text
