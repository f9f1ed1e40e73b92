"""Objects by URL, on a real S3 protocol and on a file system, and folders that are whole or not there."""

import json
from pathlib import Path

import pytest

from trainers.object_store import ObjectStore, StoreError, checked_url, is_url
from trainers.remote_folder import (
    MANIFEST,
    download_folder,
    drop_previous,
    file_within,
    upload_folder,
)


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """A store that nothing was written to."""
    if request.param == "file":
        return ObjectStore(f"file://{tmp_path}/store/runs", patience_s=0)
    return ObjectStore(f"{request.getfixturevalue('bucket').url}/runs", patience_s=0)


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def contents(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


@pytest.mark.parametrize(
    ("text", "expected"), [("s3://b/runs", True), ("runs", False), ("/a:b", False)]
)
def test_is_url_tells_folders_from_urls(text, expected):
    assert is_url(text) is expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket/runs/", "s3://bucket/runs"),
        ("gs://bucket", "gs://bucket"),
        ("file:///shared/runs", "file:///shared/runs"),
        ("abfss://container@account.dfs.core.windows.net/runs", None),
    ],
)
def test_checked_url_loses_its_last_slash_alone(url, expected):
    assert checked_url(url) == (expected or url)


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("s3://key:secret@bucket/runs", "without credentials"),
        ("memory://runs", "that every node reaches"),
        ("s3:///", "with a bucket"),
    ],
)
def test_checked_url_that_cannot_serve_is_refused_and_its_secret_not_repeated(url, line):
    with pytest.raises(ValueError, match=line) as refused:
        checked_url(url)
    assert "secret" not in str(refused.value)


def test_object_store_without_a_client_says_which_to_install():
    with pytest.raises(StoreError, match="install gcsfs on the driver and on every node"):
        ObjectStore("gs://bucket/runs")
    with pytest.raises(StoreError, match="nosuch"):
        ObjectStore("nosuch://bucket/runs")


def test_object_store_bucket_that_is_not_there_is_refused_at_once(bucket):
    with pytest.raises(
        StoreError, match=r"must be readable and writable from here, is not"
    ) as refused:
        ObjectStore("s3://no-such-bucket-anywhere/runs").require_writable()
    assert "create the bucket" in str(refused.value)


def test_object_store_that_does_not_answer_is_given_up_after_its_patience(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match="set the store's credentials and endpoint"):
        ObjectStore(f"{bucket.url}/runs", patience_s=0).read("x")


def test_object_store_asks_again_while_its_patience_lasts(bucket, monkeypatch):
    store = ObjectStore(f"{bucket.url}/runs", patience_s=30)
    answers = iter([ConnectionError("reset"), ConnectionError("reset"), b"there"])

    def cat_file(path: str) -> bytes:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(store.fs, "cat_file", cat_file)
    monkeypatch.setattr("trainers.object_store.FIRST_PAUSE_S", 0.01)
    assert store.read("x") == b"there"


def test_object_store_that_misses_one_of_many_is_asked_for_all_again(store, monkeypatch):
    store.patience_s = 30
    store.write("a", b"1")
    store.write("b", b"2")
    cat, blips = store.fs.cat, iter([ConnectionError("reset")])

    def cat_with_a_blip(paths: list[str], on_error: str) -> dict:
        found = cat(paths, on_error=on_error)
        return found | ({paths[1]: blip} if (blip := next(blips, None)) else {})

    monkeypatch.setattr(store.fs, "cat", cat_with_a_blip)
    monkeypatch.setattr("trainers.object_store.FIRST_PAUSE_S", 0.01)
    assert store.read_all(["a", "b", "none"]) == {"a": b"1", "b": b"2"}


