"""The normalised rows of a source, in order, with the shape of each of its files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from trainers.data.reading_progress import ReadingProgress
from trainers.data.records import BadRows, Origin, RowError
from trainers.data.rows import Row, RowShape, detect_shape, normalised_row, wanted_columns
from trainers.data.sources import Source, read_records
from trainers.data.spec import DataSpec
from trainers.data.tally import Tally


@dataclass
class RowReader:
    """Reads sources under one spec; rows that cannot be used go to `bad`, counts to `tally`."""

    spec: DataSpec
    bad: BadRows
    tally: Tally = field(default_factory=Tally)
    _shapes: dict[str, RowShape] = field(default_factory=dict)

    def rows(self, source: Source) -> Iterator[tuple[Row, Origin]]:
        """Rows with their places. Raises: DataError: a file without a known shape."""
        column_map = self.spec.columns or {}
        if source.ignored:
            names = ", ".join(path.name for path in source.ignored)
            self.tally.note(f"not read, as they belong to other splits: {names}")
        progress = ReadingProgress()
        try:
            yield from self._rows(source, progress, column_map)
        finally:
            progress.done()

    def _rows(
        self, source: Source, progress: ReadingProgress, column_map: Mapping[str, str]
    ) -> Iterator[tuple[Row, Origin]]:
        for record in read_records(source, wanted_columns(column_map), self.bad):
            progress.saw(record.origin.path)
            shape = self._shapes.get(record.origin.path)
            if shape is None:
                shape = detect_shape(
                    record.columns,
                    record.origin,
                    column_map=column_map,
                    format_name=self.spec.format,
                )
                self._shapes[record.origin.path] = shape
            try:
                row = normalised_row(record.columns, shape)
            except RowError as error:
                self.bad.add(record.origin, str(error))
                continue
            self.tally.saw_shape(shape)
            if not self.tally.is_blank(row):
                yield row, record.origin
