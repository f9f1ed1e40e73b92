"""A trial whose files on disk are damaged: it goes on from the checkpoint before, says so, and ends in the numbers
of an undisturbed one."""

import json
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from tests.spoilers import emptied, flipped, removed, truncated
from tests.trainers.links import FakeLink, enter
from tests.trainers.trials import numbers
from trainers.comm import Comm
from trainers.integrity import CHECKSUMS, check_folder, sound_rows
from trainers.mirror import fetch_folder, local_folder, opened
from trainers.pack_server import PackServer
from trainers.paths import TrialPaths, previous_of, read_json_lines, read_state
from trainers.remote_folder import MANIFEST, PREVIOUS
from trainers.sft_trainer import Station, TrialSpec, recorded_rows, train_trial

FILES = ("adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json", CHECKSUMS)


class Killed(Exception):
    pass


@pytest.fixture
def make(make, fp64):
    """make(name, ...): a trial with evaluations after 0, 4, 8 and 12 examples, one forward a step."""
    return partial(make, base=fp64, micro_batch_size=4)


@pytest.fixture
def whole(make):
    return numbers(train_trial(make("whole"), lambda row: True).rows)


def killed_at_8(spec: TrialSpec) -> TrialPaths:
    """A trial that died with checkpoints of 8 and, before it, of 4 examples."""

    def die(row) -> bool:
        if row["examples"] == 8:
            raise Killed
        return True

    with pytest.raises(Killed):
        train_trial(spec, die)
    paths = TrialPaths(spec.folder)
    check_folder(paths.checkpoint)
    check_folder(previous_of(paths.checkpoint))
    return paths


@pytest.mark.parametrize("spoil", [truncated, flipped, emptied, removed])
@pytest.mark.parametrize("file", FILES)
def test_damage_of_the_last_checkpoint_the_one_before_is_taken_and_said(make, whole, file, spoil):
    spec = make(f"{file} {spoil.__name__}")
    paths = killed_at_8(spec)
    spoil(paths.checkpoint / file)
    assert [row["examples"] for row in recorded_rows(spec)] == [4]
    told = []
    result = train_trial(spec, lambda row: told.append(row["examples"]) is None)
    assert result.status == "finished"
    assert told == [8, 12]  # not from scratch
    assert numbers(read_json_lines(paths.metrics)) == whole
    (note,) = [row["note"] for row in read_json_lines(paths.notes)]
    assert note.startswith(f"{paths.checkpoint / file}: ")
    assert note.endswith("; the checkpoint before it is taken, of 4 examples")
    check_folder(paths.checkpoint)
    check_folder(paths.best)
    assert not previous_of(paths.checkpoint).exists()


@pytest.fixture
def at_store(make, tmp_path, monkeypatch):
    """A trial of a run on an object store, killed at 8 examples with its process; and the folder of its
    checkpoint on the store."""
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    url = f"file://{tmp_path}/store/runs/run"

    def opened_again() -> TrialSpec:
        return replace(make("at store"), folder=local_folder(f"{url}/trials/t"))

    killed_at_8(opened_again())
    opened(url).close()
    yield opened_again(), tmp_path / "store" / "runs" / "run" / "trials" / "t" / "checkpoint"
    opened(url).close()


def objects(folder: Path, manifest: str) -> dict[str, Path]:
    """File of a folder on a store -> where it lies there."""
    files = json.loads((folder / manifest).read_text())["files"]
    return {name: folder / entry["object"] for name, entry in files.items()}


