"""Whether nodes share a storage: the driver writes there, a node reads it and writes beside it, the driver reads
that. A storage is a folder or a URL. A store's client is imported where there is a URL: a node without our
dependencies answers too."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainers.object_store import ObjectStore, StoreError, is_url

DRIVER = "driver"
"""The file that the driver writes into a probe's folder; it holds the folder's name."""


@dataclass(frozen=True)
class Probe:
    """A probe that is under way.

    Attributes:
        name: of its folder on the storage.
        has_answered: whether what a node wrote is seen here.
    """

    name: str
    has_answered: Callable[[str], bool]


@contextmanager
def probing(storage: str) -> Iterator[Probe]:
    """A folder on the storage with a file of the driver's; gone afterwards.

    Raises:
        ValueError: the storage cannot be written from here.
    """
    name = f".tenfold-preflight-{uuid.uuid4().hex}"
    with (_on_store if is_url(storage) else _in_folder)(storage, name) as has_answered:
        yield Probe(name, has_answered)


@contextmanager
def _in_folder(storage: str, name: str) -> Iterator[Callable[[str], bool]]:
    folder = Path(storage)
    was_there, probe = folder.is_dir(), folder / name
    try:
        probe.mkdir(parents=True)
        (probe / DRIVER).write_text(name, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"storage {storage}: must be a folder that can be written ({error})"
        ) from error

    def has_answered(node: str) -> bool:
        # By its name: a listing of a folder may be older than the folder, on a network file system.
        file = probe / node
        return file.is_file() and file.read_text(encoding="utf-8") == node

    try:
        yield has_answered
    finally:
        shutil.rmtree(probe)
        if not was_there and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def _on_store(url: str, name: str) -> Iterator[Callable[[str], bool]]:
    store = ObjectStore(url)
    store.write(f"{name}/{DRIVER}", name.encode())
    try:
        yield lambda node: store.read(f"{name}/{node}") == node.encode()
    finally:
        store.remove(list(store.listing(name)))


def answer_probe(storage: str, name: str, node: str) -> str:
    """Reads what the driver wrote and writes this node's own file beside it; what is wrong, or "". Makes no
    folder: on a node that does not share the storage nothing is left behind."""
    return (_answer_on_store if is_url(storage) else _answer_in_folder)(storage, name, node)


def _answer_in_folder(storage: str, name: str, node: str) -> str:
    probe = Path(storage) / name
    try:
        if (probe / DRIVER).read_text(encoding="utf-8") != name:
            return "another folder of this path"
        (probe / node).write_text(node, encoding="utf-8")
    except FileNotFoundError:
        return "not the driver's folder" if probe.parent.is_dir() else "no such folder"
    except OSError as error:
        return f"it cannot be written ({error.strerror})"
    return ""


def _answer_on_store(url: str, name: str, node: str) -> str:
    try:
        store = ObjectStore(url, patience_s=0)
        if store.read(f"{name}/{DRIVER}") != name.encode():
            return "what the driver wrote there is not seen here"
        store.write(f"{name}/{node}", node.encode())
    except PermissionError as error:
        return f"it cannot be read and written ({error})"
    except StoreError as error:
        return str(error)
    return ""
