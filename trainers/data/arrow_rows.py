"""Rows of parquet files and of what `datasets` gives: typed, with Arrow's own nulls taken out."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainers.data.json_rows import RowDecoder
from trainers.data.records import (
    MAX_NAME,
    DataError,
    DataFile,
    Origin,
    Record,
    RowError,
    SuspectColumns,
    Unusable,
    first_line,
    printable,
)
from trainers.data.text_files import HEAD_BYTES, PARQUET_MARK, check_kind

PARQUET_ROWS = 1024
NAN = Unusable("is NaN (a missing value, in a column of numbers); write null or a string")

Convert = Callable[[Any], Any]


def read_parquet(file: DataFile, wanted: frozenset[str]) -> Iterator[Record]:
    """Rows of a parquet file, a batch at a time.

    Args: wanted: columns that any shape may use; only these are read, so that a column nobody uses
        cannot break loading.
    Raises: DataError: not parquet, or a damaged one.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        _check_mark(file)
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            schema = parquet.schema_arrow
            names = _wanted_names(file, schema.names, wanted)
            converts = {name: _json_convert(schema.field(name).type) for name in names}
            used = {name: convert for name, convert in converts.items() if convert}
            for batch in parquet.iter_batches(batch_size=PARQUET_ROWS, columns=names or None):
                for row in _python_rows(batch, file, number):
                    number += 1
                    for name, convert in used.items():
                        row[name] = convert(row[name])
                    yield Record(typed_columns(row), Origin(file.name, number, "row"))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        after = f" after row {number}" if number else ""
        raise DataError(
            f"{file.name}: not a readable parquet file{after}: {first_line(error)}"
        ) from error


def _python_rows(batch: Any, file: DataFile, number: int) -> list[dict[str, Any]]:
    """Raises: DataError: a value that Python has no form for: a date beyond the year 9999, a time zone that
    nobody knows."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        raise  # the file's own fault, as the caller says it
    except (OverflowError, ValueError, LookupError) as error:
        raise DataError(
            f"{file.name}: a value after row {number} cannot be read: {first_line(error)}; write its column as text"
        ) from error


def _check_mark(file: DataFile) -> None:
    with file.path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    if not head.startswith(PARQUET_MARK):
        check_kind(file, head)


def _wanted_names(file: DataFile, names: list[str], wanted: frozenset[str]) -> list[str]:
    used = [name for name in names if name in wanted]
    twice = next((name for name in used if used.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            f'{file.name}: column names must differ, "{printable(twice, MAX_NAME)}" stands twice'
        )
    return used


def _json_convert(kind: Any) -> Convert | None:
    """What turns a column's values into what they stand for, where JSON text stands in for values
    of mixed types, as `datasets` writes them; None where none does."""
    import pyarrow

    if isinstance(kind, pyarrow.JsonType):
        return _json_value
    if pyarrow.types.is_struct(kind):
        parts = {part.name: convert for part in kind if (convert := _json_convert(part.type))}
        return (lambda value: _struct(value, parts)) if parts else None
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        inner = _json_convert(kind.value_type)
        return (lambda value: value and [inner(item) for item in value]) if inner else None
    return None


def _struct(value: dict[str, Any] | None, parts: dict[str, Convert]) -> dict[str, Any] | None:
    return value and {**value, **{name: convert(value[name]) for name, convert in parts.items()}}


def _json_value(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return RowDecoder().value_at(text, 0)[0]
    except (json.JSONDecodeError, RowError) as error:
        return Unusable(f"must be JSON as its column's type says: {error}")


def read_saved(folder: Path) -> Iterator[Record]:
    """Rows of a folder that `datasets` saved. Raises: DataError: it is not readable."""
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not a readable saved dataset: {first_line(error)}") from error
    yield from dataset_records(rows, str(folder))


def dataset_records(rows: Any, name: str) -> Iterator[Record]:
    """The rows of a `datasets.Dataset`."""
    for number, row in enumerate(rows, start=1):
        yield Record(typed_columns(dict(row)), Origin(name, number, "row"))


def typed_columns(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls that Arrow puts into nested objects, and with `Unusable` for NaN,
    which is how pandas writes a missing value.

    A struct column has the union of all rows' keys, so that every tool call would show the
    arguments of all tools as null (field case A16). A null in a column itself is kept: it is the
    row's own.
    """
    found: list[Unusable] = []
    columns = {name: _own_values(value, found) for name, value in row.items()}
    return SuspectColumns(columns) if found else columns


def _own_values(value: Any, found: list[Unusable]) -> Any:
    if isinstance(value, dict):
        return {key: _own_values(item, found) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_own_values(item, found) for item in value]
    if isinstance(value, float) and math.isnan(value):
        value = NAN
    if isinstance(value, Unusable):
        found.append(value)
    return value
