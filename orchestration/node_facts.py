"""What a node says of itself to a preflight. It runs on every node of a joined cluster before anything is
known of it, so what it imports on its own is the standard library."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.inventory import smallest_gpu_bytes
from orchestration.runtime_env import OUR_PACKAGES, package_folder
from orchestration.storage_probe import answer_probe
from trainers.data.cache import cache_root

END_BYTES = 1 << 16
"""Of a file's beginning and of its end: what is compared of it, beside its size."""
MODEL_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a preflight wants to know.

    Args:
        packages: whose versions.
        model, revision: the base: an absolute path, or a hub id.
        inputs: absolute paths of what the workers read beside the model.
        storage: the folder or URL that holds the run's.
        probe: the name of the folder in it that the driver made for the probe.
        asks_gpu: whether nvidia-smi is asked.
    """

    packages: tuple[str, ...]
    model: str
    revision: str | None
    inputs: tuple[str, ...]
    storage: str
    probe: str = ""
    asks_gpu: bool = False


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What one node is and has.

    Args:
        versions: package -> version; "" where it is not installed.
        imports: our packages -> the folder that this node imports each from.
        inputs: path (the model's too) -> what stands for its content; "" where nothing is there.
        storage_error: why the storage is not the driver's folder, or not writable; "" where it is.
        storage_free_bytes: None where the storage is not there, or a URL.
        work_free_bytes: for the copies that workers keep of what lies at a URL.
        base_bytes: of a hub model, to be downloaded here; None where base_error says why nobody knows.
        cache_free_bytes: where it would be downloaded to.
        gpu_bytes: of the smallest GPU; None where there is none, or nobody asked.
    """

    host: str
    python: str
    versions: Mapping[str, str]
    imports: Mapping[str, str]
    inputs: Mapping[str, str]
    storage_error: str
    storage_free_bytes: int | None
    work_free_bytes: int
    base_bytes: int | None
    base_error: str
    cache_free_bytes: int
    gpu_bytes: int | None


def node_facts(question: Question, node: str | None) -> NodeFacts:
    """The facts of the machine that this runs on.

    Args:
        node: the node's id, under which it answers the probe; None on the driver, which made it.
    """
    inputs = {path: fingerprint(Path(path)) for path in question.inputs}
    base_bytes, base_error, cache_free = 0, "", 0
    if os.path.isabs(question.model):
        inputs[question.model] = fingerprint(Path(question.model), MODEL_SUFFIXES)
    elif node is not None:
        base_bytes, base_error = _base_bytes(question.model, question.revision)
        cache_free = _cache_free_bytes()
    return NodeFacts(
        host=socket.gethostname(),
        python=platform.python_version(),
        versions={name: _version(name) for name in question.packages},
        imports={name: package_folder(name) for name in OUR_PACKAGES},
        inputs=inputs,
        storage_error=answer_probe(question.storage, question.probe, node)
        if node is not None
        else "",
        storage_free_bytes=storage_free_bytes(question.storage),
        work_free_bytes=free_bytes(cache_root()),
        base_bytes=base_bytes,
        base_error=base_error,
        cache_free_bytes=cache_free,
        gpu_bytes=smallest_gpu_bytes() if question.asks_gpu else None,
    )


def fingerprint(path: Path, suffixes: tuple[str, ...] = ()) -> str:
    """What stands for a file's or a folder's content: names, sizes, and both ends of every file. Cheap, not
    proof: sets of data are found by the digest of every byte, later.

    Args:
        suffixes: of a folder's files, which count; default: all that are not hidden.
    """
    digest, found = hashlib.sha256(), False
    try:
        for file in _files(path, suffixes):
            found = True
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path.parent)} {size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(END_BYTES))
                stream.seek(max(0, size - END_BYTES))
                digest.update(stream.read(END_BYTES))
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return digest.hexdigest() if found else ""


def _files(path: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
        if not hidden and file.is_file() and (not suffixes or file.suffix in suffixes):
            yield file


def free_bytes(folder: Path) -> int:
    """Free bytes of the file system that a folder lies on, or will lie on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def storage_free_bytes(storage: str) -> int | None:
    """Free bytes of a storage's file system; None where it is not there, or a URL."""
    folder = Path(storage)
    return free_bytes(folder) if folder.is_dir() else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _base_bytes(model: str, revision: str | None) -> tuple[int | None, str]:
    from trainers.base_fetch import missing_bytes  # the hub's client, where a base comes from it

    try:
        return missing_bytes(model, revision), ""
    except ValueError as error:
        return None, str(error)


def _cache_free_bytes() -> int:
    from trainers.base_fetch import hub_cache

    return free_bytes(hub_cache())
