"""A row as it was read, the place it came from, and the list of those that cannot be used."""

from dataclasses import dataclass, field
from typing import Any

NUM_SHOWN = 5


class DataError(ValueError):
    """Data that cannot be trained on; the message is complete and one line long."""


class RowError(ValueError):
    """Why one row cannot be used, without its place; whoever knows the place adds it."""


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
            self.shown.append(f"{origin}: {reason}")

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


def drop_nested_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls that Arrow puts into nested objects.

    A struct column has the union of all rows' keys, so that every tool call would show the
    arguments of all tools as null (field case A16). A null in a column itself is kept: it is the
    row's own.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
