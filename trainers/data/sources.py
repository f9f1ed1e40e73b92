"""Where rows come from: files, folders, hub ids; every row with the place it was read from.

json, jsonl and csv are read here, with the standard library, and not through `datasets`: its Arrow
readers retype text (an answer "1" becomes the number 1, "2024-01-02" a timestamp; field case A21),
disagree with Python on duplicate keys (A20), and lose the line number that an error needs (A19).
Text stays text, byte for byte, also in the files of a hub dataset. Parquet is read with pyarrow,
and saved datasets through `datasets`: they carry their types with them. Those two are imported only
when such data is read.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.credentials import mask_logs
from trainers.data.records import BadRows, DataError, DataFile, Record
from trainers.data.suffixes import file_suffix

ACCEPTED = "jsonl, json, csv, tsv (each also .gz) or parquet"
# Kinds that are met often and not read, and what to do about them.
ADVICE = {
    ".txt": 'a text file says not where a document ends: write it as jsonl, {"text": ...} a line',
    ".md": 'write it as jsonl, {"text": ...} a line',
    ".arrow": "give the folder that save_to_disk wrote, or write it as parquet",
    ".feather": "write it as parquet",
    ".xlsx": "save it as csv (UTF-8)",
    ".pkl": "write it as jsonl or parquet",
    ".yaml": "write it as jsonl",
    ".parquet.gz": "parquet is packed within; unpack the gzip",
    ".tar.gz": "unpack it and give the folder",
    **dict.fromkeys((".zst", ".xz", ".bz2", ".lz4", ".7z"), "unpack it, or pack it with gzip"),
    **dict.fromkeys((".zip", ".tar", ".tgz"), "unpack it and give the folder"),
}
PACKED = re.compile(r"(?i)\.(jsonl|ndjson|json|csv|tsv|parquet)\.(zst|xz|bz2|lz4|zip|7z)$")
# Files that describe a dataset folder rather than hold its rows.
DESCRIPTIONS = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
HELD_OUT_NAME = re.compile(r"(?i)^(validation|valid|val|dev|test|eval)([-_.]|$)")
TRAIN_NAME = re.compile(r"(?i)^train([-_.]|$)")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?$")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a `data:` value stands for: files in reading order, a folder that `datasets` saved, or a
    hub id (`owner/name`, or `owner/name:subset`).

    Args: ignored: files of a folder's other splits, which are not read.
    """

    files: tuple[Path, ...] = ()
    saved: Path | None = None
    hub_id: str | None = None
    revision: str | None = None
    ignored: tuple[Path, ...] = field(default=(), compare=False)


def resolve_source(data: str | Path, revision: str | None = None) -> Source:
    """The source that a file, folder or hub id names.

    Raises: DataError: nothing there, no permission, an unknown kind of file, or a folder without
        data files.
    """
    path = Path(data).expanduser()
    try:
        if path.is_dir():
            return _folder_source(path)
        if path.exists() or path.is_symlink():
            _check_file(path)
            return Source(files=(path,))
    except OSError as error:
        place = error.filename or path
        raise DataError(f"data cannot be read: {place}: {error.strerror or error}") from error
    if HUB_ID.match(str(data)) and not file_suffix(path.name):
        return Source(hub_id=str(data), revision=revision)
    raise DataError(
        f"data must be a file, a folder or a hub id (owner/name), found nothing at {data}"
    )


def _check_file(path: Path) -> None:
    """Raises: DataError: not a file of a kind that is read."""
    if not path.exists():
        raise DataError(f"{path}: must be a file, is a link to nothing")
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(
            f"{path}: must be a file, is a pipe or device, which can be read only once; write it"
            " to a file"
        )
    data_suffix(path)


def _folder_source(folder: Path) -> Source:
    if (folder / "dataset_dict.json").exists():
        return _saved_split(folder)
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        return Source(saved=folder)
    found = _visible_files(folder)
    files = [path for path in found if file_suffix(path.name) or PACKED.search(path.name)]
    if not files:
        others = ", ".join(path.name for path in found[:5])
        raise DataError(
            f"a data folder must hold {ACCEPTED} files, found none in {folder}"
            + (f", only {others}" if others else "")
        )
    for path in files:  # none is left out in silence
        _check_file(path)
    return _train_files(files, folder)


