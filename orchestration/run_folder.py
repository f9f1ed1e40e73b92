"""Where a run is: a folder, or a URL of which this process keeps a copy (trainers/mirror.py)."""

import json
import os
import posixpath
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestration.own_folder import require_no_way_out, require_own
from trainers.lease import DEAD_S, RENEW_S, Holder, leased, living_driver
from trainers.mirror import fetch_all_records, mirror_of, opened, send_rest, shown
from trainers.object_store import ObjectStore, checked_url, is_url
from trainers.paths import RunPaths
from trainers.run_lock import is_locked, take_lock_soon

WATCH_S = 2 * RENEW_S
"""How long the lease of a driver elsewhere is watched before it is taken for a dead one's."""


def run_in(storage: str, name: str) -> RunPaths:
    """storage/NAME, to be written.

    Raises:
        ValueError: a folder that cannot be written, or a URL that cannot be read and written.
    """
    if not is_url(storage):
        folder = Path(storage).expanduser()
        _require_writable(folder)
        return RunPaths(folder / name)
    ObjectStore(checked_url(storage)).require_writable()
    return run_at(posixpath.join(storage, name))


def _require_writable(folder: Path) -> None:
    """Told before a cluster is started for what nobody can keep."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"storage must be a folder that can be written, {there} is "
            f"{'read-only' if there.is_dir() else 'a file'}; set storage: to another"
        )


def run_at(place: str) -> RunPaths:
    """A run that may be there, with everything that is, but for weights.

    Raises:
        ValueError: a URL that cannot be read.
    """
    if not is_url(place):
        return RunPaths(Path(place).expanduser())
    mirror = opened(checked_url(place))
    mirror.pull_records()
    return RunPaths(mirror.root)


def storage_of(run: RunPaths) -> str:
    """What holds a run, as `storage:` says it."""
    where = shown(run.root)
    return where.rpartition("/")[0] if is_url(where) else str(run.root.resolve().parent)


@contextmanager
def driving(run: RunPaths) -> Iterator[None]:
    """Makes this process the one that drives a run: two would train every trial twice into the same files.

    Raises:
        ValueError: another process drives it, it is another user's, or a link in it leads elsewhere.
    """
    mirror = mirror_of(run.root)
    if mirror is None:
        with _locked(run):
            yield
        return
    with leased(mirror.store, _say_waiting) as driver:
        mirror.lease = mirror.store, driver
        fetch_all_records(run.root)  # as the earlier driver and its workers left it
        try:
            yield
            send_rest(run.root)
        finally:
            mirror.lease = None


def _say_waiting(driver: str) -> None:
    print(
        f"an earlier driver {driver} did not let the run go; watching for up to {DEAD_S:g} s whether it lives",
        file=sys.stderr,
    )


@contextmanager
def _locked(run: RunPaths) -> Iterator[None]:
    try:
        run.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{run.root}: the run's folder must be one that can be made, it is not ({error.strerror}); set storage:"
        ) from error
    require_own(run.root)
    require_no_way_out(run.root)
    with run.lock.open("a") as file:
        if not take_lock_soon(file):
            raise ValueError(f"{run.root}: this run is being driven by another process")
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        yield


def driver_of(run: RunPaths, watch_s: float | None = WATCH_S) -> Holder | None:
    """Who drives a run now; None where nobody does.

    Args:
        watch_s: see lease.living_driver.
    """
    if mirror := mirror_of(run.root):
        return living_driver(mirror.store, watch_s)
    if not is_locked(run.lock):
        return None
    try:
        return Holder(**json.loads(run.lock.read_text(encoding="utf-8")))
    except (ValueError, TypeError):  # it has not written it yet
        return Holder("?", 0)
