"""Tokenized sets that machines share through an object store, by content."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trainers.data.cache import SHARED_CACHE
from trainers.data.prepared import prepare_data
from trainers.object_store import ObjectStore, StoreError


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    url = f"file://{tmp_path}/store/.cache"
    monkeypatch.setenv(SHARED_CACHE, url)
    return ObjectStore(url)


@pytest.fixture
def on_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Goes on as another machine, with a cache of its own."""
    return lambda name: monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / name))


def never(*_: object, **__: object) -> None:
    raise AssertionError("tokenized again")


def test_shared_cache_a_second_machine_takes_the_sets_that_the_first_made(
    store, sums, on_machine, monkeypatch
):
    on_machine("first")
    first = prepare_data(sums)
    on_machine("second")
    monkeypatch.setattr("trainers.data.preparation.Preparation.run", never)
    second = prepare_data(sums)
    assert second.audit == first.audit
    assert (second.train.input_ids == first.train.input_ids).all()
    assert len([name for name in store.listing() if name.endswith("manifest.json")]) == 1


def test_shared_cache_damaged_set_is_refused_with_its_object(store, sums, on_machine):
    on_machine("first")
    prepare_data(sums)
    (name,) = (n for n in store.listing() if n.endswith("train/input_ids.npy"))
    store.write(name, b"not it")
    on_machine("second")
    with pytest.raises(StoreError, match=r"train/input_ids.npy: must hold the [\d,]+ bytes"):
        prepare_data(sums)
