"""What a user says about the data: everything that decides which tokens are trained."""

from collections.abc import Mapping
from dataclasses import dataclass

from trainers.records import DataError

TRUNCATIONS = ("drop", "cut")
BAD_ROW_POLICIES = ("error", "drop")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Everything that decides which tokens are trained and which are held out.

    Args:
        data: file, folder or hub id (`owner/name`, `owner/name:subset`).
        model: whose tokenizer: folder or hub id; None is the base that Tenfold ships.
        columns: role -> column, e.g. {"prompt": "question", "completion": "answer"}.
        format: row shape (rows.FORMATS), where the first row does not tell.
        seq_len: longest row in tokens (max_length), >= 2.
        truncation: a longer row is left out (drop) or loses its end (cut); long plain text is
            split into windows either way. All of it is counted in the audit.
        eval: held-out fraction within 0..1, by content hash, or a file of the same kinds.
        chat_template: Jinja file instead of the model's own.
        revision, data_revision: hub revisions of the model and of the data.
        completion_only: loss on completions and assistant turns; else on every token.
        bad_rows: rows that cannot be used are an error, or are left out and counted (drop).
    Raises:
        DataError: a value outside these.
    """

    data: str
    model: str | None = None
    columns: Mapping[str, str] | None = None
    format: str | None = None
    seq_len: int = 1024
    truncation: str = "drop"
    eval: float | str = 0.05
    chat_template: str | None = None
    revision: str | None = None
    data_revision: str | None = None
    completion_only: bool = True
    bad_rows: str = "error"

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise DataError(f"seq_len (max_length) must be >= 2, got {self.seq_len}")
        if self.truncation not in TRUNCATIONS:
            raise DataError(
                f"truncation must be one of {', '.join(TRUNCATIONS)}, got {self.truncation!r}"
            )
        if self.bad_rows not in BAD_ROW_POLICIES:
            raise DataError(
                f"bad_rows must be one of {', '.join(BAD_ROW_POLICIES)}, got {self.bad_rows!r}"
            )
        if not isinstance(self.eval, str) and not 0 < self.eval < 1:
            raise DataError(f"eval must be a fraction between 0 and 1, or a file, got {self.eval}")
        if self.columns or self.format:
            from trainers.rows import check_columns  # what a plan with a known count need not pay

            check_columns(self.columns or {}, self.format)
