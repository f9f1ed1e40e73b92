"""What was found in the data: the counts that plan, check and report show, as one JSON value.

Counts of loss-bearing tokens are those of the very masks that are trained.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any


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
