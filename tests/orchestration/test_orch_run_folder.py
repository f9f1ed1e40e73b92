"""Where a run is, and what of it may be removed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestration.run import removed_if_refused
from orchestration.run_folder import driving, run_at, run_in, storage_of
from trainers.lease import LEASE
from trainers.object_store import ObjectStore
from trainers.paths import RunPaths, write_text


@pytest.fixture(params=["folder", "url"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> str:
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    return f"{'file://' if request.param == 'url' else ''}{tmp_path}/runs"


def names(storage: str) -> set[str]:
    """What the run holds, as anybody else sees it."""
    store = ObjectStore(storage if "://" in storage else f"file://{storage}")
    hidden = {name for name in store.listing() if any(p.startswith(".") for p in name.split("/"))}
    return set(store.listing()) - hidden


def test_run_in_a_storage_is_found_again_at_its_place(storage):
    run = run_in(storage, "NAME")
    assert run.root.name == "NAME"
    assert storage_of(run) == storage
    with driving(run):
        write_text(run.plan, "{}")
    assert names(storage) == {"NAME/plan.json"}
    assert run_at(f"{storage}/NAME").plan.read_text() == "{}"


def test_driving_a_run_lets_it_go_also_after_an_error(storage):
    run = run_in(storage, "NAME")
    with pytest.raises(ValueError, match="mine"), driving(run):
        raise ValueError("mine")
    with driving(run):
        pass
    if "://" in storage:
        assert ObjectStore(f"{storage}/NAME").read(LEASE) is None


def refused_after(run: RunPaths, write: Callable[[], object]) -> None:
    """A new run whose plan was written, and what a worker does, until no worker is left."""

    def drive() -> None:
        with driving(run), removed_if_refused(run):
            write_text(run.plan, "{}")
            write()
            raise ValueError("no worker group is left")

    with pytest.raises(ValueError, match="no worker group is left"):
        drive()


def test_run_that_was_refused_before_anything_was_trained_leaves_nothing(storage):
    run = run_in(storage, "NAME")
    refused_after(run, lambda: write_text(run.trial("t").config, "{}"))
    assert names(storage) == set()


def test_run_in_which_a_worker_elsewhere_trained_is_kept(storage):
    """A driver that lost its workers has not seen what they wrote to the store."""
    store = ObjectStore(f"{storage if '://' in storage else f'file://{storage}'}/NAME")
    refused_after(run_in(storage, "NAME"), lambda: store.write("trials/t/metrics.jsonl", b"{}\n"))
    assert names(storage) == {"NAME/plan.json", "NAME/trials/t/metrics.jsonl"}
