"""Who drives a run on an object store, which has no locks: an object that names the driver, which writes it anew
every few seconds. What stays the same for long enough was left behind by a driver that died.

No clock is compared with another machine's: a lease is watched. Workers write for one driver alone, and look
before each write whether it still drives.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trainers.host import host_id, is_alive
from trainers.object_store import ObjectStore, StoreError

LEASE = ".driver.json"
RENEW_S = 10.0
DEAD_S = 45.0
"""A lease that stays the same for so long is nobody's: four renewals were missed."""
POLL_S = 1.0


def current_driver(store: ObjectStore) -> str | None:
    """The id of the driver of a run; None where nobody drives it."""
    lease = _read(store)
    return lease["id"] if lease else None


@dataclass(frozen=True)
class Holder:
    """Who drives a run: a process, of a host."""

    host: str
    pid: int


def living_driver(store: ObjectStore, watch_s: float | None) -> Holder | None:
    """Who drives a run; None where nobody does, or where he has died, as far as can be seen within a time.

    Args:
        watch_s: how long a lease of another host is watched: one that stays the same is nobody's. None: it is
            believed.
    """
    if (found := _read(store)) is None:
        return None
    holder = Holder(str(found["host"]).partition(" ")[0], int(found["pid"]))
    if found["host"] == host_id():
        return holder if is_alive(holder.pid) else None
    if watch_s is None:
        return holder
    deadline = time.monotonic() + watch_s
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        if (now := _read(store)) != found:
            return holder if now else None
    return None


def require_driver(store: ObjectStore, driver: str) -> None:
    """Raises:
    StoreError: somebody else drives the run now, or nobody.
    """
    if (now := current_driver(store)) != driver:
        raise StoreError(
            f"{store.url}: this run is {'driven by another process' if now else 'not driven'} by now; "
            "this one must not write there any more"
        )


@contextmanager
def leased(
    store: ObjectStore,
    on_wait: Callable[[str], None] = lambda driver: None,
    *,
    renew_s: float = RENEW_S,
    dead_s: float = DEAD_S,
) -> Iterator[str]:
    """Makes this process the driver of a run; gives its id.

    Args:
        on_wait: is told where the earlier driver was, if it has to be watched.

    Raises:
        StoreError: the run is being driven by another process.
    """
    lease = {
        "id": uuid.uuid4().hex,
        "host": host_id(),
        "pid": os.getpid(),
        "renewals": 0,
    }
    while not store.write(LEASE, _bytes(lease), new=True):
        if (found := _read(store)) is None:
            continue  # let go in between
        if not _died_here(found):
            on_wait(_place(found))
            _watch(store, found, dead_s)
        store.remove([LEASE])
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(store, lease, ended, renew_s), daemon=True)
    renewing.start()
    try:
        yield lease["id"]
    finally:
        ended.set()
        renewing.join()
        if current_driver(store) == lease["id"]:
            store.remove([LEASE])


def _watch(store: ObjectStore, found: dict[str, Any], dead_s: float) -> None:
    """Returns when a lease has been let go, or stayed the same for long enough."""
    deadline = time.monotonic() + dead_s
    while time.monotonic() < deadline:
        time.sleep(min(POLL_S, dead_s / 4))
        now = _read(store)
        if now is None:
            return
        if now != found:
            raise StoreError(
                f"{store.url}: this run is being driven by another process {_place(now)}"
            )


def _renew(
    store: ObjectStore, lease: dict[str, Any], ended: threading.Event, every_s: float
) -> None:
    while not ended.wait(every_s):
        try:
            if current_driver(store) != lease["id"]:
                return  # taken over: who writes next finds it out
            lease["renewals"] += 1
            store.write(LEASE, _bytes(lease))
        except StoreError:
            return  # out of reach for minutes: so is whatever is written next, and that says so


def _died_here(lease: dict[str, Any]) -> bool:
    """Whether it was left by a process of this host that is gone, or by one whose number is ours now."""
    if lease["host"] != host_id():
        return False
    return lease["pid"] == os.getpid() or not is_alive(lease["pid"])


def _place(lease: dict[str, Any]) -> str:
    return f"({lease['host']}, process {lease['pid']})"


def _read(store: ObjectStore) -> dict[str, Any] | None:
    content = store.read(LEASE)
    return json.loads(content) if content is not None else None


def _bytes(lease: dict[str, Any]) -> bytes:
    return json.dumps(lease).encode()
