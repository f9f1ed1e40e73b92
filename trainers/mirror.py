"""A run on an object store: each process works on a copy of its own on its machine's disk, and what it writes
there through trainers/paths.py goes to the store before the write returns.

The store is the truth. A copy begins empty, takes from the store what it is asked for, and is removed when its
process ends. Who writes what is settled: the driver its decisions, a trial's worker the trial's files.
"""

import atexit
import os
import shutil
import time
from pathlib import Path

from trainers.data.cache import cache_root, digest_of
from trainers.host import host_id, is_alive
from trainers.lease import require_driver
from trainers.object_store import ObjectStore, is_url
from trainers.remote_folder import (
    MANIFEST,
    PREVIOUS,
    download_folder,
    drop_previous,
    file_within,
    upload_folder,
)

WHOLE_FOLDERS = ("checkpoint", "best")
"""Folders that come and go as a whole."""
VERSIONED = ("checkpoint",)
"""Of these the one before stays: a trial goes on from it where the last is damaged."""
ONE_WAY = ("wandb", "tensorboard")
"""What trackers leave: no process reads it back."""
TRIALS = "/trials/"
CHECK_S = 1.0
"""How long a look at the lease holds: who takes a run over needs longer to start a worker."""
NOT_MIRRORED = ("tune",)
"""Ray's own state, which nothing goes on from; names that begin with a dot stay too."""


class Mirror:
    """A run's copy here, and what keeps it and the store the same.

    Args:
        store: of the run.
        root: the copy's folder; its name is the run's.
    """

    def __init__(self, store: ObjectStore, root: Path) -> None:
        self.store, self.root = store, root
        self.lease: tuple[ObjectStore, str] | None = None
        """Where the lease lies of the driver for which this process writes, and the driver's id."""
        self._checked_at = -CHECK_S
        self._seen: dict[str, str] = {}
        self._sent: dict[Path, tuple[int, int]] = {}
        self._held: dict[Path, bytes] = {}
        """Folder -> the manifest that it was fetched by; what was written here since has none."""
        self._may_have_previous: set[str] = set()
        """Names of folders whose predecessor may still be there."""

    def name(self, path: Path) -> str:
        """The store's name of a path in the copy."""
        return "" if path == self.root else path.relative_to(self.root).as_posix()

    def check(self) -> None:
        """Raises:
        StoreError: another driver took the run over.
        """
        if self.lease is not None and time.monotonic() > self._checked_at + CHECK_S:
            require_driver(*self.lease)
            self._checked_at = time.monotonic()

    def push(self, path: Path) -> None:
        """Puts a file there that was written here."""
        self.check()
        self.store.upload({path: self.name(path)})
        self._sent[path] = _state(path)

    def push_folder(self, path: Path) -> None:
        """Puts a folder there that was written here."""
        self._held.pop(path, None)
        name, versioned = self.name(path), path.name in VERSIONED
        upload_folder(self.store, path, name, versioned=versioned, check=self.check)
        if versioned:
            self._may_have_previous.add(name)

    def push_rest(self) -> None:
        """Puts what was written here by others (trackers), as far as it changed."""
        for path in sorted(self.root.rglob("*")):
            name = self.name(path)
            if not path.is_file() or not _is_ours(name) or _lies_in(name, WHOLE_FOLDERS):
                continue
            if self._sent.get(path) != _state(path):
                self.push(path)

    def remove(self, path: Path) -> None:
        """Removes there what was removed here, a file or everything of a folder."""
        self.check()
        # The manifest first: a folder without one is no folder.
        names = self.store.listing(self.name(path))
        self.store.remove(sorted(names, key=lambda name: not name.endswith(MANIFEST)))

    def pull(self, path: Path) -> None:
        """Brings a file here to what it is there."""
        content = self.store.read(self.name(path))
        if content is None:
            path.unlink(missing_ok=True)
        else:
            self._keep(self.name(path), content)

    def pull_folder(self, path: Path) -> None:
        """Brings a folder here to what it is there, damaged or whole: its checksums tell."""
        path.parent.mkdir(parents=True, exist_ok=True)
        name, held = self.name(path), self._held.get(path)
        manifest = download_folder(self.store, name, path, held=held, as_it_is=True)
        if manifest is None:
            shutil.rmtree(path, ignore_errors=True)
        else:
            self._held[path] = manifest
            if path.name in VERSIONED:
                self._may_have_previous.add(name)

    def pull_previous(self, path: Path, target: Path) -> None:
        """Brings the folder before one to a target here, where it is there."""
        download_folder(self.store, self.name(path), target, previous=True, as_it_is=True)

    def drop_previous(self, path: Path) -> None:
        """Removes the folder before one there."""
        if (name := self.name(path)) in self._may_have_previous:
            self.check()
            drop_previous(self.store, name)
            self._may_have_previous.discard(name)

    def pull_records(self) -> None:
        """Brings everything here that changed there, but for weights and what nobody reads back."""
        names = self.store.listing()
        self._pull_changed(names)
        kept = (name for name in names if name.endswith(f"/{PREVIOUS}"))
        self._may_have_previous |= {name.removesuffix(f"/{PREVIOUS}") for name in kept}

    def pull_new(self, path: Path) -> None:
        """Brings everything of a folder of small files here that changed there."""
        self._pull_changed(self.store.listing(self.name(path)))

    def _pull_changed(self, names: dict[str, str]) -> None:
        found = {name: tag for name, tag in names.items() if _is_record(name)}
        changed = [name for name, tag in found.items() if self._seen.get(name) != tag]
        for name, content in self.store.read_all(changed).items():
            self._keep(name, content)
        self._seen |= found

    def _keep(self, name: str, content: bytes) -> None:
        path = file_within(self.root, name)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)
        self._sent[path] = _state(path)

    def close(self) -> None:
        """Ends the copy."""
        _mirrors.pop(self.store.url, None)
        shutil.rmtree(self.root.parent, ignore_errors=True)


