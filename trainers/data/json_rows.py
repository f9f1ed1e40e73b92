"""Rows of JSON text, one object a line, decoded so that text stays text and nothing is lost.

A JSON number keeps its source text (`1.50` in a text column trains "1.50"). What a row holds but
nothing can use (NaN, a key that stands twice, an integer too long, half a character) makes the row
bad only where its column is used: an `Unusable` stands for it, and the row is `SuspectColumns`.
"""

import json
from collections.abc import Iterator
from typing import Any

from trainers.data.records import (
    MAX_NAME,
    BadRows,
    DataFile,
    Origin,
    Record,
    RowError,
    SuspectColumns,
    Unusable,
    fault_in,
    printable,
)
from trainers.data.text_files import decoded_line, file_lines

JSON_KINDS = (list, str, bool, int, float)


class SourceInt(int):
    """An integer that remembers how the file wrote it."""

    source: str


class SourceFloat(float):
    """A float that remembers how the file wrote it."""

    source: str


def _source_float(text: str) -> SourceFloat:
    number = SourceFloat(text)
    number.source = text
    return number


class RowDecoder:
    """Decodes JSON, and remembers whether an `Unusable` had to stand in for a value.

    Args: has_marked: whether one stood in since the owner set it to False.
    """

    def __init__(self) -> None:
        self.has_marked = False
        # These four leave decoding to json's C scanner; per row they cost a few per cent of it.
        self._json = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_int=self._integer,
            parse_float=_source_float,
            parse_constant=self._constant,
        )

    def columns(self, text: str) -> dict[str, Any]:
        """The columns of a row that is the whole text. Raises: RowError: not a JSON object."""
        self.has_marked = False
        try:
            value = self._json.decode(text)
        except json.JSONDecodeError as error:
            raise RowError(f"not valid JSON: {error.msg} (column {error.colno})") from error
        except RecursionError as error:
            raise _too_deep() from error
        return as_columns(value, is_suspect=self.has_marked or has_surrogate_escape(text))

    def value_at(self, text: str, index: int) -> tuple[Any, int]:
        """The value that begins at an index, and the index behind it.

        Raises: RowError: nested too deeply. json.JSONDecodeError: not JSON.
        """
        try:
            return self._json.raw_decode(text, index)
        except RecursionError as error:
            raise _too_deep() from error

    def _marked(self, reason: str) -> Unusable:
        self.has_marked = True
        return Unusable(reason)

    def _constant(self, name: str) -> Unusable:
        return self._marked(f"{name} is not JSON; write a number, a string or null")

    def _integer(self, text: str) -> SourceInt | Unusable:
        try:
            number = SourceInt(text)
        except ValueError:  # Python refuses integers of more than 4,300 digits
            return self._marked(f"holds an integer of {len(text)} digits; write it as a string")
        number.source = text
        return number

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    values[name] = self._marked(
                        f'key "{printable(name, MAX_NAME)}" stands twice in one object; keep one'
                    )
                seen.add(name)
        return values


def _too_deep() -> RowError:
    return RowError("is nested too deeply to be read; write the nested part as a string")


def has_surrogate_escape(text: str, start: int = 0, end: int | None = None) -> bool:
    """Whether half a character can be in a JSON text: only an escape can bring one in, as UTF-8
    has none. Pairs of them are common and harmless."""
    return text.find("\\ud", start, end) >= 0 or text.find("\\uD", start, end) >= 0


def as_columns(value: Any, *, is_suspect: bool) -> dict[str, Any]:
    """A row's columns. Raises: RowError: not an object."""
    if isinstance(value, dict):
        return SuspectColumns(value) if is_suspect else value
    if isinstance(value, Unusable):
        raise RowError(value.reason)
    kind = next((kind.__name__ for kind in JSON_KINDS if isinstance(value, kind)), "null")
    raise RowError(f"must be a JSON object, is {kind}")


def strict_json(text: str) -> Any:
    """The value of a JSON text that stands in a column (messages or tools in csv).

    Raises: RowError: not JSON, or it holds what cannot be used.
    """
    decoder = RowDecoder()
    try:
        value, end = decoder.value_at(text, len(text) - len(text.lstrip()))
        if text[end:].strip():
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise RowError(f"must be JSON: {error.msg} (column {error.colno})") from error
    reason = fault_in(value)
    if reason:
        raise RowError(reason)
    return value


def read_json_lines(file: DataFile, bad: BadRows) -> Iterator[Record]:
    """One object a line; blank lines are skipped, lines that cannot be used go to `bad`."""
    decoder = RowDecoder()
    for number, line in file_lines(file):
        if line.isspace():
            continue
        origin = Origin(file.name, number)
        try:
            columns = decoder.columns(decoded_line(line))
        except RowError as error:
            bad.add(origin, str(error))
            continue
        yield Record(columns, origin)
