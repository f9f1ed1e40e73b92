"""A row as it was read, the place it came from, and the list of those that cannot be used."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.credentials import masked

NUM_SHOWN = 5
MAX_REASON, MAX_NAME = 240, 60
"""Characters of why a row cannot be used, which may hold what is in it, and of a name in it."""


class DataError(ValueError):
    """Data that cannot be trained on; the message is complete and one line long."""


class RowError(ValueError):
    """Why one row cannot be used, without its place; whoever knows the place adds it."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file on this machine, and the name that people know it by, whose end says what it holds
    (a download's own name may say nothing)."""

    path: Path
    name: str

    @property
    def is_gzip(self) -> bool:
        return self.name.lower().endswith(".gz")


@dataclass(frozen=True, slots=True)
class Unusable:
    """Stands in a row for a value that nothing can use; it matters only where it is used."""

    reason: str


class SuspectColumns(dict[str, Any]):
    """A row's columns among which an `Unusable` or half a character may stand, at any depth. The
    rows of any other dict need no look."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row stands: `number` counts lines (or rows, or elements) from 1."""

    path: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        return (
            f"{self.path}:{self.number}"
            if self.unit == "line"
            else f"{self.path}, {self.unit} {self.number}"
        )


@dataclass(frozen=True, slots=True)
class Record:
    """One row's columns as read."""

    columns: dict[str, Any]
    origin: Origin


@dataclass
class BadRows:
    """Counts rows that cannot be used and remembers the first few with their reasons."""

    num_rows: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, origin: Origin, reason: str) -> None:
        self.num_rows += 1
        if len(self.shown) < NUM_SHOWN:
            self.shown.append(f"{origin}: {printable(reason)}")

    def raise_if_any(self) -> None:
        """Raises: DataError: there is a bad row; names the first few and the total."""
        if not self.num_rows:
            return
        if self.num_rows == 1:
            raise DataError(self.shown[0])
        more = (
            f"; and {self.num_rows - len(self.shown)} more"
            if self.num_rows > len(self.shown)
            else ""
        )
        raise DataError(f"{self.num_rows} bad rows: {'; '.join(self.shown)}{more}")


def fault_in(value: Any) -> str | None:
    """Why a value cannot be used, at whatever depth the fault stands; None where it can."""
    waiting = [value]  # not recursive: a row may be nested as deeply as the decoder goes
    while waiting:
        item = waiting.pop()
        if isinstance(item, Unusable):
            return item.reason
        if isinstance(item, str) and not item.isascii():
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as error:
                code = ord(item[error.start])
                return f"has half a character (lone surrogate \\u{code:04x}); text must be Unicode"
        elif isinstance(item, dict):
            waiting += (*item.keys(), *item.values())
        elif isinstance(item, list):
            waiting += item
    return None


def first_line(error: BaseException) -> str:
    """A library's message as one line."""
    return printable((masked(str(error)).strip() or type(error).__name__).splitlines()[0])


def printable(text: str, most: int = MAX_REASON) -> str:
    """A text that came from data, on one line, whatever it holds; of a long one its two ends."""
    if len(text) > most:
        text = f"{text[: most - most // 4]} ... {text[len(text) - most // 4 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
