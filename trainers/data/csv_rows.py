"""Rows of csv and tsv files: every value is text, exactly as it is written."""

import csv
import sys
from collections.abc import Iterator
from typing import Any

from trainers.data.records import (
    MAX_NAME,
    BadRows,
    DataError,
    DataFile,
    Origin,
    Record,
    RowError,
    printable,
)
from trainers.data.text_files import decoded_line, file_lines


def read_csv(
    file: DataFile, delimiter: str, wanted: frozenset[str], bad: BadRows
) -> Iterator[Record]:
    """Rows under a header line; every value is text. Quoting as RFC 4180, errors are errors.

    Args: wanted: columns that any shape may use; others may share a name.
    """
    # The limit of 128 KiB a field is the csv module's own and process-wide; documents are longer.
    csv.field_size_limit(sys.maxsize)
    reader, number = csv.reader(_lines(file), delimiter=delimiter, strict=True), 1
    try:
        header = _header(file, reader, wanted)
        while True:
            # A quoted field may span lines: a row is named by its first.
            number = reader.line_num + 1
            values = next(reader, None)
            if values is None:
                return
            origin = Origin(file.name, number)
            if len(values) == len(header):
                yield Record(dict(zip(header, values, strict=True)), origin)
            elif values:
                bad.add(
                    origin, f"must have {len(header)} fields as the header has, has {len(values)}"
                )
    except csv.Error as error:
        raise DataError(f"{file.name}:{number}: not valid CSV: {printable(str(error))}") from error


def _lines(file: DataFile) -> Iterator[str]:
    for number, line in file_lines(file):
        try:
            yield decoded_line(line)
        except RowError as error:
            raise DataError(f"{file.name}:{number}: {error}") from error


def _header(file: DataFile, reader: Any, wanted: frozenset[str]) -> list[str]:
    header = next(reader, None)
    if not header or not any(name.strip() for name in header):
        raise DataError(f"{file.name}:1: must begin with a header line that names the columns")
    twice = sorted({name for name in header if name in wanted and header.count(name) > 1})
    if twice:
        raise DataError(
            f'{file.name}:1: column names must differ, "{printable(twice[0], MAX_NAME)}" stands twice'
        )
    return header
