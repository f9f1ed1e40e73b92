"""What was found in the data: the counts that plan, check and report show, as one JSON value.

Counts of loss-bearing tokens are those of the very masks that are trained.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from trainers.examples import FittedRow, TokenizedRow
from trainers.records import BadRows
from trainers.rows import CompletionRow, Row, RowShape, TextRow


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Counts of one prepared dataset.

    Args:
        num_rows: rows read whose shape is right; windows of a text are not rows.
        num_train_rows, num_eval_rows: examples that are trained and held out (a split text gives
            several).
        num_train_tokens, num_eval_tokens: all tokens, BOS and prompts included.
        num_train_loss_tokens, num_eval_loss_tokens: loss-bearing ones, of one epoch.
        num_train_loss_bytes, num_eval_loss_bytes: UTF-8 bytes of the loss-bearing text.
        max_row_tokens, mean_row_tokens: of rows as they came, before truncation.
        num_too_long: rows longer than seq_len; each of them was dropped, cut or split.
        num_dropped, num_cut, num_split: what became of them; num_dropped also counts rows that a
            cut left without a loss-bearing token.
        num_lost_end: cut rows that no longer train their end token.
        num_empty: rows with an empty completion; they train the end token alone and are kept.
        num_blank: plain-text rows without text, left out.
        num_duplicates: rows whose content came before; they are kept, on the first one's side.
        num_overlap: rows of an eval file that are also trained.
        num_bad_rows: rows left out under bad_rows: drop.
        shapes: description of each row shape -> rows.
        recognised: whether some columns were found by name, without a map.
        bad_rows: the first few, each with its place and reason.
        notes: what a person should know, one line each.
    """

    num_rows: int
    num_train_rows: int
    num_eval_rows: int
    num_train_tokens: int
    num_eval_tokens: int
    num_train_loss_tokens: int
    num_eval_loss_tokens: int
    num_train_loss_bytes: int
    num_eval_loss_bytes: int
    max_row_tokens: int
    mean_row_tokens: float
    num_too_long: int
    num_dropped: int
    num_cut: int
    num_split: int
    num_lost_end: int
    num_empty: int
    num_blank: int
    num_duplicates: int
    num_overlap: int
    num_bad_rows: int
    shapes: dict[str, int]
    recognised: bool
    bad_rows: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return self.num_train_tokens + self.num_eval_tokens

    @property
    def num_loss_tokens(self) -> int:
        return self.num_train_loss_tokens + self.num_eval_loss_tokens

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"bad_rows": list(self.bad_rows), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Audit":
        """Raises: ValueError: a key is missing or unknown."""
        names = {f.name for f in fields(cls)}
        if names != values.keys():
            raise ValueError(
                f"an audit must hold {sorted(names)}, differs in {sorted(names ^ values.keys())}"
            )
        lists: dict[str, Any] = {name: tuple(values[name]) for name in ("bad_rows", "notes")}
        return cls(**(values | lists))


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
