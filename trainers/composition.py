"""Which rows of which trials shared a forward: logged as it happens, so that a pack that died can do again what it did.

A forward's size decides how its sums are rounded. So a trial that goes on from its checkpoint ends in the last bit of
an undisturbed one only if its rows pass in forwards of the same shapes, beside as many rows of the same ranks.

composition/GROUP.jsonl, each line with its checksum (trainers/integrity.py):
    {"enter": trial's dict, "step": n}     the trial begins here at a step; what stands above of it counts no more
    {"again": trial, "step": n}            its batch of that step is done again; the same of that step
    {"parts": [[trial, step, start, rows, done], ...]}     a forward: `rows` rows from `start` of the trial's batch of a
                                                           step; `done` rows it had been given before
    {"episodes": [[trial, step, done, shapes], ...]}       in reinforcement learning: completions were sampled together
                                                           for the trials' batches; `shapes` are [tokens, loss-bearing
                                                           tokens] of each episode that is then trained on

Pure: no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainers.integrity import sealed_row, sound_rows
from trainers.paths import append_text, write_text

MOST_LINES = 50_000
"""Lines after which what no trial needs any more is left out."""


Shapes = tuple[tuple[int, int], ...]
"""(tokens, loss-bearing tokens) of episodes."""


@dataclass(frozen=True)
class Part:
    """Rows of one trial in a forward.

    Args:
        is_void: the trial did them again later.
        shapes: where the forward samples episodes: theirs; it has no rows then.
    """

    name: str
    step: int
    start: int
    rows: int
    done: float
    is_void: bool = False
    shapes: Shapes | None = None


Forward = tuple[Part, ...]


@dataclass(frozen=True)
class Script:
    """What is to be done again.

    Args:
        forwards: in their order.
        trials: name -> dict, of every trial in them.
        done: name -> rows that a trial had been given in the end.
        shapes: (name, step) -> of the episodes that a trial's batch is of.
    """

    forwards: tuple[Forward, ...]
    trials: dict[str, dict[str, Any]]
    done: dict[str, float]
    shapes: dict[tuple[str, int], Shapes]


class CompositionLog:
    """The file of one group, for one writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_lines: int | None = None

    def enter(self, trial: dict[str, Any], step: int) -> None:
        """A trial begins to share the group's forwards."""
        self._write({"enter": trial, "step": step})

    def again(self, name: str, step: int) -> None:
        """A trial's batch of a step is done again."""
        self._write({"again": name, "step": step})

    def forward(self, parts: Iterable[Part]) -> None:
        """A forward begins."""
        self._write({"parts": [[p.name, p.step, p.start, p.rows, p.done] for p in parts]})

    def sampled(self, parts: Iterable[Part]) -> None:
        """Episodes were sampled together."""
        self._write({"episodes": [[p.name, p.step, p.done, p.shapes] for p in parts]})

    def script(self, steps: Mapping[str, int]) -> Script:
        """What trials that go on from these steps must do again; nothing where a line in between is lost."""
        rows, damaged = self._rows()
        if damaged:
            return Script((), {}, {}, {})
        forwards, trials = _read(rows)
        wanted = [
            forward
            for forward in forwards
            if any(not p.is_void and p.step >= steps.get(p.name, p.step + 1) for p in forward)
        ]
        names = {part.name for forward in wanted for part in forward}
        done = {part.name: part.done + part.rows for forward in forwards for part in forward}
        shapes = {(p.name, p.step): p.shapes for f in forwards for p in f if p.shapes is not None}
        return Script(tuple(wanted), {name: trials[name] for name in names}, done, shapes)

    def compact(self, steps: Mapping[str, int]) -> None:
        """Leaves out what stands before all that trials at these steps would need, once the file is long."""
        if self.num_lines is None or self.num_lines < MOST_LINES:
            return
        rows, _ = self._rows()
        first = next((at for at, row in enumerate(rows) if _is_needed(row, steps)), len(rows))
        kept = [row for row in rows[:first] if "enter" in row] + rows[first:]
        write_text(self.path, "".join(f"{sealed_row(row)}\n" for row in kept))
        self.num_lines = len(kept)

    def _rows(self) -> tuple[list[dict[str, Any]], list[int]]:
        """The lines, and those that are damaged; the last, which a kill may have cut, is none of them."""
        rows, damaged = sound_rows(self.path)
        cut = damaged == [len(rows) + 1]
        return rows, [] if cut else damaged

    def _write(self, row: dict[str, Any]) -> None:
        if self.num_lines is None:
            self._begin()
        append_text(self.path, f"{sealed_row(row)}\n")
        self.num_lines = (self.num_lines or 0) + 1

    def _begin(self) -> None:
        rows, damaged = sound_rows(self.path)
        is_cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        if damaged or is_cut:
            if damaged not in ([], [len(rows) + 1]):
                rows = []  # a line in between is lost, and the others lead to no known numbers
            write_text(self.path, "".join(f"{sealed_row(row)}\n" for row in rows))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.num_lines = len(rows)


def members(path: Path) -> list[str]:
    """Trials that a group's file has seen, the last to enter last."""
    rows, _ = sound_rows(path)
    names = [row["enter"]["name"] for row in rows if "enter" in row]
    return list(dict.fromkeys(reversed(names)))[::-1]


def _read(rows: Iterable[dict[str, Any]]) -> tuple[list[Forward], dict[str, dict[str, Any]]]:
    forwards: list[Forward] = []
    trials: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "parts" in row:
            forwards.append(tuple(Part(*values) for values in row["parts"]))
        elif "episodes" in row:
            forwards.append(tuple(_sampled(*values) for values in row["episodes"]))
        elif "enter" in row:
            name = row["enter"]["name"]
            trials[name] = row["enter"]
            forwards = [_voided(forward, name, None) for forward in forwards]
        else:
            forwards = [_voided(forward, row["again"], row["step"]) for forward in forwards]
    return forwards, trials


def _sampled(name: str, step: int, done: float, shapes: list[list[int]]) -> Part:
    return Part(name, step, 0, 0, done, shapes=tuple((size, loss) for size, loss in shapes))


def _voided(forward: Forward, name: str, step: int | None) -> Forward:
    """A forward with a trial's part in it marked; a batch that is done again keeps its episodes."""
    if all(part.name != name for part in forward):
        return forward
    return tuple(
        replace(p, is_void=True)
        if p.name == name and (step is None or (step == p.step and p.shapes is None))
        else p
        for p in forward
    )


def _is_needed(row: Mapping[str, Any], steps: Mapping[str, int]) -> bool:
    parts = row.get("parts") or row.get("episodes", ())
    return any(step >= steps.get(name, step + 1) for name, step, *_ in parts)
