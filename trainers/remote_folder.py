"""A folder on an object store, whole or not at all: its files first, a manifest with their digests last.

NAME/manifest.json     {"files": {file: {"object", "bytes", "sha256"}}}
NAME/FILE              or NAME/VERSION/FILE, where the folder before stays beside the next one
NAME/previous.json     the manifest of the one before
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.integrity import file_sha256
from trainers.object_store import ObjectStore, StoreError

MANIFEST, PREVIOUS = "manifest.json", "previous.json"
ENTRY = ("object", "bytes", "sha256")


def upload_folder(
    store: ObjectStore,
    folder: Path,
    name: str,
    *,
    versioned: bool = False,
    shared: bool = False,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Puts a folder's files in the place of what is there under a name.

    Args:
        versioned: what was there stays, as the folder before.
        shared: others may put an equal folder there at the same time; what they have is left alone.
        check: called before the manifest is written; raises where this process may no longer write.
    """
    if shared and store.read(f"{name}/{MANIFEST}") is not None:
        return
    former = store.read(f"{name}/{MANIFEST}") if versioned else None
    prefix = f"{uuid.uuid4().hex[:12]}/" if versioned or shared else ""
    files = {path.relative_to(folder).as_posix(): path for path in _files_in(folder)}
    store.upload({path: f"{name}/{prefix}{relative}" for relative, path in files.items()})
    entries = {relative: _entry(prefix + relative, path) for relative, path in files.items()}
    check()
    manifest = json.dumps({"files": entries}, indent=1).encode()
    store.write(f"{name}/{MANIFEST}", manifest)
    if shared:
        return
    if former is not None:
        store.write(f"{name}/{PREVIOUS}", former)
    _keep_only(store, name, manifest, former)


def drop_previous(store: ObjectStore, name: str) -> None:
    """Removes the folder before."""
    _keep_only(store, name, store.read(f"{name}/{MANIFEST}"), None)


def _keep_only(store: ObjectStore, name: str, manifest: bytes | None, former: bytes | None) -> None:
    """Removes what neither the folder's manifest nor that of the one before names."""
    kept = {f"{name}/{MANIFEST}", *_objects(name, manifest)}
    if former is not None:
        kept |= {f"{name}/{PREVIOUS}", *_objects(name, former)}
    store.remove([found for found in store.listing(name) if found not in kept])


def _objects(name: str, manifest: bytes | None) -> list[str]:
    entries = _entries(manifest) if manifest else None
    return [f"{name}/{entry['object']}" for entry in (entries or {}).values()]


def download_folder(
    store: ObjectStore,
    name: str,
    target: Path,
    *,
    shared: bool = False,
    held: bytes | None = None,
    previous: bool = False,
    as_it_is: bool = False,
) -> bytes | None:
    """Puts the folder under a name in a target's place, and gives its manifest; None: there is none, and the
    target stays.

    Args:
        held: the manifest of what the target holds: the same is not fetched again.
        shared: a target that another process puts there meanwhile is as good.
        previous: the folder before, where it was kept.
        as_it_is: what is damaged comes too: the folder has checksums of its own, which tell.

    Raises:
        StoreError: what came is not what was put there.
    """
    manifest = store.read(f"{name}/{PREVIOUS if previous else MANIFEST}")
    if manifest is None or (manifest == held and target.is_dir()):
        return manifest
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        entries = _entries(manifest)
        if entries is None and not as_it_is:
            raise StoreError(f"{store.url}/{name}/{MANIFEST}: must be a manifest, is damaged")
        for relative, entry in (entries or {}).items():
            file = file_within(temporary, relative)
            try:
                _fetch(store, f"{name}/{entry['object']}", file, entry)
            except DamagedObjectError:
                if not as_it_is:
                    raise
        if not shared:
            shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)
    except OSError:
        if not (shared and target.is_dir()):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def file_within(folder: Path, relative: str) -> Path:
    """The file of a name on a store, with its folder made.

    Raises:
        StoreError: the name leads out of the folder.
    """
    file = folder / relative
    if not file.resolve().is_relative_to(folder.resolve()):
        raise StoreError(f"{relative}: must be a name within its folder, leads out of it")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


class DamagedObjectError(StoreError):
    """An object is not what its manifest says."""


def _entries(manifest: bytes) -> dict[str, dict[str, Any]] | None:
    """File -> its entry; None where the manifest is damaged."""
    try:
        files = json.loads(manifest)["files"]
        return {str(name): {key: entry[key] for key in ENTRY} for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _fetch(store: ObjectStore, name: str, file: Path, entry: dict[str, Any]) -> None:
    try:
        store.download(name, file)
    except FileNotFoundError as error:
        raise DamagedObjectError(
            f"{store.url}/{name}: its manifest names it, it is not there"
        ) from error
    if file_sha256(file) != entry["sha256"]:
        raise DamagedObjectError(
            f"{store.url}/{name}: must hold the {entry['bytes']:,} bytes that its manifest says, "
            f"came as {file.stat().st_size:,} bytes that differ; remove the folder to begin it again"
        )


def _entry(name: str, path: Path) -> dict[str, Any]:
    return {"object": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
