"""The weights of a hub model, fetched once for every hub cache. Imports no torch.

All workers of a node ask at once. One downloads; the others wait for the lock, and then find every file.
The kernel frees the lock of a process that is killed, and the next one goes on with what it left. The lock
lies in the cache that it guards: nodes that share their hub cache share the lock with it (where the file
system carries flock between nodes; NFS does).
"""

import fcntl
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.credentials import mask_logs, masked
from trainers.data.tokenizer import SIDE_FILES, SLOW_FILES

WANTED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "merges.txt",
    *SIDE_FILES,  # config.json is one
    *SLOW_FILES,
)
UNWANTED = ("*/*", "consolidated*", "adapter_*")
"""What lies beside a model's own weights: folders of other formats, a second copy of the weights as some
publishers name it, adapters."""
COMMIT = re.compile(r"[0-9a-f]{40}")
Download = Callable[[str, str | None], str]


def is_hub_id(model: str) -> bool:
    """Whether a model value can only be a hub id here: no path, and nothing of that name on this disk."""
    looks_local = model.startswith((".", "/", "~")) or model.endswith(".json")
    return not looks_local and not Path(model).exists()


def base_folder(model: str, revision: str | None, download: Download | None = None) -> str:
    """The folder to load a base from: a local one as it is given, or a hub id's, fetched if need be.

    Args:
        revision: of a hub id; None is its default branch.
        download: fetches what of (model, revision) is missing and returns the folder; default: from the
            hub.

    Raises:
        ValueError: the hub does not have it or does not give it, or it has no safetensors weights.
    """
    if not is_hub_id(model):
        return model
    if hub_cache().is_dir() and not os.access(hub_cache(), os.W_OK):
        folder = _snapshot(model, revision, local_files_only=True)  # part of an image
    else:
        with _lock_path(model, revision).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            folder = (download or _snapshot)(model, revision)
    if not any(Path(folder).glob("*.safetensors")):
        raise ValueError(f"model {model}: must have *.safetensors weights on the hub, has none")
    return folder


def _lock_path(model: str, revision: str | None) -> Path:
    key = hashlib.sha256(f"{model}@{revision}".encode()).hexdigest()[:32]
    # The hub's own folder of locks, which its listings of the cache pass over.
    path = hub_cache() / ".locks" / f"tenfold-{key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def hub_cache() -> Path:
    """The folder that huggingface_hub keeps its downloads in."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def missing_bytes(model: str, revision: str | None) -> int:
    """Bytes that `base_folder` would download here now; 0 for a local folder and for what is complete.

    Raises:
        ValueError: it is not complete here, and the hub does not say what it holds.
    """
    if not is_hub_id(model):
        return 0
    from huggingface_hub.errors import DryRunError

    try:
        files = _snapshot(model, revision, dry_run=True)
    except DryRunError:  # no network: then all of it must be here
        _snapshot(model, revision, local_files_only=True)
        return 0
    return sum(file.file_size or 0 for file in files if file.will_download)


def _snapshot(model: str, revision: str | None, **how: Any) -> Any:
    import huggingface_hub
    from huggingface_hub.errors import DryRunError

    mask_logs()
    patterns = {"allow_patterns": list(WANTED), "ignore_patterns": list(UNWANTED)}
    try:
        return huggingface_hub.snapshot_download(model, revision=revision, **patterns, **how)
    except DryRunError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {model}: no folder here, and as a hub id it cannot be fetched ({_line(error)})"
        ) from error


def commit_of(model: str, revision: str | None) -> str | None:
    """The commit that a hub id's revision stands for now, so that every node of a run loads the same;
    the revision as it is where the model is a local folder.

    Raises:
        ValueError: no such hub id or revision, or the hub is not reached and nothing of it is here.
    """
    if not is_hub_id(model) or (revision and COMMIT.fullmatch(revision)):
        return revision
    return hub_config(model, revision).parent.name  # .../snapshots/COMMIT/config.json


def hub_config(model: str, revision: str | None) -> Path:
    """config.json of a hub id, fetched if need be.

    Raises:
        ValueError: no such hub id or revision, or the hub is not reached and nothing of it is here.
    """
    import huggingface_hub

    mask_logs()
    try:
        return Path(huggingface_hub.hf_hub_download(model, "config.json", revision=revision))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {model}: neither a folder here nor a hub id that can be read ({_line(error)})"
        ) from error


def _line(error: Exception) -> str:
    lines = [line.strip() for line in masked(str(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
