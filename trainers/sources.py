"""Where rows come from: files, folders, hub ids; every row with the place it was read from.

json, jsonl and csv are read here, with the standard library, and not through `datasets`: its Arrow
readers retype text (an answer "1" becomes the number 1, "2024-01-02" a timestamp; field case A21),
disagree with Python on duplicate keys (A20), and lose the line number that an error needs (A19).
Text stays text, byte for byte. Parquet is read with pyarrow, and saved datasets and hub ids through
`datasets`: they carry their types with them. Those two are imported only when such data is read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.records import BadRows, DataError, Origin, Record, drop_nested_nulls

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
ACCEPTED = "jsonl, json, csv, tsv (each also .gz) or parquet"
# Files that describe a dataset folder rather than hold its rows.
DESCRIPTIONS = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
HELD_OUT_NAME = re.compile(r"(?i)^(validation|valid|val|dev|test|eval)([-_.]|$)")
TRAIN_NAME = re.compile(r"(?i)^train([-_.]|$)")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?$")
PARQUET_ROWS = 1024


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

    Raises: DataError: nothing there, an unknown kind of file, or a folder without data files.
    """
    path = Path(data).expanduser()
    if path.is_file():
        data_suffix(path)
        return Source(files=(path,))
    if path.is_dir():
        return _folder_source(path)
    if HUB_ID.match(str(data)) and not _suffix(path):
        return Source(hub_id=str(data), revision=revision)
    raise DataError(
        f"data must be a file, a folder or a hub id (owner/name), found nothing at {data}"
    )


def _folder_source(folder: Path) -> Source:
    if (folder / "dataset_dict.json").exists():
        return Source(saved=folder / "train")
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        return Source(saved=folder)
    files = [path for path in sorted(folder.rglob("*")) if _is_data_file(path, folder)]
    if not files:
        raise DataError(f"a data folder must hold {ACCEPTED} files, found none in {folder}")
    return _train_files(files, folder)


def _train_files(files: list[Path], folder: Path) -> Source:
    """The train split where the folder has splits (train-*.parquet, train/...), else every file."""

    def named(pattern: re.Pattern[str]) -> list[Path]:
        return [
            f for f in files if any(pattern.match(part) for part in f.relative_to(folder).parts)
        ]

    train, held_out = named(TRAIN_NAME), named(HELD_OUT_NAME)
    kept = train if train and held_out else files
    return Source(files=tuple(kept), ignored=tuple(f for f in files if f not in kept))


def _is_data_file(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    return path.is_file() and not hidden and bool(_suffix(path)) and path.name not in DESCRIPTIONS


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def data_suffix(path: Path) -> str:
    """The kind of a data file by its name, without .gz.

    Raises: DataError: not a kind that is read.
    """
    suffix = _suffix(path)
    if not suffix:
        raise DataError(
            f"{path}: data must be {ACCEPTED}, by the file's suffix; rename or convert it"
        )
    return suffix


def read_records(source: Source, wanted: frozenset[str], bad: BadRows) -> Iterator[Record]:
    """All rows of a source in order, streamed; a row that cannot be parsed goes to `bad`.

    Args: wanted: columns that any shape may use; parquet reads only these, so that a column nobody
        uses cannot break loading.
    Raises: DataError: a file that cannot be read as a whole (encoding, empty, broken array).
    """
    if source.hub_id is not None:
        yield from read_hub(source.hub_id, source.revision)
    if source.saved is not None:
        yield from _read_saved(source.saved)
    for path in source.files:
        yield from _read_file(path, wanted, bad)


def _read_file(path: Path, wanted: frozenset[str], bad: BadRows) -> Iterator[Record]:
    from trainers.json_rows import read_csv, read_json, read_json_lines

    suffix = data_suffix(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path}: must hold rows, is empty (0 bytes)")
    if suffix == ".parquet":
        return _read_parquet(path, wanted)
    if suffix in (".csv", ".tsv"):
        return read_csv(path, "\t" if suffix == ".tsv" else ",", bad)
    return read_json(path, bad) if suffix == ".json" else read_json_lines(path, bad)


def _read_parquet(path: Path, wanted: frozenset[str]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {_first_line(error)}") from error
    with file:
        names = [name for name in file.schema_arrow.names if name in wanted]
        row_number = 0
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=names or None):
            for row in batch.to_pylist():
                row_number += 1
                yield Record(drop_nested_nulls(row), Origin(str(path), row_number, "row"))


def _read_saved(folder: Path) -> Iterator[Record]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not a readable saved dataset: {_first_line(error)}") from error
    yield from _dataset_records(rows, str(folder))


def read_hub(hub_id: str, revision: str | None = None) -> Iterator[Record]:
    """Rows of `load_hub`, typed as the hub's files are."""
    yield from _dataset_records(load_hub(hub_id, revision), hub_id)


def load_hub(hub_id: str, revision: str | None = None) -> Any:
    """The train split of a hub dataset (`owner/name` or `owner/name:subset`), or of a local folder
    laid out like one, as `datasets` gives it.

    Raises: DataError: it cannot be loaded, with the reason that `datasets` gives.
    """
    import datasets

    name, _, subset = hub_id.partition(":")
    try:
        return datasets.load_dataset(name, subset or None, split="train", revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"data must be a file, a folder or a hub id; {hub_id} is neither file nor folder here,"
            " and"
            f" as a hub id it cannot be loaded: {_first_line(error)}"
        ) from error


def _dataset_records(rows: Any, name: str) -> Iterator[Record]:
    for index, row in enumerate(rows):
        yield Record(drop_nested_nulls(dict(row)), Origin(name, index + 1, "row"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
