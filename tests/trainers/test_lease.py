"""Who drives a run on an object store."""

import json
import subprocess
import sys
import threading
import time

import pytest

from trainers.host import host_id
from trainers.lease import LEASE, current_driver, leased, require_driver
from trainers.object_store import ObjectStore, StoreError

FAST = {"renew_s": 0.05, "dead_s": 0.6}


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, tmp_path) -> ObjectStore:
    if request.param == "file":
        return ObjectStore(f"file://{tmp_path}/runs/NAME", patience_s=0)
    return ObjectStore(f"{request.getfixturevalue('bucket').url}/runs/NAME", patience_s=0)


def leave(store: ObjectStore, **facts: object) -> None:
    """What a driver that died left behind."""
    lease = {"id": "old", "host": "elsewhere", "pid": 1, "renewals": 3} | facts
    store.write(LEASE, json.dumps(lease).encode())


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_lease_is_held_inside_and_gone_outside(store):
    assert current_driver(store) is None
    with leased(store, **FAST) as driver:
        assert current_driver(store) == driver
        require_driver(store, driver)
    assert current_driver(store) is None
    with pytest.raises(StoreError, match="not driven"):
        require_driver(store, driver)


def test_lease_that_is_renewed_is_refused_with_where_its_driver_is(store):
    ended = threading.Event()

    def other_machine() -> None:
        renewals = 0
        while not ended.wait(0.02):
            renewals += 1
            leave(store, renewals=renewals)

    leave(store)
    thread = threading.Thread(target=other_machine)
    thread.start()
    try:
        line = r"driven by another process \(elsewhere, process 1\)"
        with pytest.raises(StoreError, match=line), leased(store, **FAST):
            pass
    finally:
        ended.set()
        thread.join()
    assert current_driver(store) == "old"


def test_lease_of_a_driver_that_died_elsewhere_is_taken_after_it_was_watched(store):
    leave(store)
    waited: list[str] = []
    began = time.monotonic()
    with leased(store, waited.append, **FAST) as driver:
        assert time.monotonic() - began >= FAST["dead_s"]
        assert waited == ["(elsewhere, process 1)"]
        require_driver(store, driver)
        with pytest.raises(StoreError, match="driven by another process by now"):
            require_driver(store, "old")  # what the earlier driver's workers find


def test_lease_of_a_process_of_this_host_that_is_gone_is_taken_at_once(store):
    leave(store, host=host_id(), pid=dead_pid())
    waited: list[str] = []
    with leased(store, waited.append, renew_s=0.05, dead_s=600):
        assert waited == []


def test_lease_that_is_let_go_while_it_is_watched_is_taken(store):
    leave(store)
    threading.Timer(0.3, lambda: store.remove([LEASE])).start()
    with leased(store, renew_s=0.05, dead_s=600) as driver:
        require_driver(store, driver)


def test_lease_that_another_took_is_neither_renewed_nor_removed(store):
    with leased(store, **FAST):
        leave(store, id="thief")
        time.sleep(4 * FAST["renew_s"])
    assert current_driver(store) == "thief"


def test_lease_is_renewed_while_it_is_held(store):
    with leased(store, **FAST):
        first = store.read(LEASE)
        deadline = time.monotonic() + 10
        while store.read(LEASE) == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_lease_of_two_that_start_at_once_is_one_drivers(bucket):
    url, drivers, refused = f"{bucket.url}/runs/NAME", [], []
    begin, held = threading.Barrier(2), threading.Event()

    def drive() -> None:
        own = ObjectStore(url, patience_s=0)
        begin.wait()
        try:
            with leased(own, renew_s=0.05, dead_s=5):
                drivers.append(1)
                held.wait(10)
        except StoreError as error:
            refused.append(str(error))
            held.set()

    threads = [threading.Thread(target=drive) for _ in range(2)]
    # Processes of this host that live are watched, and threads have their process's number: elsewhere.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainers.lease._died_here", lambda lease: False)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (len(drivers), len(refused)) == (1, 1)
