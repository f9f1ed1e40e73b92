"""Entries of the cache that are damaged on disk: said, and made again, never trained on."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.spoilers import emptied, flipped, truncated
from trainers.data import DataSpec, count_tokens
from trainers.data.cache import cache_root, check_once
from trainers.data.prepared import PreparedData, cached_audit, prepare_data
from trainers.speed import measured_once

SPOILERS = (truncated, flipped, emptied)


def prepared_by_another_process(spec: DataSpec) -> PreparedData:
    check_once.cache_clear()  # a process looks once
    return prepare_data(spec)


def content(data: PreparedData) -> list[np.ndarray]:
    return [np.array(part.input_ids) for part in (data.train, data.eval)]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_cache_set_with_a_damaged_file_is_said_and_made_again(sums, spoil, capsys):
    whole = content(prepare_data(sums))
    (folder,) = (cache_root() / "sets").iterdir()
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(names) > 10
    for name in names:
        spoil(folder / name)
        again = content(prepared_by_another_process(sums))
        assert all(map(np.array_equal, again, whole))
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert said[0].startswith(f"the cache's {folder / name}: ")
        assert said[0].endswith("it is made again")
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    prepared_by_another_process(sums)
    assert capsys.readouterr().err == ""


def test_cache_set_with_a_damaged_audit_is_not_planned_by(sums, capsys):
    prepare_data(sums)
    (folder,) = (cache_root() / "sets").iterdir()
    flipped(folder / "audit.json")
    assert cached_audit(sums) is None
    assert str(folder / "audit.json") in capsys.readouterr().err


def counted(spec: DataSpec) -> int:
    return count_tokens(spec.data, spec.model)


def measured(_: DataSpec) -> int:
    path = cache_root() / "speed" / "measurement.json"
    return measured_once(path, lambda: {"max_tokens": 512})["max_tokens"]


@pytest.mark.parametrize("spoil", SPOILERS)
@pytest.mark.parametrize(("asked", "kind"), [(counted, "counts"), (measured, "speed")])
def test_cache_entry_that_is_damaged_is_said_and_made_again(
    sums, spoil, asked: Callable[[DataSpec], int], kind, capsys
):
    first = asked(sums)
    (entry,) = (cache_root() / kind).glob("*.json")
    whole = entry.read_bytes()
    spoil(entry)
    capsys.readouterr()
    assert asked(sums) == first
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"the cache's {entry}: ")
    assert entry.read_bytes() == whole
