"""Rows of jsonl, json and csv files, read with the standard library so that text stays text.

Accepted: UTF-8 with or without byte order mark, LF or CRLF, gzip. A JSON number keeps its source
text (`1.50` in a text column trains "1.50"); an object with the same key twice is refused.
"""

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from trainers.records import BadRows, DataError, Origin, Record, RowError

BOM = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
SPACE = re.compile(r"[ \t\r\n]*")
ROW_LIST_KEYS = ("data", "rows", "train")


class SourceInt(int):
    """An integer that remembers how the file wrote it."""

    source: str


class SourceFloat(float):
    """A float that remembers how the file wrote it."""

    source: str


def _source_int(text: str) -> SourceInt:
    try:
        number = SourceInt(text)
    except ValueError as error:  # Python refuses integers of more than 4,300 digits
        raise RowError(f"holds an integer of {len(text)} digits; write it as a string") from error
    number.source = text
    return number


def _source_float(text: str) -> SourceFloat:
    number = SourceFloat(text)
    number.source = text
    return number


def _no_constant(name: str) -> NoReturn:
    raise RowError(f"{name} is not JSON; write a number, a string or null")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(f'key "{twice}" stands twice in one object; keep one')
    return values


DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys,
    parse_int=_source_int,
    parse_float=_source_float,
    parse_constant=_no_constant,
)


def file_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers (from 1) and raw lines, without byte order mark, unpacked where the name ends
    in .gz.

    Raises: DataError: UTF-16, binary, or damaged gzip.
    """
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, _checked_first(path, line) if number == 1 else line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}") from error


def _checked_first(path: Path, line: bytes) -> bytes:
    if line.startswith(UTF16_MARKS) or b"\0" in line[:64]:
        raise DataError(f"{path}:1: must be UTF-8 text, is UTF-16 or binary; save it as UTF-8")
    return line.removeprefix(BOM)


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise RowError(
            f"must be UTF-8, has byte 0x{byte:02X} at column {error.start + 1}; save the file as"
            " UTF-8"
        ) from error


def _checked_row(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"must be a JSON object, is {type(value).__name__}")
    if "\\ud" in source or "\\uD" in source:  # only an escape can bring a lone surrogate in
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise RowError(
                f"has half a character (lone surrogate \\u{code:04x}); text must be Unicode"
            ) from error
    return value


def _json_row(text: str) -> dict[str, Any]:
    try:
        return _checked_row(DECODER.decode(text), text)
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON: {error.msg} (column {error.colno})") from error


def read_json_lines(path: Path, bad: BadRows) -> Iterator[Record]:
    """One object a line; blank lines are skipped, lines that cannot be used go to `bad`."""
    for number, line in file_lines(path):
        if not line.strip():
            continue
        origin = Origin(str(path), number)
        try:
            columns = _json_row(_decoded(line))
        except RowError as error:
            bad.add(origin, str(error))
            continue
        yield Record(columns, origin)


def read_json(path: Path, bad: BadRows) -> Iterator[Record]:
    """An array of objects, one object that holds such an array under "data" (or "rows", "train"),
    a single object, or, as many .json files are, one object a line.

    The whole text is held in memory; use jsonl for files that do not fit.
    """
    text = _whole_text(path)
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        return _array_rows(path, text, start + 1)
    value, end = _value_at(path, text, start, line=text.count("\n", 0, start) + 1)
    if text[end:].strip():
        return read_json_lines(path, bad)
    return _object_rows(path, value, text, bad)


def _whole_text(path: Path) -> str:
    pieces = []
    for number, line in file_lines(path):
        try:
            pieces.append(_decoded(line))
        except RowError as error:
            raise DataError(f"{path}:{number}: {error}") from error
    text = "".join(pieces)
    if not text.strip():
        raise DataError(f"{path}: must hold rows, is blank")
    return text


def _value_at(path: Path, text: str, index: int, *, line: int) -> tuple[Any, int]:
    try:
        return DECODER.raw_decode(text, index)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
        ) from error
    except RowError as error:
        raise DataError(f"{path}:{line}: {error}") from error


def _array_rows(path: Path, text: str, index: int) -> Iterator[Record]:
    line, counted = 1, 0
    while True:
        index = _skip_space(text, index)
        line, counted = line + text.count("\n", counted, index), index
        if text[index : index + 1] == "]":
            break
        value, end = _value_at(path, text, index, line=line)
        try:
            row = _checked_row(value, text[index:end])
        except RowError as error:
            raise DataError(f"{path}:{line}: {error}") from error
        yield Record(row, Origin(str(path), line))
        index = _skip_space(text, end)
        if text[index : index + 1] == ",":
            index += 1
        elif text[index : index + 1] != "]":
            line += text.count("\n", counted, index)
            raise DataError(
                f"{path}:{line}: not valid JSON: the array must go on with , or end with ]"
            )
    if text[index + 1 :].strip():
        raise DataError(f"{path}:{line}: not valid JSON: text after the array's end")


def _skip_space(text: str, index: int) -> int:
    match = SPACE.match(text, index)
    return match.end() if match else index


def _object_rows(path: Path, value: Any, text: str, bad: BadRows) -> Iterator[Record]:
    key = next(
        (k for k in ROW_LIST_KEYS if isinstance(value, dict) and isinstance(value.get(k), list)),
        None,
    )
    rows, unit = (value[key], f"{key} element") if key else ([value], "line")
    for number, row in enumerate(rows, start=1):
        origin = Origin(str(path), number, unit)
        try:
            yield Record(_checked_row(row, text), origin)
        except RowError as error:
            bad.add(origin, str(error))


def read_csv(path: Path, delimiter: str, bad: BadRows) -> Iterator[Record]:
    """Rows under a header line; every value is text. Quoting as RFC 4180, errors are errors."""
    # The limit of 128 KiB a field is the csv module's own and process-wide; documents are longer.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_csv_lines(path), delimiter=delimiter, strict=True)
    header = _csv_header(path, reader)
    while True:
        # A quoted field may span lines: a row is named by its first.
        origin = Origin(str(path), reader.line_num + 1)
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{origin}: not valid CSV: {error}") from error
        if values is None:
            return
        if len(values) == len(header):
            yield Record(dict(zip(header, values, strict=True)), origin)
        elif values:
            bad.add(origin, f"must have {len(header)} fields as the header has, has {len(values)}")


def _csv_lines(path: Path) -> Iterator[str]:
    for number, line in file_lines(path):
        try:
            yield _decoded(line)
        except RowError as error:
            raise DataError(f"{path}:{number}: {error}") from error


def _csv_header(path: Path, reader: Any) -> list[str]:
    header = next(reader, None)
    if not header:
        raise DataError(f"{path}:1: must begin with a header line that names the columns")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: column names must differ, {twice[0]!r} stands twice")
    return header
