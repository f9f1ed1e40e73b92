"""One pass over the data: read, shape, encode, fit, and put each row on its side of the split."""

from dataclasses import dataclass

from trainers.audit import Audit
from trainers.data_spec import DataSpec
from trainers.examples import RowEncoder, TokenizedRow, fitted_rows
from trainers.records import BadRows, DataError
from trainers.row_reader import RowReader
from trainers.rows import Row, row_digest
from trainers.sources import Source, resolve_source
from trainers.tally import Tally
from trainers.token_set import SetBuilder
from trainers.tokenizer import LoadedTokenizer

DIGEST_RANGE = 2**64


@dataclass(frozen=True, kw_only=True)
class SourceCounts:
    """What one `data` or `eval` value came to: rows read, rows too long, examples kept."""

    data: str
    num_rows: int
    num_too_long: int
    num_kept: int

    def check(self, seq_len: int, longest: int) -> None:
        """Raises: DataError: nothing of it is left to train or to evaluate."""
        if self.num_rows == 0:
            raise DataError(f"{self.data}: must hold rows, holds none that can be used")
        if self.num_kept == 0:
            raise DataError(
                f"{self.data}: no row with a loss-bearing token is left: {self.num_too_long} of"
                f" {self.num_rows} rows are longer than seq_len (max_length) {seq_len} tokens"
                f" (the longest has {longest}); raise seq_len or shorten the rows"
            )


class Preparation:
    """The two sides of the split, and what was counted on the way."""

    def __init__(self, spec: DataSpec, tokenizer: LoadedTokenizer) -> None:
        self.spec, self.tokenizer, self.bad, self.tally = spec, tokenizer, BadRows(), Tally()
        self.encoder = RowEncoder(tokenizer, completion_only=spec.completion_only)
        self.train, self.held_out = SetBuilder(), SetBuilder()
        self.lowest_position = 1.0

    def run(self) -> Audit:
        """Fills both sides.

        Raises: DataError: bad rows, or nothing left on a side.
        """
        spec = self.spec
        source = resolve_source(spec.data, spec.data_revision)
        if isinstance(spec.eval, str):
            counts = [self._read(spec.data, source, 0.0)]
            counts.append(self._read(spec.eval, resolve_source(spec.eval), 1.0))
        else:
            counts = [self._read(spec.data, source, spec.eval)]
        if spec.bad_rows == "error":
            self.bad.raise_if_any()
        for count in counts:
            count.check(spec.seq_len, self.tally.max_row_tokens)
        self._check_split(counts[0].num_rows)
        for note in self.encoder.notes():
            self.tally.note(note)
        return self.tally.audit(self.bad)

    def _read(self, data: str, source: Source, held_out_frac: float) -> SourceCounts:
        """Reads a source; a row whose hash falls into the held-out fraction goes to eval."""
        before, kept_before = self.tally.counts.copy(), len(self.train) + len(self.held_out)
        reader = RowReader(self.spec, self.bad, self.tally)
        for row, tokens in self.encoder.encode(reader.rows(source), self.bad):
            self._add(row, tokens, held_out_frac)
        after = self.tally.counts
        return SourceCounts(
            data=data,
            num_rows=after["num_rows"] - before["num_rows"],
            num_too_long=after["num_too_long"] - before["num_too_long"],
            num_kept=len(self.train) + len(self.held_out) - kept_before,
        )

    def _add(self, row: Row, tokens: TokenizedRow, held_out_frac: float) -> None:
        spec, digest = self.spec, row_digest(row)
        fitted = fitted_rows(tokens, spec.seq_len, spec.truncation, self.tokenizer.special_ids)
        position = int.from_bytes(digest[:8], "big") / DIGEST_RANGE
        is_held_out = position < held_out_frac
        if fitted and not is_held_out:
            self.lowest_position = min(self.lowest_position, position)
        side = self.tally.eval if is_held_out else self.tally.train
        self.tally.add(row, digest, tokens, fitted, side, spec.seq_len)
        for window in fitted:
            (self.held_out if is_held_out else self.train).add(window)

    def _check_split(self, num_rows: int) -> None:
        spec = self.spec
        if not len(self.held_out):
            raise DataError(
                f"{spec.data}: eval {spec.eval} of {num_rows} rows holds none out (by content"
                " hash);"
                f" set eval to {self.lowest_position + 0.001:.3f} or more, or give an eval file"
            )
        if not len(self.train):
            raise DataError(
                f"{spec.data}: eval {spec.eval} of {num_rows} rows leaves none to train; lower it"
            )
