"""Where everything of a run lies on disk, and how it is written: to a temporary name, then renamed. What is
written into the copy of a run on an object store goes there before the write returns (trainers/mirror.py)."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.integrity import DamagedError, sealed, sealed_row, sound_rows, unsealed
from trainers.mirror import folder_written, previous_dropped, removed, shown, written


@dataclass(frozen=True)
class TrialPaths:
    """runs/NAME/trials/TRIAL."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def clone(self) -> Path:
        """Of a trial that was not planned: its candidate, and whose it was; see orchestration/clones.py."""
        return self.root / "clone.json"

    @property
    def error(self) -> Path:
        return self.root / "error.txt"

    @property
    def notes(self) -> Path:
        """What went wrong and was mended: rows of {"note"}."""
        return self.root / "notes.jsonl"

    @property
    def checkpoint(self) -> Path:
        """The last evaluation's weights and trainer state: where a restart goes on."""
        return self.root / "checkpoint"

    @property
    def best(self) -> Path:
        """The weights of the evaluation with the lowest eval_loss."""
        return self.root / "best"


@dataclass(frozen=True)
class RunPaths:
    """runs/NAME."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "sweep.yaml"

    @property
    def resolved(self) -> Path:
        return self.root / "resolved.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def packs(self) -> Path:
        """The worker groups as they ran: places, and what the first group measured."""
        return self.root / "packs.json"

    def composition(self, group: str) -> Path:
        """Whose rows shared the forwards of a worker group; see trainers/composition.py."""
        return self.root / "composition" / f"{group}.jsonl"

    @property
    def lock(self) -> Path:
        """Held by the driver while it lives."""
        return self.root / ".lock"

    @property
    def workers(self) -> Path:
        """Held by every process that writes trials; see trainers/run_lock.py."""
        return self.root / ".workers"

    @property
    def commands(self) -> Path:
        """What is asked of the sweep's driver from elsewhere; see orchestration/commands.py."""
        return self.root / "commands"

    @property
    def answers(self) -> Path:
        """What became of each command, under its name."""
        return self.root / "answers"

    @property
    def tune(self) -> Path:
        """Ray Tune's own experiment state."""
        return self.root / "tune"

    @property
    def rungs(self) -> Path:
        """What the scheduler decided, in order."""
        return self.root / "rungs.jsonl"

    @property
    def confirmed(self) -> Path:
        """What the trials reported that repeat the best two on new seeds, which nobody stops."""
        return self.root / "confirmed.jsonl"

    @property
    def clock(self) -> Path:
        """What all drivers of a sweep with a limit took so far."""
        return self.root / "clock.json"

    @property
    def best(self) -> Path:
        return self.root / "best"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def rerun(self) -> Path:
        """A sweep of the chosen candidate alone."""
        return self.root / "best.yaml"

    @property
    def trials(self) -> Path:
        return self.root / "trials"

    def trial(self, name: str) -> TrialPaths:
        return TrialPaths(self.trials / name)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _naming(path, temporary):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    written(path)


def append_text(path: Path, text: str) -> None:
    """Writes behind what is there; a death in between, or a full disk, leaves a line that is cut."""
    with _naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text)
    written(path)


@contextmanager
def _naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Names the file in an error that does not, as that of a full disk; what was half-written goes."""
    try:
        yield
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def storage_problem(error: OSError) -> str:
    """What a run's storage said that takes nothing more, in one line; empty for an error of another kind."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE):
        return ""
    return (
        f"{error.filename or 'the run'}: {os.strerror(error.errno)}; what was saved is whole: make room, and "
        "`tenfold resume` goes on"
    )


def copy_file(source: Path, target: Path) -> None:
    """Copies a file whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with _naming(target, temporary):
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    written(target)


def remove_file(path: Path) -> None:
    """Removes a file that is there."""
    path.unlink()
    removed(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as strict JSON (a NaN is an error: it has no JSON form)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_state(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object that a resume relies on, with its checksum (trainers/integrity.py)."""
    write_text(path, sealed(value))


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote.

    Raises:
        DamagedError: the file is something else.
    """
    return unsealed(path.read_bytes().decode("utf-8", errors="replace"), shown(path))


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line, each with its checksum."""
    write_text(path, "".join(f"{sealed_row(row)}\n" for row in rows))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that may not be there yet.

    Raises:
        DamagedError: a line is not what was written.
    """
    rows, damaged = sound_rows(path)
    if damaged:
        raise DamagedError(
            f"{shown(path)}:{damaged[0]}: must be a row with its checksum, is not: the file is damaged, or was changed "
            "by hand"
        )
    return rows


def previous_of(target: Path) -> Path:
    """Where the folder lies that a target replaced, while it is kept."""
    return target.with_name(f".{target.name}.old")


def replace_folder(temporary: Path, target: Path, *, keep_previous: bool = False) -> None:
    """Puts a complete folder in a target's place. A folder cannot be replaced in one step: if we die
    between the two renames, the previous one is found as `previous_of` by `existing_folder`.

    Args:
        keep_previous: it stays there, for the day on which the new one cannot be read.
    """
    old = previous_of(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(temporary, target)
    if not keep_previous:
        shutil.rmtree(old, ignore_errors=True)
    folder_written(target)


def drop_previous(target: Path) -> None:
    """Removes the folder that a target replaced."""
    shutil.rmtree(previous_of(target), ignore_errors=True)
    previous_dropped(target)


def remove_folder(target: Path) -> None:
    """Removes a folder that may not be there, and what a replacement left beside it: whole or not at all,
    whenever we die."""
    shutil.rmtree(previous_of(target), ignore_errors=True)
    if target.exists():
        gone = target.with_name(f".{target.name}.{os.getpid()}.gone")
        os.rename(target, gone)
        shutil.rmtree(gone, ignore_errors=True)
    removed(target)


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that are gone left beside the files and folders they wrote or removed."""
    for pattern in (".*.*.tmp", ".*.*.gone"):
        for left in folder.glob(pattern):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def existing_folder(target: Path) -> Path | None:
    """The folder, or the one it was about to replace, or None."""
    candidates = (target, previous_of(target))
    return next((folder for folder in candidates if folder.is_dir()), None)


def temporary_folder(target: Path) -> Path:
    """An empty folder beside the target, to be filled and then put in its place."""
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
