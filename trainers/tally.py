"""Running counts of one pass over the data, which become its audit."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from trainers.audit import Audit
from trainers.examples import FittedRow, TokenizedRow
from trainers.records import BadRows
from trainers.rows import CompletionRow, Row, RowShape, TextRow


@dataclass
class Side:
    """Running counts of the train or the eval side."""

    num_rows: int = 0
    num_tokens: int = 0
    num_loss_tokens: int = 0
    num_loss_bytes: int = 0
    digests: set[bytes] = field(default_factory=set)

    def add(self, rows: list[FittedRow]) -> None:
        for row in rows:
            self.num_rows += 1
            self.num_tokens += len(row.ids)
            self.num_loss_tokens += sum(stop - start for start, stop in row.spans)
            self.num_loss_bytes += row.num_loss_bytes


@dataclass
class Tally:
    """Running counts, while rows stream past; `audit()` is their end."""

    counts: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    recognised: bool = False
    max_row_tokens: int = 0
    row_tokens: int = 0
    notes: list[str] = field(default_factory=list)
    train: Side = field(default_factory=Side)
    eval: Side = field(default_factory=Side)

    def note(self, text: str) -> None:
        """Remembers a line once."""
        if text not in self.notes:
            self.notes.append(text)

    def saw_shape(self, shape: RowShape) -> None:
        self.shapes[shape.describe()] += 1
        self.recognised |= shape.recognised and any(
            role != column for role, column in shape.columns
        )

    def is_blank(self, row: Row) -> bool:
        """Whether a row is plain text without text; it is counted and must be left out."""
        blank = isinstance(row, TextRow) and not row.text
        self.counts["num_blank"] += blank
        self.counts["num_rows"] += blank
        return blank

    def add(
        self,
        row: Row,
        digest: bytes,
        tokens: TokenizedRow,
        fitted: list[FittedRow],
        side: Side,
        seq_len: int,
    ) -> None:
        """Counts one row and what became of it."""
        num_tokens = len(tokens.ids)
        self.max_row_tokens = max(self.max_row_tokens, num_tokens)
        self.row_tokens += num_tokens
        self.counts["num_rows"] += 1
        self.counts["num_empty"] += isinstance(row, CompletionRow) and not row.completion
        self.counts["num_duplicates"] += digest in side.digests
        side.digests.add(digest)
        self.counts["num_dropped"] += not fitted
        if num_tokens > seq_len:
            self._add_too_long(tokens, fitted)
        side.add(fitted)

    def _add_too_long(self, tokens: TokenizedRow, fitted: list[FittedRow]) -> None:
        self.counts["num_too_long"] += 1
        if tokens.is_text:
            self.counts["num_split"] += 1
        elif fitted:
            self.counts["num_cut"] += 1
            end_is_trained = bool(tokens.spans) and tokens.spans[-1][1] > len(fitted[0].ids)
            self.counts["num_lost_end"] += end_is_trained

    def audit(self, bad: BadRows) -> Audit:
        """The finished audit."""
        num_tokenized = max(1, self.counts["num_rows"] - self.counts["num_blank"])
        values: dict[str, Any] = dict(
            **{name: self.counts[name] for name in COUNTED},
            **{f"num_train_{name}": getattr(self.train, f"num_{name}") for name in SIDE_COUNTS},
            **{f"num_eval_{name}": getattr(self.eval, f"num_{name}") for name in SIDE_COUNTS},
            max_row_tokens=self.max_row_tokens,
            mean_row_tokens=self.row_tokens / num_tokenized,
            num_overlap=len(self.train.digests & self.eval.digests),
            num_bad_rows=bad.num_rows,
            shapes=dict(self.shapes),
            recognised=self.recognised,
            bad_rows=tuple(bad.shown),
            notes=tuple(self.notes),
        )
        return Audit(**values)


SIDE_COUNTS = ("rows", "tokens", "loss_tokens", "loss_bytes")
COUNTED = (
    "num_rows",
    "num_too_long",
    "num_dropped",
    "num_cut",
    "num_split",
    "num_lost_end",
    "num_empty",
    "num_blank",
    "num_duplicates",
)
