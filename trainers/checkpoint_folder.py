"""What a checkpoint's folder is on disk: weights and the trainer's state, with their checksums and the trial's
metrics so far. The one before stays until the next is there: where the last cannot be read, a trial goes on
from that, and says so. Imports neither torch nor ray.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.integrity import DamagedError, checksums, first_whole, write_checksums
from trainers.mirror import fetch_folder, fetch_previous, folder_written
from trainers.paths import (
    existing_folder,
    previous_of,
    read_json,
    replace_folder,
    temporary_folder,
)

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "trainer_state.json"
PROBE_LOSS, ROWS = "probe_loss", "rows"
AGAIN = "remove the folder to begin the trial again"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole.

    Args:
        folder: where it lies, which is not its usual place where the last one is damaged.
        state: trainer_state.json.
        problems: what is wrong with the one that should have been taken.
    """

    folder: Path
    state: dict[str, Any]
    problems: tuple[str, ...] = ()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The trial's metrics as they were when it was saved."""
        return self.state[ROWS]

    @property
    def probe_loss(self) -> float | None:
        """What its run lost on the probe batch when it was saved; None where nobody looked."""
        return self.state.get(PROBE_LOSS)


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """The last checkpoint that is whole, of the one in a folder and the one before it; None: there is none.

    Raises:
        DamagedError: there are some, and all are damaged.
    """
    found, problems = first_whole((folder, previous_of(folder)))
    if found is not None:
        return Checkpoint(found, read_json(found / STATE_FILE), tuple(problems))
    if problems:
        raise DamagedError(f"no checkpoint is whole: {'; '.join(problems)}; {AGAIN}")
    return None


def fetch_checkpoint(folder: Path) -> None:
    """Brings here what a run on an object store has of a checkpoint, and the one before where it is damaged."""
    fetch_folder(folder)
    if folder.is_dir() and first_whole([folder])[0] is None:
        fetch_previous(folder, previous_of(folder))


def checkpoint_examples(folder: Path) -> int:
    """Examples that the run of a checkpoint had seen; 0 where there is none."""
    checkpoint = find_checkpoint(folder)
    return checkpoint.state["examples"] if checkpoint else 0


def put_back(checkpoint: Checkpoint, folder: Path) -> None:
    """Puts the checkpoint that is whole in the place of the damaged one, whatever moment we die at."""
    if checkpoint.folder != folder:
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint.folder.rename(folder)
        folder_written(folder)


def copy_weights(checkpoint: Path, folder: Path) -> None:
    """Puts a checkpoint's weights, without the trainer's state, in a folder's place."""
    temporary, source = temporary_folder(folder), existing_folder(checkpoint) or checkpoint
    entries = checksums(source)
    weights = {name: entries[name] for name in entries if name not in (OPTIMIZER_FILE, STATE_FILE)}
    for name in weights:
        shutil.copy2(source / name, temporary / name)
    write_checksums(temporary, weights)
    replace_folder(temporary, folder)