@pytest.mark.parametrize(
    ("file", "spoil"),
    [*product(FILES, [flipped, removed]), (MANIFEST, truncated), (MANIFEST, emptied)],
)
def test_damage_on_a_store_the_checkpoint_before_is_taken_and_said(at_store, whole, file, spoil):
    spec, folder = at_store
    found = objects(folder, MANIFEST) | {MANIFEST: folder / MANIFEST}
    spoil(found[file])
    assert [row["examples"] for row in recorded_rows(spec)] == [4]
    assert train_trial(spec, lambda row: True).status == "finished"
    paths = TrialPaths(spec.folder)
    assert numbers(read_json_lines(paths.metrics)) == whole
    (note,) = [row["note"] for row in read_json_lines(paths.notes)]
    assert note.startswith(f"{folder.as_uri()}/")
    assert note.endswith("; the checkpoint before it is taken, of 4 examples")
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    now = {path.relative_to(folder).as_posix() for path in objects(folder, MANIFEST).values()}
    assert left == {*now, MANIFEST}  # of an ended trial the last alone
    fetch_folder(paths.checkpoint)
    check_folder(paths.checkpoint)


def test_damage_on_a_store_of_both_checkpoints_fails_the_trial(at_store):
    spec, folder = at_store
    for manifest in (MANIFEST, PREVIOUS):
        flipped(objects(folder, manifest)["optimizer.safetensors"])
    result = train_trial(spec, lambda row: True)
    assert result.status == "failed"
    assert result.reason.startswith("no checkpoint is whole: ")
    assert result.reason.count("its SHA-256 is not the one that was written down") == 2


def test_damage_on_a_store_a_driver_that_dies_while_it_puts_back_loses_neither(
    at_store, whole, monkeypatch
):
    spec, folder = at_store
    flipped(objects(folder, MANIFEST)["adapter_model.safetensors"])
    store = opened(folder.parents[2].as_uri()).store
    write, written = store.write, []

    def dies(name: str, content: bytes, **flags: bool) -> bool:
        if name.endswith(PREVIOUS):
            raise Killed
        written.append(name)
        return write(name, content, **flags)

    monkeypatch.setattr(store, "write", dies)
    with pytest.raises(Killed):
        train_trial(spec, lambda row: True)
    monkeypatch.undo()
    assert written  # it had put the manifest there
    assert [row["examples"] for row in recorded_rows(spec)] == [4]
    assert train_trial(spec, lambda row: True).status == "finished"
    assert numbers(read_json_lines(TrialPaths(spec.folder).metrics)) == whole


@pytest.mark.parametrize("spoil", [truncated, flipped, emptied])
def test_damage_of_the_metrics_the_checkpoint_s_rows_are_taken_and_said(make, whole, spoil):
    spec = make(f"metrics {spoil.__name__}")
    paths = killed_at_8(spec)
    spoil(paths.metrics)
    _, damaged = sound_rows(paths.metrics)
    assert train_trial(spec, lambda row: True).status == "finished"
    assert numbers(read_json_lines(paths.metrics)) == whole
    assert len(read_json_lines(paths.notes)) == len(damaged) == (spoil is not emptied)


def test_damage_of_both_checkpoints_fails_the_trial_and_no_neighbour(make, whole):
    bad, good = make("bad"), make("good")
    paths = killed_at_8(bad)
    for folder in (paths.checkpoint, previous_of(paths.checkpoint)):
        flipped(folder / "optimizer.safetensors")
    link = FakeLink([enter(bad), enter(good)])
    PackServer(link, Comm(), Station).serve()
    assert link.end(bad)["status"] == "failed"
    assert link.end(bad)["reason"].startswith("no checkpoint is whole: ")
    assert link.end(bad)["reason"].count("its SHA-256 is not the one that was written down") == 2
    assert read_state(paths.status)["status"] == "failed"
    assert link.end(good)["status"] == "finished"
    losses = [row["eval_loss"] for row in link.rows(good)]
    assert losses == pytest.approx([row["eval_loss"] for row in whole[1:]], abs=1e-9)


def test_damage_that_took_every_checkpoint_away_is_said_before_the_trial_begins_again(make, whole):
    spec = make("gone")
    paths = killed_at_8(spec)
    for folder in (paths.checkpoint, previous_of(paths.checkpoint)):
        folder.rename(folder.with_name(f"{folder.name} elsewhere"))
    train_trial(spec, lambda row: True)
    assert numbers(read_json_lines(paths.metrics)) == whole
    notes = [row["note"] for row in read_json_lines(paths.notes)]
    assert notes == ["no checkpoint is left; the trial begins again"]
