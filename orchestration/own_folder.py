"""Whose a run's folder is, and what it leads to: checked before a driver writes into it."""

import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path

OTHERS_FOLDERS = ("tune", "wandb", "tensorboard")
"""What Ray and the trackers write, links of their own included; nothing of ours goes into them."""


def require_place(target: Path) -> None:
    """A new file or folder can be made there, and what is missing above it.

    Raises:
        ValueError: above it is a file, or a folder that cannot be written.
    """
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(
            f"{target}: must lie in a folder where you can write, {above} is none; give another (-o)"
        )


def require_own(root: Path) -> None:
    """A run has one owner. What this process writes there is written to be his.

    Raises:
        ValueError: the folder belongs to another user, or cannot be written.
    """
    owner = root.stat().st_uid
    try:
        # Not geteuid: a network file system may write as somebody else, alike for all that it does.
        with tempfile.NamedTemporaryFile(dir=root, prefix=".owner-", suffix=".tmp") as probe:
            writer = os.fstat(probe.fileno()).st_uid
    except OSError as error:
        raise ValueError(
            f"{root}: must be writable by {_user(os.geteuid())}, is not ({error.strerror}); its owner is {_user(owner)}"
        ) from error
    if writer != owner:
        raise ValueError(
            f"{root}: must belong to whoever goes on with it, belongs to {_user(owner)}, and what is written now "
            f"would be of {_user(writer)}; go on as {_user(owner)}, or take the folder over (chown -R)"
        )


def require_no_way_out(root: Path) -> None:
    """What is written or removed in a run stays in it.

    Raises:
        ValueError: a link in it leads elsewhere.
    """
    inside = os.path.realpath(root)
    for link in _links(root):
        target = os.path.realpath(link)
        if not Path(target).is_relative_to(inside):
            raise ValueError(
                f"{link}: must not lead out of the run's folder, leads to {target}; remove the link (what may lie "
                "elsewhere is the run itself, by storage)"
            )


def _links(folder: Path) -> Iterator[Path]:
    for entry in os.scandir(folder):
        if entry.is_symlink():
            yield Path(entry.path)
        elif entry.is_dir(follow_symlinks=False) and entry.name not in OTHERS_FOLDERS:
            yield from _links(Path(entry.path))


def _user(number: int) -> str:
    try:
        return f"{pwd.getpwuid(number).pw_name} (uid {number})"
    except KeyError:
        return f"uid {number}"
