"""What a user says about the data: everything that decides which tokens are trained."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trainers.data.records import DataError

TRUNCATIONS = ("drop", "cut")
BAD_ROW_POLICIES = ("error", "drop")
SYSTEM_ROLES = ("template", "fold")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Everything that decides which tokens are trained and which are held out.

    Args:
        data: file, folder or hub id (`owner/name`, `owner/name:subset`); or several, each with its
            weight: how often its rows stand in an epoch (0.5: half of them, by content hash).
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
        system_role: a leading system message goes to the chat template, or is folded into the first
            user turn (fold).
        packing: several rows in one sequence of seq_len, without attention across them.
        retention: file, folder or hub id of general text whose loss is followed; never trained.
    Raises:
        DataError: a value outside these.
    """

    data: str | Mapping[str, float]
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
    system_role: str = "template"
    packing: bool = False
    retention: str | None = None

    @property
    def weights(self) -> dict[str, float]:
        """Each file, folder or hub id of the data with its weight."""
        return {self.data: 1.0} if isinstance(self.data, str) else dict(self.data)

    def __post_init__(self) -> None:
        if not self.weights or not all(0 < weight < math.inf for weight in self.weights.values()):
            raise DataError(
                f"data must be a file, or files with weights above 0, got {self.data!r}"
            )
        if self.seq_len < 2:
            raise DataError(f"seq_len (max_length) must be >= 2, got {self.seq_len}")
        _require_one_of("truncation", self.truncation, TRUNCATIONS)
        _require_one_of("bad_rows", self.bad_rows, BAD_ROW_POLICIES)
        _require_one_of("system_role", self.system_role, SYSTEM_ROLES)
        if not isinstance(self.eval, str) and not 0 < self.eval < 1:
            raise DataError(f"eval must be a fraction between 0 and 1, or a file, got {self.eval}")
        if self.columns or self.format:
            from trainers.data.rows import (
                check_columns,  # what a plan with a known count need not pay
            )

            check_columns(self.columns or {}, self.format)


def _require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise DataError(f"{name} must be one of {', '.join(known)}, got {value!r}")
