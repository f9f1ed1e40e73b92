"""Whether what lies on disk is what was written there: checksums inside state files, and beside weights.

state files     a JSON object whose last key is the SHA-256 of the text without it
rows            JSON lines whose last key is the CRC-32 of the line without it
folders         checksums.json: {"files": {file: {"bytes", "sha256"}}}, itself a state file

Imports neither torch nor ray.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"
SEAL, END = '\n "sha256": "', '"\n}\n'
ROW_SEAL, ROW_END = ', "crc": "', '"}'


class GateError(ValueError):
    """What was saved is not what was trained, or what is loaded not what was saved. It ends one trial; the
    message is its reason."""


class DamagedError(GateError):
    """A file is not what was written. The message names it and says how that is known."""


def sealed(value: dict[str, Any]) -> str:
    """The text of a state file. A NaN is an error: it has no JSON form."""
    body = json.dumps(value, indent=1, allow_nan=False)
    head = body[:-2] + "," if value else "{"
    return f"{head}{SEAL}{_sha256_of(body)}{END}"


def unsealed(text: str, place: Path | str) -> dict[str, Any]:
    """The value of a state file's text.

    Raises:
        DamagedError: not the text that `sealed` gave.
    """
    head, _, rest = text.rpartition(SEAL)
    body = "{}" if head == "{" else head.removesuffix(",") + "\n}"
    if not head or rest != f"{_sha256_of(body)}{END}":
        raise DamagedError(
            f"{place}: must end in the checksum of what it holds, "
            f"{'does not match it' if head else 'has none'} ({len(text.encode()):,} bytes): it is damaged, or was "
            "changed by hand"
        )
    return json.loads(body)


def sealed_row(row: dict[str, Any]) -> str:
    """A row as a line, without its end."""
    body = json.dumps(row, allow_nan=False)
    return f"{body[:-1]}{ROW_SEAL}{zlib.crc32(body.encode()):08x}{ROW_END}"


def unsealed_row(line: str) -> dict[str, Any] | None:
    """The row of a line; None where it is not the line that `sealed_row` gave."""
    head, _, rest = line.rpartition(ROW_SEAL)
    body = head + "}"
    if not head or rest != f"{zlib.crc32(body.encode()):08x}{ROW_END}":
        return None
    return json.loads(body)


def sound_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a file that may not be there, and the numbers (from 1) of its lines that are damaged."""
    if not path.exists():
        return [], []
    found = [unsealed_row(line) for line in _lines(path)]
    bad = [number for number, row in enumerate(found, 1) if row is None]
    return [row for row in found if row is not None], bad


def _lines(path: Path) -> list[str]:
    # Not splitlines: JSON text may hold other line ends than "\n".
    text = path.read_bytes().decode("utf-8", errors="replace")
    return [line for line in text.split("\n") if line]


def seal_folder(folder: Path) -> None:
    """Writes the checksums of a folder's files beside them."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    write_checksums(folder, {p.relative_to(folder).as_posix(): _entry(p) for p in files})


def write_checksums(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Writes known checksums into a folder that is not in its place yet."""
    (folder / CHECKSUMS).write_text(sealed({"files": entries}), encoding="utf-8")


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """What a folder's files must be, by name.

    Raises:
        DamagedError: no readable checksums.json.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        raise DamagedError(f"{_shown(path)}: must be there, is not: the folder is not whole")
    return unsealed(path.read_bytes().decode("utf-8", errors="replace"), _shown(path))["files"]


def check_folder(folder: Path) -> None:
    """Compares a folder's files with its checksums.

    Raises:
        DamagedError: names the first file that differs.
    """
    for name, entry in checksums(folder).items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise DamagedError(f"{_shown(path)}: must be there, is not: the folder is not whole")
        if size != entry["bytes"]:
            raise DamagedError(
                f"{_shown(path)}: must have {entry['bytes']:,} bytes, has {size:,}: it is cut short, or another file"
            )
        if file_sha256(path) != entry["sha256"]:
            raise DamagedError(
                f"{_shown(path)}: its SHA-256 is not the one that was written down: it is damaged"
            )


def _shown(path: Path) -> str:
    """A path as its user knows it: of a run on an object store not that of this machine's copy."""
    from trainers.mirror import shown  # which stands on this module

    return shown(path)


def sync_folder(folder: Path) -> None:
    """Makes a folder's files outlive a loss of power; without it a rename may come before what it names."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync_file(path)


def sync_file(path: Path) -> None:
    """Makes a file's content outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def first_whole(folders: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """The first of some folders that is whole, and what is wrong with those before it; folders that are not
    there say nothing."""
    problems: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            continue
        try:
            check_folder(folder)
        except DamagedError as error:
            problems.append(str(error))
        else:
            return folder, problems
    return None, problems


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