def test_object_store_writes_reads_lists_and_removes(store, tmp_path):
    store.require_writable()
    assert store.read("a/b") is None
    assert store.listing() == {}
    assert store.write("a/b", b"one")
    assert store.write("c", b"two")
    assert store.read_all(["a/b", "c", "none"]) == {"a/b": b"one", "c": b"two"}
    assert set(store.listing()) == {"a/b", "c"}
    assert set(store.listing("a")) == {"a/b"}
    (tmp_path / "big").write_bytes(b"x" * 100_000)
    store.upload({tmp_path / "big": "d/big"})
    store.download("d/big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"x" * 100_000
    store.remove(["c", "none"])
    assert set(store.listing()) == {"a/b", "d/big"}


def test_object_store_listing_changes_where_an_object_does(store):
    store.write("a", b"one")
    store.write("b", b"same")
    before = store.listing()
    store.write("a", b"two")
    after = store.listing()
    assert after["a"] != before["a"]
    assert after["b"] == before["b"]


def test_object_store_new_object_is_written_once(store):
    assert store.write("lease", b"mine", new=True)
    assert not store.write("lease", b"yours", new=True)
    assert store.read("lease") == b"mine"


@pytest.mark.parametrize("versioned", [False, True])
def test_folder_comes_back_as_it_was_put_and_the_next_takes_its_place(store, tmp_path, versioned):
    assert not download_folder(store, "t/x", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    first, second = (
        folder_with(tmp_path / "1", a="1", b="2"),
        folder_with(tmp_path / "2", a="3"),
    )
    upload_folder(store, first, "t/x", versioned=versioned)
    assert download_folder(store, "t/x", tmp_path / "back")
    assert contents(tmp_path / "back") == {"a": "1", "b": "2"}
    upload_folder(store, second, "t/x", versioned=versioned)
    assert download_folder(store, "t/x", tmp_path / "back")
    assert contents(tmp_path / "back") == {"a": "3"}
    if versioned:
        assert download_folder(store, "t/x", tmp_path / "before", previous=True)
        assert contents(tmp_path / "before") == {"a": "1", "b": "2"}
        drop_previous(store, "t/x")
        assert download_folder(store, "t/x", tmp_path / "back")
        assert contents(tmp_path / "back") == {"a": "3"}
    assert len(store.listing("t/x")) == 2  # nothing of the first is left beside the manifest


def test_folder_has_one_before_it_and_none_before_that(store, tmp_path):
    for text in ("1", "2", "3"):
        upload_folder(store, folder_with(tmp_path / text, a=text), "t/x", versioned=True)
    assert download_folder(store, "t/x", tmp_path / "before", previous=True)
    assert contents(tmp_path / "before") == {"a": "2"}
    assert len(store.listing("t/x")) == 4  # two manifests, two files


def test_folder_whose_upload_dies_leaves_the_one_before_whole(store, tmp_path):
    upload_folder(store, folder_with(tmp_path / "1", a="1"), "t/checkpoint", versioned=True)

    def die() -> None:
        raise StoreError("driven by another process")

    with pytest.raises(StoreError, match="another process"):
        upload_folder(
            store, folder_with(tmp_path / "2", a="2"), "t/checkpoint", versioned=True, check=die
        )
    assert download_folder(store, "t/checkpoint", tmp_path / "back")
    assert contents(tmp_path / "back") == {"a": "1"}
    upload_folder(store, folder_with(tmp_path / "3", a="3"), "t/checkpoint", versioned=True)
    # What the dead upload left is gone: two manifests with a file each.
    assert len(store.listing("t/checkpoint")) == 4
    assert download_folder(store, "t/checkpoint", tmp_path / "before", previous=True)
    assert contents(tmp_path / "before") == {"a": "1"}


@pytest.mark.parametrize("damage", ["flip", "cut", "lost"])
def test_folder_with_an_object_that_is_damaged_is_refused_and_the_target_stays(
    store, tmp_path, damage
):
    upload_folder(store, folder_with(tmp_path / "1", weights="12345"), "t/x")
    if damage == "lost":
        store.remove(["t/x/weights"])
    else:
        store.write("t/x/weights", b"12344" if damage == "flip" else b"123")
    target = folder_with(tmp_path / "back", weights="old")
    with pytest.raises(StoreError, match="t/x/weights: "):
        download_folder(store, "t/x", target)
    assert contents(target) == {"weights": "old"}
    assert [path.name for path in tmp_path.glob(".back*")] == []


def test_folder_that_two_machines_share_is_whole_whoever_was_last(store, tmp_path):
    upload_folder(store, folder_with(tmp_path / "1", a="1"), "sets/key", shared=True)
    upload_folder(store, folder_with(tmp_path / "2", a="2"), "sets/key", shared=True)
    target = tmp_path / "cache"
    assert download_folder(store, "sets/key", target, shared=True)
    assert contents(target) == {"a": "1"}  # the second found it there
    (target / "a").write_text("mapped by another process")
    assert download_folder(store, "sets/key", target, shared=True)
    assert contents(target) == {"a": "mapped by another process"}


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/etc/passwd"])
def test_folder_whose_manifest_leads_out_of_it_is_refused(store, tmp_path, name):
    store.write("x", b"1")
    entry = {"object": "../x", "bytes": 1, "sha256": "0"}
    store.write(f"t/{MANIFEST}", json.dumps({"files": {name: entry}}).encode())
    with pytest.raises(StoreError, match="leads out of it"):
        download_folder(store, "t", tmp_path / "deep" / "back")
    with pytest.raises(StoreError, match="leads out of it"):
        file_within(tmp_path, name)