_mirrors: dict[str, Mirror] = {}
"""URL -> the copy that this process has of it."""


def opened(url: str) -> Mirror:
    """The copy of a run that this process works on, begun empty where there is none yet.

    Args:
        url: of the run.

    Raises:
        StoreError: no client for the URL.
    """
    if url not in _mirrors:
        store = ObjectStore(url)
        folder = cache_root() / "work"
        _remove_dead(folder)
        place = folder / f"{digest_of(url)[:12]}-{_host()}-{os.getpid()}"
        shutil.rmtree(place, ignore_errors=True)  # of an earlier process of this number
        root = place / url.rpartition("/")[2]
        root.mkdir(parents=True)
        _mirrors[url] = Mirror(store, root.resolve())
        atexit.register(_mirrors[url].close)
    return _mirrors[url]


def local_folder(place: str) -> Path:
    """A trial's folder from its config: an absolute path, or a URL, of which this process has a copy."""
    if not is_url(place):
        return Path(place)
    run, _, trial = place.rpartition(TRIALS)
    for mirror in _mirrors.values():  # a driver's copy of a study holds runs within it
        if place.startswith(f"{mirror.store.url}/"):
            return mirror.root / place.removeprefix(f"{mirror.store.url}/")
    return opened(run).root / f"{TRIALS.strip('/')}/{trial}"


def mirror_of(path: Path) -> Mirror | None:
    """The copy that a path lies in; None for an ordinary folder."""
    mirrors = (m for m in _mirrors.values() if path.is_relative_to(m.root))
    return next(mirrors, None)


def shown(path: Path) -> str:
    """A path as its user knows it: on the store, where it lies in a copy."""
    mirror = mirror_of(path)
    if mirror is None:
        return str(path)
    name = mirror.name(path)
    return f"{mirror.store.url}/{name}" if name else mirror.store.url


def written(path: Path) -> None:
    """A file was written. What is not whole yet (a temporary folder's) and Ray's own stay here."""
    if (mirror := mirror_of(path)) and _is_ours(mirror.name(path)):
        mirror.push(path)


def folder_written(path: Path) -> None:
    """A folder was put in its place."""
    if mirror := mirror_of(path):
        mirror.push_folder(path)


def removed(path: Path) -> None:
    """A file or folder was removed."""
    if mirror := mirror_of(path):
        mirror.remove(path)


def fetch(path: Path) -> None:
    """Brings a file of a copy to what it is on the store; an ordinary file is what it is."""
    if mirror := mirror_of(path):
        mirror.pull(path)


def fetch_new(path: Path) -> None:
    """Brings what is new in a folder of small files here from the store."""
    if mirror := mirror_of(path):
        mirror.pull_new(path)


def fetch_folder(path: Path) -> None:
    """Brings a folder of a copy to what it is on the store, damaged or whole."""
    if mirror := mirror_of(path):
        mirror.pull_folder(path)


def fetch_previous(path: Path, target: Path) -> None:
    """Brings the folder before one of a copy, as it is on the store, to a target."""
    if mirror := mirror_of(path):
        mirror.pull_previous(path, target)


def previous_dropped(path: Path) -> None:
    """The folder before one was removed."""
    if mirror := mirror_of(path):
        mirror.drop_previous(path)


def fetch_all_records(root: Path) -> None:
    """Brings a run's copy to what the store has of it, but for weights."""
    if mirror := mirror_of(root):
        mirror.pull_records()


def send_rest(root: Path) -> None:
    """Puts on the store what others than trainers/paths.py wrote into a run's copy."""
    if mirror := mirror_of(root):
        mirror.push_rest()


def forget(path: Path) -> None:
    """Removes a folder from a copy, and leaves it on the store."""
    if mirror_of(path):
        shutil.rmtree(path, ignore_errors=True)


def _is_record(name: str) -> bool:
    return _is_ours(name) and not _lies_in(name, (*WHOLE_FOLDERS, *ONE_WAY))


def _is_ours(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and not _lies_in(name, NOT_MIRRORED)


def _lies_in(name: str, folders: tuple[str, ...]) -> bool:
    return bool(set(name.split("/")) & set(folders))


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def _host() -> str:
    return digest_of(host_id())[:12]


def _remove_dead(folder: Path) -> None:
    """Removes the copies of processes of this host that were killed."""
    for place in folder.glob(f"*-{_host()}-*"):
        if not is_alive(int(place.name.rpartition("-")[2])):
            shutil.rmtree(place, ignore_errors=True)
