"""runs/NAME/rungs.jsonl: what a sweep's scheduler saw and decided, in that order.

Ray forgets the rungs of a scheduler when the driver dies; from this file they are filled again.
Imports neither ray nor torch.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from trainers.integrity import sealed_row, unsealed_row
from trainers.paths import append_text, write_text

Decision = Literal["CONTINUE", "STOP"]
CONTINUE: Decision = "CONTINUE"
STOP: Decision = "STOP"
BY_SCHEDULER = "stopped by its scheduler"
"""The reason of a trial that nobody else stopped."""
METRIC, MODE, CLOCK = "eval_loss", "min", "examples"
"""What a result is judged by, and when."""


@dataclass(frozen=True, kw_only=True)
class RungRecord:
    """One decision.

    Attributes:
        trial: our name of the trial; Tune's own ids do not outlive a driver.
        examples: examples that it had seen, >= 0.
        eval_loss: nats/token, finite.
        decision: what the trial was told. A second record of the same trial and examples is always
            STOP: the trial went on after that result, and ended there by itself.
    """

    trial: str
    examples: int
    eval_loss: float
    decision: Decision


class RungLedger:
    """The file, for one writer and any number of readers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_whole = False
        self.damaged: list[int] = []
        """Numbers (from 1) of the lines that `records` left out, because they are not what was written."""

    def records(self) -> list[RungRecord]:
        """What was decided so far; a last line that a kill cut short is left out, and so are damaged lines.

        Raises:
            ValueError: a line that was written so and is no record, by file and line.
        """
        lines = self._bytes().decode("utf-8", errors="replace").split("\n")[:-1]
        rows = {number: unsealed_row(line) for number, line in enumerate(lines, 1)}
        self.damaged = [number for number, row in rows.items() if row is None]
        return [
            _record(row, f"{self.path}:{number}") for number, row in rows.items() if row is not None
        ]

    def append(self, record: RungRecord) -> None:
        """Writes one record, so that the death of this process cannot lose it."""
        if not self._is_whole:
            self._drop_cut_line()
        self._is_whole = False  # until it is written: a full disk cuts the line
        append_text(self.path, f"{sealed_row(asdict(record))}\n")
        self._is_whole = True

    def _bytes(self) -> bytes:
        return self.path.read_bytes() if self.path.exists() else b""

    def _drop_cut_line(self) -> None:
        """Nobody acted on it: a decision is written before it is returned."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = self._bytes()
        whole = found[: found.rfind(b"\n") + 1]
        if whole != found:
            write_text(self.path, whole.decode("utf-8", errors="replace"))
        self._is_whole = True


def stopped_trials(records: Iterable[RungRecord]) -> set[str]:
    """Trials that ended, by their scheduler or by themselves: their last record says STOP."""
    last = {record.trial: record.decision for record in records}
    return {trial for trial, decision in last.items() if decision == STOP}


KEYS = {field.name for field in fields(RungRecord)}


def _record(values: dict[str, Any], place: str) -> RungRecord:
    if not _is_record(values):
        raise ValueError(
            f"{place}: must hold trial, examples >= 0, a finite eval_loss and decision CONTINUE or "
            f"STOP, got {str(values)[:120]}; restore the file, or start a new run with another name"
        )
    return RungRecord(**values)


def _is_record(values: dict[str, Any]) -> bool:
    if set(values) != KEYS:
        return False
    trial, examples, loss = values["trial"], values["examples"], values["eval_loss"]
    return (
        isinstance(trial, str)
        and type(examples) is int
        and examples >= 0
        and type(loss) in (int, float)
        and math.isfinite(loss)
        and values["decision"] in (CONTINUE, STOP)
    )
