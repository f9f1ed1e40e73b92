"""One pass over the data: read, shape, encode, fit, and put each row on its side of the split.

Rows are written out as they come: memory holds a bounded part of them, whatever a file's size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainers.data.audit import Audit
from trainers.data.examples import RowEncoder
from trainers.data.parts import Part, file_names, position
from trainers.data.records import BadRows, Origin
from trainers.data.row_reader import RowReader
from trainers.data.rows import Row, row_digest
from trainers.data.sequence_packing import save_order
from trainers.data.spec import DataSpec
from trainers.data.tally import Tally
from trainers.data.token_rows import TokenizedRow, fitted_rows
from trainers.data.token_set import SetBuilder
from trainers.data.tokenizer import LoadedTokenizer


@dataclass(frozen=True, kw_only=True)
class PartCounts:
    """What one part came to: rows read, rows too long, examples kept."""

    data: str
    num_rows: int
    num_too_long: int
    num_kept: int

    def problems(self, seq_len: int, longest: int) -> list[str]:
        """Why nothing of it is left to train or to evaluate, if nothing is."""
        if self.num_rows == 0:
            return [f"{self.data}: must hold rows, holds none that can be used"]
        if self.num_kept:
            return []
        return [
            f"{self.data}: no row with a loss-bearing token is left: {self.num_too_long} of"
            f" {self.num_rows} rows are longer than seq_len (max_length) {seq_len} tokens"
            f" (the longest has {longest}); raise seq_len or shorten the rows"
        ]


class Preparation:
    """The two sides of the split, and what was counted on the way.

    Args:
        folder: gets train/ and eval/.
        has_split: whether there must be rows on both sides.
    """

    def __init__(
        self,
        spec: DataSpec,
        tokenizer: LoadedTokenizer,
        parts: Sequence[Part],
        folder: Path,
        *,
        has_split: bool = True,
    ) -> None:
        self.spec, self.tokenizer, self.parts, self.has_split = spec, tokenizer, parts, has_split
        self.bad, self.tally, self.folder = BadRows(), Tally(), folder
        self.encoder = RowEncoder.of(spec, tokenizer)
        self.train, self.held_out = SetBuilder(folder / "train"), SetBuilder(folder / "eval")
        self.lowest_position = 1.0

    def run(self) -> Audit:
        """Fills both sides. What makes the data unusable is in the audit's bad_rows and problems.

        Raises: DataError: a file that cannot be read as a whole.
        """
        counts = [self._read(part) for part in self.parts]
        self.train.close()
        self.held_out.close()
        num_sequences = save_order(self.folder / "train", self.spec.seq_len)
        for note in self.encoder.notes():
            self.tally.note(note)
        return self.tally.audit(self.bad, self._problems(counts), num_sequences)

    def _problems(self, counts: list[PartCounts]) -> list[str]:
        spec, longest = self.spec, self.tally.max_row_tokens
        found = [line for count in counts for line in count.problems(spec.seq_len, longest)]
        if found or not self.has_split:
            return found
        return self._split_problems(sum(count.num_rows for count in counts))

    def _split_problems(self, num_rows: int) -> list[str]:
        spec, data = self.spec, ", ".join(self.spec.weights)
        if not len(self.held_out):
            return [
                f"{data}: eval {spec.eval} of {num_rows} rows holds none out (by content hash);"
                f" set eval to {self.lowest_position + 0.001:.3f} or more, or give an eval file"
            ]
        if not len(self.train):
            return [f"{data}: eval {spec.eval} of {num_rows} rows leaves none to train; lower it"]
        return []

    def _read(self, part: Part) -> PartCounts:
        """Reads a part; a row whose hash falls into the held-out fraction goes to eval."""
        before, kept_before = self.tally.counts.copy(), len(self.train) + len(self.held_out)
        self.tally.files += file_names(part.source)
        reader = RowReader(self.spec, self.bad, self.tally)
        for row, origin, tokens in self.encoder.encode(reader.rows(part.source), self.bad):
            self._add(row, origin, tokens, part)
        after = self.tally.counts
        return PartCounts(
            data=part.data,
            num_rows=after["num_rows"] - before["num_rows"],
            num_too_long=after["num_too_long"] - before["num_too_long"],
            num_kept=len(self.train) + len(self.held_out) - kept_before,
        )

    def _add(self, row: Row, origin: Origin, tokens: TokenizedRow, part: Part) -> None:
        spec, digest = self.spec, row_digest(row)
        at, copies = position(digest[:8]), part.copies(digest)
        is_held_out = at < part.held_out_frac
        if is_held_out:
            copies = min(copies, 1)
        fitted = fitted_rows(tokens, spec.seq_len, spec.truncation, self.tokenizer.special_ids)
        if fitted and copies and not is_held_out:
            self.lowest_position = min(self.lowest_position, at)
        side = self.tally.eval if is_held_out else self.tally.train
        self.tally.add(
            row, origin, digest, tokens, fitted, side, seq_len=spec.seq_len, copies=copies
        )
        for _ in range(copies):
            for window in fitted:
                (self.held_out if is_held_out else self.train).add(window, origin)
