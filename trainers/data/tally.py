"""Running counts of one pass over the data, which become its audit."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from trainers.data.audit import Audit
from trainers.data.lengths import histogram, percentiles
from trainers.data.messages import ChatRow
from trainers.data.records import BadRows, Origin
from trainers.data.row_digests import RowDigests
from trainers.data.rows import CompletionRow, Row, RowShape, TextRow
from trainers.data.token_rows import FittedRow, TokenizedRow

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
    "num_unsampled",
    "num_repeats",
    "num_tool_rows",
    "num_tool_calls",
)


@dataclass
class Side:
    """Running counts of the train or the eval side."""

    num_rows: int = 0
    num_tokens: int = 0
    num_loss_tokens: int = 0
    num_new_loss_tokens: int = 0
    num_loss_bytes: int = 0
    digests: RowDigests = field(default_factory=RowDigests)

    def add(self, rows: list[FittedRow], copies: int) -> None:
        for row in rows:
            self.num_rows += copies
            self.num_tokens += copies * len(row.ids)
            self.num_loss_tokens += copies * row.num_loss_tokens
            self.num_new_loss_tokens += row.num_loss_tokens if copies else 0
            self.num_loss_bytes += copies * row.num_loss_bytes


@dataclass
class Tally:
    """Running counts, while rows stream past; `audit()` is their end."""

    counts: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    recognised: bool = False
    notes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    train: Side = field(default_factory=Side)
    eval: Side = field(default_factory=Side)

    @property
    def max_row_tokens(self) -> int:
        """Tokens of the longest row as it came; 0 without rows."""
        return max(self.lengths, default=0)

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
        origin: Origin,
        digest: bytes,
        tokens: TokenizedRow,
        fitted: list[FittedRow],
        side: Side,
        *,
        seq_len: int,
        copies: int = 1,
    ) -> None:
        """Counts one row and what became of it.

        Args: copies: how often its file's weight puts it into an epoch.
        """
        self.lengths[len(tokens.ids)] += 1
        self.counts["num_rows"] += 1
        self.counts["num_empty"] += isinstance(row, CompletionRow) and not row.completion
        if isinstance(row, ChatRow):
            self._add_chat(row)
        if not copies:
            self.counts["num_unsampled"] += 1
            return
        side.digests.add(digest, origin)
        self.counts["num_dropped"] += not fitted
        self.counts["num_repeats"] += (copies - 1) * len(fitted)
        if len(tokens.ids) > seq_len:
            self._add_too_long(tokens, fitted)
        side.add(fitted, copies)

    def _add_chat(self, row: ChatRow) -> None:
        self.counts["num_tool_rows"] += row.tools is not None
        for message in row.messages:
            self.roles[message["role"]] += 1
            self.counts["num_tool_calls"] += len(message.get("tool_calls", ()))

    def _add_too_long(self, tokens: TokenizedRow, fitted: list[FittedRow]) -> None:
        self.counts["num_too_long"] += 1
        if tokens.is_text:
            self.counts["num_split"] += 1
        elif fitted:
            self.counts["num_cut"] += 1
            end_is_trained = bool(tokens.spans) and tokens.spans[-1][1] > len(fitted[0].ids)
            self.counts["num_lost_end"] += end_is_trained

    def audit(self, bad: BadRows, problems: list[str], num_train_sequences: int) -> Audit:
        """The finished audit."""
        repeated = [side.digests.repeats() for side in (self.train, self.eval)]
        overlap = self.eval.digests.shared_with(self.train.digests)
        num_tokens = sum(length * rows for length, rows in self.lengths.items())
        values: dict[str, Any] = dict(
            **{name: self.counts[name] for name in COUNTED},
            **{f"num_train_{name}": getattr(self.train, f"num_{name}") for name in SIDE_COUNTS},
            **{f"num_eval_{name}": getattr(self.eval, f"num_{name}") for name in SIDE_COUNTS},
            num_new_loss_tokens=self.train.num_new_loss_tokens,
            num_train_sequences=num_train_sequences,
            max_row_tokens=self.max_row_tokens,
            mean_row_tokens=num_tokens / max(1, self.lengths.total()),
            length_percentiles=percentiles(self.lengths),
            length_histogram=histogram(self.lengths),
            num_duplicates=sum(found.count for found in repeated),
            duplicates=tuple(line for found in repeated for line in found.shown),
            num_overlap=overlap.count,
            overlaps=overlap.shown,
            num_bad_rows=bad.num_rows,
            shapes=dict(self.shapes),
            roles=dict(self.roles),
            recognised=self.recognised,
            bad_rows=tuple(bad.shown),
            problems=tuple(problems),
            notes=tuple(self.notes),
            files=tuple(self.files),
        )
        return Audit(**values)
