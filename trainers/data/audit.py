"""What was found in the data: the counts that plan, check and report show, as one JSON value.

Counts of loss-bearing tokens are those of the very masks that are trained.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

TUPLES = ("bad_rows", "problems", "duplicates", "overlaps", "notes", "files")
PLACES = ("bad_rows", "problems", "duplicates", "overlaps")


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Counts of one prepared dataset.

    Args:
        num_rows: rows read whose shape is right; windows of a text are not rows.
        num_train_rows, num_eval_rows: examples that are trained and held out (a split text gives
            several, a file's weight repeats some).
        num_train_sequences: sequences of seq_len that the trained examples make where they are
            packed.
        num_train_tokens, num_eval_tokens: all tokens, BOS and prompts included.
        num_train_loss_tokens, num_eval_loss_tokens: loss-bearing ones, of one epoch.
        num_new_loss_tokens: those of num_train_loss_tokens that are no repeats by a file's weight:
            what an adapter has to hold.
        num_train_loss_bytes, num_eval_loss_bytes: UTF-8 bytes of the loss-bearing text.
        max_row_tokens, mean_row_tokens: of rows as they came, before truncation.
        length_percentiles: percent -> tokens, of the same rows.
        length_histogram: (most tokens, rows) of bins of equal width.
        num_too_long: rows longer than seq_len; each of them was dropped, cut or split.
        num_dropped, num_cut, num_split: what became of them; num_dropped also counts rows that a
            cut left without a loss-bearing token.
        num_lost_end: cut rows that no longer train their end token.
        num_empty: rows with an empty completion; they train the end token alone and are kept.
        num_blank: plain-text rows without text, left out.
        num_duplicates: rows whose content came before; they are kept, on the first one's side.
        num_overlap: rows of an eval file that are also trained.
        num_unsampled: rows that a file's weight below 1 left out.
        num_repeats: examples that a file's weight above 1 added.
        num_bad_rows: rows that cannot be used; an error, or left out under bad_rows: drop.
        shapes: description of each row shape -> rows.
        roles: chat messages by role.
        num_tool_rows, num_tool_calls: rows that offer tools, and calls in all rows.
        recognised: whether some columns were found by name, without a map.
        bad_rows, duplicates, overlaps: the first few, each with its place.
        problems: why the data cannot be trained on, one line each; empty where they can.
        notes: what a person should know, one line each.
        files: what was read, as it was named then.
    """

    num_rows: int
    num_train_rows: int
    num_eval_rows: int
    num_train_sequences: int
    num_train_tokens: int
    num_eval_tokens: int
    num_train_loss_tokens: int
    num_eval_loss_tokens: int
    num_new_loss_tokens: int
    num_train_loss_bytes: int
    num_eval_loss_bytes: int
    max_row_tokens: int
    mean_row_tokens: float
    length_percentiles: dict[str, int]
    length_histogram: tuple[tuple[int, int], ...]
    num_too_long: int
    num_dropped: int
    num_cut: int
    num_split: int
    num_lost_end: int
    num_empty: int
    num_blank: int
    num_duplicates: int
    num_overlap: int
    num_unsampled: int
    num_repeats: int
    num_bad_rows: int
    shapes: dict[str, int]
    roles: dict[str, int]
    num_tool_rows: int
    num_tool_calls: int
    recognised: bool
    bad_rows: tuple[str, ...]
    duplicates: tuple[str, ...]
    overlaps: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return self.num_train_tokens + self.num_eval_tokens

    @property
    def num_loss_tokens(self) -> int:
        return self.num_train_loss_tokens + self.num_eval_loss_tokens

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        lists = {name: list(getattr(self, name)) for name in TUPLES}
        return asdict(self) | lists | {"length_histogram": [*map(list, self.length_histogram)]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Audit":
        """Raises: ValueError: a key is missing or unknown."""
        names = {f.name for f in fields(cls)}
        if names != values.keys():
            raise ValueError(
                f"an audit must hold {sorted(names)}, differs in {sorted(names ^ values.keys())}"
            )
        lists: dict[str, Any] = {name: tuple(values[name]) for name in TUPLES}
        lists["length_histogram"] = tuple((most, n) for most, n in values["length_histogram"])
        return cls(**(values | lists))

    def renamed(self, files: tuple[str, ...]) -> "Audit":
        """The audit of the same content under other names: its places name them."""
        names = {old: new for old, new in zip(self.files, files, strict=True) if old != new}
        if not names:
            return self
        places: Mapping[str, Any] = {
            name: tuple(renamed_place(line, names) for line in getattr(self, name))
            for name in PLACES
        }
        return replace(self, files=files, **places)


def renamed_place(line: str, names: Mapping[str, str]) -> str:
    """A line with the places in it under other names of their files (old -> new)."""
    for old in sorted(names, key=len, reverse=True):
        line = line.replace(f"{old}:", f"{names[old]}:").replace(f"{old},", f"{names[old]},")
    return line
