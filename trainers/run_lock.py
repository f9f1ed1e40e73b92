"""Who may write into a run's folder. Its workers hold a lock while they live, and the next driver waits for
it: a killed driver's workers train and write on for seconds before Ray ends them.

The kernel lets a lock go when its process ends, however it ends. On a shared folder this needs a file system
that carries flock between nodes (NFS does). An object store has leases in their place (trainers/lease.py).
"""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from trainers.lease import current_driver
from trainers.mirror import Mirror, mirror_of
from trainers.object_store import ObjectStore, StoreError
from trainers.paths import RunPaths, remove_leftovers

WAIT_S = 120.0
"""How long a driver waits for an earlier driver's workers; they were gone in under 3 s on a busy laptop."""
POLL_S = 0.1
LOOKS_S = 0.5
"""How long those may take who look whether a run is driven."""


@contextmanager
def hold_run(trial_folder: Path) -> Iterator[None]:
    """Marks the run of a trial as being written by this process. In a run on an object store it writes for
    the run's present driver alone, and its copy ends with it.

    Raises:
        StoreError: nobody drives the run.
    """
    if mirror := mirror_of(trial_folder):
        mirror.lease = _lease_of(mirror)
        try:
            yield
        finally:
            mirror.close()
        return
    with RunPaths(trial_folder.parents[1]).workers.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _lease_of(mirror: Mirror) -> tuple[ObjectStore, str]:
    """The lease of a run, or of the study that it is a part of."""
    for url in (mirror.store.url, mirror.store.url.rpartition("/")[0]):
        store = ObjectStore(url)
        if driver := current_driver(store):
            return store, driver
    raise StoreError(f"{mirror.store.url}: this run is not driven by now")


def claim_folders(run: RunPaths, on_wait: Callable[[], None], wait_s: float = WAIT_S) -> None:
    """Waits until no worker of an earlier driver writes into a run, and removes what they left half-written.

    Args:
        on_wait: called once if there is something to wait for.

    Raises:
        ValueError: such workers are still there after wait_s.
    """
    run.trials.mkdir(parents=True, exist_ok=True)
    with run.workers.open("a") as file:
        if not take_lock(file):
            on_wait()
            _wait_for_lock(file, run, wait_s)
        for folder in (run.root, *run.trials.iterdir()):
            remove_leftovers(folder)


def _wait_for_lock(file: IO[str], run: RunPaths, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while not take_lock(file):
        if time.monotonic() > deadline:
            raise ValueError(
                f"{run.root}: the workers of an earlier driver must have ended, some still hold "
                f"{run.workers.name} after {wait_s:g} s; end them (ray stop, or their processes "
                "ray::RayTrainWorker) and try again"
            )
        time.sleep(POLL_S)


def take_lock_soon(file: IO[str], wait_s: float = LOOKS_S) -> bool:
    """`take_lock`, which waits for those that only look whether it is taken (`is_locked`)."""
    deadline = time.monotonic() + wait_s
    while not take_lock(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock that `take_lock` took. To look takes it for an instant, beside others who look."""
    if not path.is_file():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def take_lock(file: IO[str]) -> bool:
    """Takes the lock of an open file for this process alone, until the file is closed. False: another
    process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
