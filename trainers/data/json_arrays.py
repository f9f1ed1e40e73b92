"""Rows of .json files: an array of objects, streamed; an object that holds one; or lines."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from trainers.data.json_rows import RowDecoder, as_columns, has_surrogate_escape, read_json_lines
from trainers.data.records import BadRows, DataError, DataFile, Origin, Record, RowError
from trainers.data.text_files import file_chunks, text_pieces

ROW_LIST_KEYS = ("data", "rows", "train")
CHUNK_BYTES = 1 << 18
SPACE = re.compile(r"[ \t\r\n]*")
# A verdict so near to the end of what was read may change with what follows: a number goes on, an
# escape or a word (-Infinity, \\ud83d\\ude00) is cut.
MARGIN = 16


def read_json(file: DataFile, bad: BadRows, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Record]:
    """An array of objects, one object that holds such an array under "data" (or "rows", "train"),
    a single object, or, as many .json files are, one object a line.

    Arrays and lines are streamed: of an array, a chunk and the longest row are held. An object with
    all rows in it is held whole.
    Raises: DataError: not JSON, blank, not UTF-8.
    """
    window = TextWindow(file.name, text_pieces(file.name, file_chunks(file, chunk_bytes)))
    first = window.next_character()
    if not first:
        raise DataError(f"{file.name}: must hold rows, is blank")
    if first == "[":
        yield from _array_rows(window, bad)
        return
    decoder = RowDecoder()
    value, end = window.value(decoder)
    is_suspect = decoder.has_marked or has_surrogate_escape(window.text, window.index, end)
    window.advance(end)
    if window.next_character():
        yield from read_json_lines(file, bad)
    else:
        yield from _object_rows(file, value, is_suspect, bad)


class TextWindow:
    """The part of a text that is being read, with the place it stands at.

    Args:
        text: what is held.
        index: the current place in it; what stands before may be dropped.
        line: line number of the current place.
    """

    def __init__(self, name: str, pieces: Iterable[str]) -> None:
        self.name, self.text, self.index, self.line = name, "", 0, 1
        self._pieces, self._line_start, self._is_whole = iter(pieces), 0, False

    def advance(self, end: int) -> None:
        """Moves the current place forward to an index."""
        self.line += self.text.count("\n", self.index, end)
        self._line_start = self._start_of_line(end)
        self.index = end

    def next_character(self) -> str:
        """Moves to the next character that is not space, and gives it; empty at the end."""
        while True:
            space = SPACE.match(self.text, self.index)
            end = space.end() if space else self.index
            self.advance(end)
            if end < len(self.text):
                return self.text[end]
            if not self._extend():
                return ""

    def value(self, decoder: RowDecoder) -> tuple[Any, int]:
        """The value at the current place, and the index behind it; `decoder.has_marked` is its.

        Raises: DataError: not JSON, with line and column.
        """
        while True:
            decoder.has_marked = False
            try:
                value, end = decoder.value_at(self.text, self.index)
                if self._is_final(end):
                    return value, end
            except json.JSONDecodeError as error:
                is_open = error.msg.startswith("Unterminated string")
                if self._is_final(error.pos) and (self._is_whole or not is_open):
                    raise self._not_json(error) from error
            except RowError as error:
                raise self.error(str(error)) from error
            self._extend()

    def error(self, reason: str) -> DataError:
        """An error at the current place."""
        return DataError(f"{self.name}:{self.line}: {reason}")

    def _not_json(self, error: json.JSONDecodeError) -> DataError:
        line = self.line + self.text.count("\n", self.index, error.pos)
        column = error.pos - self._start_of_line(error.pos) + 1
        return DataError(f"{self.name}:{line}: not valid JSON: {error.msg} (column {column})")

    def _start_of_line(self, end: int) -> int:
        newline = self.text.rfind("\n", self.index, end)
        return newline + 1 if newline >= 0 else self._line_start

    def _is_final(self, end: int) -> bool:
        return self._is_whole or end + MARGIN <= len(self.text)

    def _extend(self) -> bool:
        """Reads on, at least as much as is held, so that a long row is decoded few times; False at
        the text's end."""
        kept = self.text[self.index :]
        self._line_start -= self.index
        self.index, wanted, pieces = 0, len(kept), [kept]
        while wanted >= 0 and not self._is_whole:
            piece = next(self._pieces, None)
            self._is_whole = piece is None
            pieces.append(piece or "")
            wanted -= len(pieces[-1]) or 1
        self.text = "".join(pieces)
        return len(self.text) > len(kept)


def _array_rows(window: TextWindow, bad: BadRows) -> Iterator[Record]:
    decoder = RowDecoder()
    window.advance(window.index + 1)
    is_over = window.next_character() == "]"
    while not is_over:
        origin = Origin(window.name, window.line)
        value, end = window.value(decoder)
        is_suspect = decoder.has_marked or has_surrogate_escape(window.text, window.index, end)
        window.advance(end)
        try:
            yield Record(as_columns(value, is_suspect=is_suspect), origin)
        except RowError as error:
            bad.add(origin, str(error))
        is_over = _is_last(window)
    window.advance(window.index + 1)
    if window.next_character():
        raise window.error("not valid JSON: text after the array's end")


def _is_last(window: TextWindow) -> bool:
    """Whether the array ends here; moves to the next value where it does not."""
    mark = window.next_character()
    if mark not in ("]", ","):
        raise window.error("not valid JSON: the array must go on with , or end with ]")
    if mark == ",":
        window.advance(window.index + 1)
        window.next_character()
    return mark == "]"


def _object_rows(file: DataFile, value: Any, is_suspect: bool, bad: BadRows) -> Iterator[Record]:
    held = value if isinstance(value, dict) else {}
    key = next((key for key in ROW_LIST_KEYS if isinstance(held.get(key), list)), None)
    rows, unit = (held[key], f"{key} element") if key else ([value], "line")
    for number, row in enumerate(rows, start=1):
        origin = Origin(file.name, number, unit)
        try:
            yield Record(as_columns(row, is_suspect=is_suspect), origin)
        except RowError as error:
            bad.add(origin, str(error))