def _saved_split(folder: Path) -> Source:
    if not (folder / "train").is_dir():
        names = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise DataError(
            f"{folder}: a saved dataset must have a train split, has {names or 'none'}; give the"
            " split's folder"
        )
    return Source(saved=folder / "train")


def _train_files(files: list[Path], folder: Path) -> Source:
    """The train split where the folder has splits (train-*.parquet, train/...), else every file."""

    def named(pattern: re.Pattern[str]) -> list[Path]:
        return [
            f for f in files if any(pattern.match(part) for part in f.relative_to(folder).parts)
        ]

    train, held_out = named(TRAIN_NAME), named(HELD_OUT_NAME)
    kept = train if train and held_out else files
    return Source(files=tuple(kept), ignored=tuple(f for f in files if f not in kept))


def _visible_files(folder: Path) -> list[Path]:
    """All files below, by path, without hidden ones, those of hidden folders, and descriptions.

    Raises: OSError: a folder below cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [Path(parent, name) for name in names if not _is_hidden(name)]
    return sorted(path for path in found if path.name not in DESCRIPTIONS)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def data_suffix(path: Path) -> str:
    """The kind of a data file by its name, without .gz.

    Raises: DataError: not a kind that is read.
    """
    suffix = file_suffix(path.name)
    if not suffix:
        name = path.name.lower()
        advice = next((text for end, text in ADVICE.items() if name.endswith(end)), None)
        raise DataError(
            f"{path}: data must be {ACCEPTED}, by the file's suffix;"
            f" {advice or 'rename or convert it'}"
        )
    return suffix


def read_records(source: Source, wanted: frozenset[str], bad: BadRows) -> Iterator[Record]:
    """All rows of a source in order, streamed; a row that cannot be parsed goes to `bad`.

    Args: wanted: columns that any shape may use; parquet reads only these, so that a column nobody
        uses cannot break loading.
    Raises: DataError: a file that cannot be read as a whole (encoding, empty, broken array).
    """
    if source.hub_id is not None:
        yield from read_hub(source.hub_id, source.revision, wanted, bad)
    if source.saved is not None:
        from trainers.data.arrow_rows import read_saved

        yield from read_saved(source.saved)
    for path in source.files:
        yield from read_file(DataFile(path, str(path)), wanted, bad)


def read_file(file: DataFile, wanted: frozenset[str], bad: BadRows) -> Iterator[Record]:
    """All rows of one file, by the kind that its name says. Raises: DataError: as read_records."""
    suffix = file_suffix(file.name)
    try:
        if file.path.stat().st_size == 0:
            raise DataError(f"{file.name}: must hold rows, is empty (0 bytes)")
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read: {error.strerror or error}") from error
    if suffix == ".parquet":
        from trainers.data.arrow_rows import read_parquet

        return read_parquet(file, wanted)
    if suffix in (".csv", ".tsv"):
        from trainers.data.csv_rows import read_csv

        return read_csv(file, "\t" if suffix == ".tsv" else ",", wanted, bad)
    from trainers.data.json_arrays import read_json
    from trainers.data.json_rows import read_json_lines

    return read_json(file, bad) if suffix == ".json" else read_json_lines(file, bad)


def read_hub(
    hub_id: str, revision: str | None, wanted: frozenset[str], bad: BadRows
) -> Iterator[Record]:
    """Rows of a hub dataset's train split: from its own files where they are of a kind that is read
    here, else typed as `datasets` gives them.

    Raises: DataError: it cannot be fetched, or as read_records.
    """
    from trainers.data.hub import train_files

    files = train_files(hub_id, revision)
    if files is None:
        from trainers.data.arrow_rows import dataset_records

        yield from dataset_records(load_hub(hub_id, revision), hub_id)
    for file in files or ():
        yield from read_file(file, wanted, bad)


def load_hub(hub_id: str, revision: str | None = None) -> Any:
    """The train split of a hub dataset (`owner/name` or `owner/name:subset`), or of a local folder
    laid out like one, as `datasets` gives it.

    Raises: DataError: it cannot be loaded, with the reason that `datasets` gives.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    from trainers.data.hub import not_loaded

    mask_logs()
    name, _, subset = hub_id.partition(":")
    try:
        return datasets.load_dataset(name, subset or None, split="train", revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(not_loaded(hub_id, error)) from error
    except DatasetsError as error:  # its own reason stands in its cause
        raise DataError(not_loaded(hub_id, error.__cause__ or error)) from error
