"""The cache of counts and tokenized sets, by content: bytes of the data, tokenizer, template,
options.

    CACHE/digests/PATH.json  sha256 of a file, valid while its size and mtime stay
    CACHE/counts/KEY.json    {"loss_tokens": n}
    CACHE/sets/KEY/          audit.json, train/, eval/

CACHE is the folder in TENFOLD_CACHE, or ~/.cache/tenfold. Sets also go to and come from the URL in
TENFOLD_SHARED_CACHE, where a run's storage is one. Nothing here imports numpy or
tokenizers, so that `tenfold plan` finds a count that is known in milliseconds. Everything is
written under a name of its own and renamed, so that trials that start together never see half an
entry (field case C18), and has checksums: an entry that is damaged is said and made again.
"""

import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from trainers.data.records import DataError
from trainers.data.tokenizer import SIDE_FILES, SLOW_FILES
from trainers.integrity import DamagedError, check_folder, seal_folder, sealed, unsealed
from trainers.object_store import ObjectStore
from trainers.remote_folder import download_folder, upload_folder

# Raise it whenever the same input would give other ids, masks or counts.
CODE_VERSION = 3
SETTLED_NS = 2_000_000_000
SHARED_CACHE = "TENFOLD_SHARED_CACHE"


def cache_root() -> Path:
    """The cache's folder."""
    return Path(os.environ.get("TENFOLD_CACHE") or Path.home() / ".cache" / "tenfold")


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, remembered by (path, size, mtime)."""
    path = path.resolve()
    stat = path.stat()
    memo = cache_root() / "digests" / f"{digest_of(str(path))[:32]}.json"
    known = read_json(memo)
    if known and known["size"] == stat.st_size and known["mtime_ns"] == stat.st_mtime_ns:
        return known["sha256"]
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    # A file written just now may be written again within the clock's resolution, unseen by its
    # mtime.
    if time.time_ns() - stat.st_mtime_ns > SETTLED_NS:
        write_json(memo, {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256})
    return sha256


def tokenizer_key(folder: Path) -> Any:
    """What stands for a model folder's tokenizer and template."""
    names = ("tokenizer.json", "merges.txt", *SLOW_FILES, *SIDE_FILES)
    return [[name, file_digest(folder / name)] for name in names if (folder / name).exists()]


def read_json(path: Path) -> dict[str, Any] | None:
    """The value of a file; None where there is none, or one that is damaged, which is said."""
    try:
        return unsealed(path.read_bytes().decode("utf-8", errors="replace"), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DamagedError as error:
        _say_damaged(error)
        return None


def _say_damaged(error: DamagedError) -> None:
    print(f"the cache's {error}; it is made again", file=sys.stderr)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a whole file or nothing.

    Raises: DataError: the cache cannot be written.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(sealed(value), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(error) from error


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write a folder, and puts it in place whole; another process's equal one may stay.

    Raises: DataError: the cache cannot be written.
    """
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        seal_folder(temporary)
        os.rename(temporary, target)
    except OSError as error:
        if not target.is_dir():
            raise _unwritable(error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _share(target)


def find_folder(target: Path) -> bool:
    """Whether a folder is there and whole, or on the shared cache, from where it then comes here. One
    that is damaged is removed.

    Raises: ValueError: the shared cache cannot be read, or holds something else.
    """
    if _is_whole(target):
        return True
    if not (url := os.environ.get(SHARED_CACHE)):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    return download_folder(ObjectStore(url), _shared_name(target), target, shared=True) is not None


def _is_whole(target: Path) -> bool:
    if not target.is_dir():
        return False
    try:
        check_once(target, target.stat().st_ino)
    except DamagedError as error:
        _say_damaged(error)
        # Away first: another process may find the same, and put a new one there.
        gone = target.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            os.rename(target, gone)
        except FileNotFoundError:
            return False
        shutil.rmtree(gone, ignore_errors=True)
        return False
    return True


@cache
def check_once(target: Path, _inode: int) -> None:
    """Once a process: the sets of a run are asked for by each of its parts, and may be gigabytes."""
    check_folder(target)


def _share(target: Path) -> None:
    if url := os.environ.get(SHARED_CACHE):
        upload_folder(ObjectStore(url), target, _shared_name(target), shared=True)


def _shared_name(target: Path) -> str:
    return target.relative_to(cache_root()).as_posix()


def _unwritable(error: OSError) -> DataError:
    return DataError(
        f"the cache {cache_root()} must be writable: {error}; set TENFOLD_CACHE to a folder with"
        " room"
    )
