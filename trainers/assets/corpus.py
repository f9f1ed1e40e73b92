"""Text that every CPython carries, split once into what the shipped base sees and what it never sees.

Two scripts beside this file read it: `make_tiny_llama.py` pretrains on `seen_files()`,
`make_demo_task.py` cuts the demo's rows from `unseen_files()`. A standard library is this Python's
unless a folder is given.
"""

import ast
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

# Code tables and generated grammars: almost no language in them. The test suite is left out for
# its size (17 of 31 MB) and for its long literal data.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "encodings", "site-packages", "dist-packages", "idle_test", "lib2to3"}
)
UNSEEN_ONE_IN = 4


def own_library() -> Path:
    """The folder of this Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_files(root: Path) -> list[Path]:
    """Source files of a standard library, sorted by name; the language reference
    (`pydoc_data/topics.py`) is one of them."""
    paths = (path for path in root.rglob("*.py") if path.stat().st_size > 0)
    return sorted(path for path in paths if not SKIPPED_FOLDERS & set(path.relative_to(root).parts))


def is_unseen(name: str) -> bool:
    """Whether a module is kept from pretraining: by a checksum of its name, so that the choice is
    the same for every Python version that has the module.

    Args: name: path within the standard library, with slashes.
    """
    return name != "pydoc_data/topics.py" and zlib.crc32(name.encode()) % UNSEEN_ONE_IN == 0


def seen_files(stdlib: Path | None = None) -> list[Path]:
    """Files the base is pretrained on."""
    root = stdlib or own_library()
    return [p for p in library_files(root) if not is_unseen(p.relative_to(root).as_posix())]


def unseen_files(stdlib: Path | None = None) -> list[Path]:
    """Files the base never sees: held-out loss and demo task."""
    root = stdlib or own_library()
    return [p for p in library_files(root) if is_unseen(p.relative_to(root).as_posix())]


def _topics(source: str) -> dict[str, str]:
    """The dict that the one statement of pydoc_data/topics.py gives a name."""
    values = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return ast.literal_eval(values[0])


def texts(paths: list[Path]) -> Iterator[str]:
    """The files' text; the language reference as prose, without the Python dict around it."""
    for path in paths:
        if path.name == "topics.py" and path.parent.name == "pydoc_data":
            yield from _topics(path.read_text(encoding="utf-8")).values()
        else:
            yield path.read_text(encoding="utf-8", errors="strict")
