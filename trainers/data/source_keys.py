"""What stands for the content of data in the cache's keys."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainers.data.cache import file_digest
from trainers.data.sources import Source


def source_key(source: Source) -> Any:
    """What stands for a source's content.

    A hub id is looked up through `datasets` for the files it stands for, fetched to this machine.
    """
    if source.hub_id is not None:
        return _hub_files(source.hub_id, source.revision)
    if source.saved is not None:
        files: Iterable[Path] = sorted(path for path in source.saved.rglob("*") if path.is_file())
    else:
        files = source.files
    return [_file_key(path.name, path) for path in files]


def _file_key(name: str, path: Path) -> list[str]:
    # The name's end decides how a file is read.
    return [name.lower().split(".", 1)[-1], file_digest(path)]


def _hub_files(hub_id: str, revision: str | None) -> Any:
    from trainers.data.hub import train_files
    from trainers.data.sources import load_hub

    files = train_files(hub_id, revision)
    if files is not None:
        return [hub_id, revision, [_file_key(file.name, file.path) for file in files]]
    rows = load_hub(hub_id, revision)
    stats = [(entry["filename"], os.stat(entry["filename"])) for entry in rows.cache_files]
    return [hub_id, revision, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]
