"""The copies of a run on an object store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from trainers.lease import leased
from trainers.mirror import (
    Mirror,
    fetch,
    fetch_folder,
    forget,
    local_folder,
    mirror_of,
    opened,
    send_rest,
    shown,
)
from trainers.object_store import ObjectStore, StoreError
from trainers.paths import (
    RunPaths,
    append_text,
    copy_file,
    remove_file,
    remove_folder,
    replace_folder,
    temporary_folder,
    write_state,
    write_text,
)
from trainers.run_lock import hold_run


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> str:
    """The URL of a run that is not there yet."""
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    if request.param == "file":
        return f"file://{tmp_path}/store/runs/NAME"
    return f"{request.getfixturevalue('bucket').url}/runs/NAME"


@pytest.fixture
def mine(url: str) -> Iterator[Mirror]:
    """The copy of this process."""
    mirror = opened(url)
    yield mirror
    mirror.close()


@pytest.fixture
def other(url: str, tmp_path: Path) -> Mirror:
    """The copy of a process on another machine."""
    root = tmp_path / "other" / "NAME"
    root.mkdir(parents=True)
    return Mirror(ObjectStore(url), root)


def put_folder(target: Path, **files: str) -> None:
    temporary = temporary_folder(target)
    for name, text in files.items():
        write_text(temporary / name, text)
    replace_folder(temporary, target)


def test_mirror_what_is_written_here_is_read_there(mine, other):
    run, there = RunPaths(mine.root), RunPaths(other.root)
    write_state(run.plan, {"a": 1})
    append_text(run.rungs, "one\n")
    append_text(run.rungs, "two\n")
    put_folder(run.trial("t").checkpoint, weights="w")
    other.pull_records()
    assert there.plan.read_text() == run.plan.read_text()
    assert there.rungs.read_text() == "one\ntwo\n"
    assert not there.trial("t").checkpoint.exists()
    other.pull_folder(there.trial("t").checkpoint)
    assert (there.trial("t").checkpoint / "weights").read_text() == "w"


def test_mirror_holds_whole_things_alone(mine):
    run = RunPaths(mine.root)
    put_folder(run.trial("t").best, weights="w")
    write_text(run.tune / "state.json", "Ray's")
    write_text(run.root / ".hidden", "x")
    assert set(mine.store.listing()) == {"trials/t/best/weights", "trials/t/best/manifest.json"}


def test_mirror_what_is_removed_here_is_gone_there(mine, other):
    run, there = RunPaths(mine.root), RunPaths(other.root)
    write_text(run.trial("t").status, "{}")
    put_folder(run.trial("t").checkpoint, weights="w")
    other.pull(there.trial("t").status)
    other.pull_folder(there.trial("t").checkpoint)
    remove_file(run.trial("t").status)
    remove_folder(run.trial("t").checkpoint)
    assert mine.store.listing() == {}
    other.pull(there.trial("t").status)
    other.pull_folder(there.trial("t").checkpoint)
    assert not there.trial("t").status.exists()
    assert not there.trial("t").checkpoint.exists()


def test_mirror_run_that_is_removed_leaves_nothing(mine):
    run = RunPaths(mine.root)
    write_text(run.plan, "{}")
    put_folder(run.trial("t").checkpoint, weights="w")
    remove_folder(run.root)
    assert mine.store.listing() == {}


def test_mirror_copied_files_and_what_trackers_wrote_go_there_once(mine, tmp_path):
    run = RunPaths(mine.root)
    (tmp_path / "error").write_text("Traceback")
    copy_file(tmp_path / "error", run.trial("t").error)
    events = run.root / "tensorboard" / "t" / "events"
    events.parent.mkdir(parents=True)
    events.write_text("1")
    send_rest(run.root)
    before = mine.store.listing()
    assert set(before) == {"trials/t/error.txt", "tensorboard/t/events"}
    send_rest(run.root)
    assert mine.store.listing() == before
    events.write_text("12")
    send_rest(run.root)
    assert mine.store.read("tensorboard/t/events") == b"12"


def test_mirror_a_trial_that_was_elsewhere_meanwhile_is_fetched_as_it_is_there(mine, url, other):
    trial = RunPaths(mine.root).trial("t")
    put_folder(trial.checkpoint, weights="old")
    write_text(trial.metrics, "1\n")
    (other.root / "new").mkdir()
    (other.root / "new" / "weights").write_text("new")
    from trainers.remote_folder import upload_folder

    upload_folder(other.store, other.root / "new", "trials/t/checkpoint", versioned=True)
    other.store.write("trials/t/metrics.jsonl", b"1\n2\n")
    fetch(trial.metrics)
    fetch_folder(trial.checkpoint)
    assert trial.metrics.read_text() == "1\n2\n"
    assert (trial.checkpoint / "weights").read_text() == "new"
    forget(trial.root)
    assert not trial.root.exists()
    assert mine.store.read("trials/t/metrics.jsonl") == b"1\n2\n"


def test_mirror_folder_that_did_not_change_is_fetched_once(mine, other, monkeypatch):
    put_folder(RunPaths(mine.root).trial("t").checkpoint, weights="1")
    theirs = RunPaths(other.root).trial("t").checkpoint
    fetched: list[str] = []
    download = other.store.download
    monkeypatch.setattr(
        other.store, "download", lambda name, file: (fetched.append(name), download(name, file))
    )
    other.pull_folder(theirs)
    other.pull_folder(theirs)
    assert len(fetched) == 1
    put_folder(RunPaths(mine.root).trial("t").checkpoint, weights="2")
    other.pull_folder(theirs)
    assert (theirs / "weights").read_text() == "2"
    assert len(fetched) == 2


def test_mirror_paths_are_shown_as_urls_and_found_by_them(mine, url, tmp_path):
    trial = RunPaths(mine.root).trial("t")
    assert shown(mine.root) == url
    assert shown(trial.root) == f"{url}/trials/t"
    assert local_folder(f"{url}/trials/t") == trial.root
    assert local_folder(str(tmp_path / "runs" / "t")) == tmp_path / "runs" / "t"
    assert shown(tmp_path) == str(tmp_path)
    assert mirror_of(tmp_path) is None


def test_mirror_trial_of_a_run_within_a_study_lies_in_the_studys_copy(mine, url):
    assert local_folder(f"{url}/facts-30/trials/t") == mine.root / "facts-30" / "trials" / "t"


def test_mirror_copy_ends_with_its_process_and_those_of_killed_ones_are_removed(url, tmp_path):
    mirror = opened(url)
    killed = mirror.root.parents[1] / mirror.root.parent.name.rpartition("-")[0]
    killed = killed.with_name(f"{killed.name}-999999999")
    killed.mkdir()
    mirror.close()
    assert not mirror.root.exists()
    assert killed.exists()
    mirror = opened(url)
    assert not killed.exists()
    mirror.close()


def test_mirror_a_worker_writes_for_the_driver_that_it_began_under_alone(url, monkeypatch):
    store = ObjectStore(url)
    place = f"{url}/trials/t"
    with pytest.raises(StoreError, match="not driven by now"), hold_run(local_folder(place)):
        pass
    with leased(store):
        with hold_run(local_folder(place)):
            trial = RunPaths(opened(url).root).trial("t")
            put_folder(trial.checkpoint, weights="1")
            monkeypatch.setattr("trainers.mirror.CHECK_S", 0.0)
            store.write(".driver.json", b'{"id": "next", "host": "elsewhere", "pid": 1}')
            with pytest.raises(StoreError, match="driven by another process by now"):
                put_folder(trial.checkpoint, weights="2")
            with pytest.raises(StoreError, match="driven by another process by now"):
                write_text(trial.status, "{}")
        opened(url).pull_folder(trial.checkpoint)
        assert (trial.checkpoint / "weights").read_text() == "1"
        opened(url).close()


def test_mirror_a_worker_of_a_studys_run_writes_under_the_studys_lease(url):
    with leased(ObjectStore(url)) as driver, hold_run(local_folder(f"{url}/facts-30/trials/t")):
        mirror = opened(f"{url}/facts-30")
        assert mirror.lease is not None
        assert mirror.lease[1] == driver
