"""Trackers for real: what they left on disk, read back in the formats' own terms."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from orchestration.results import TrialRecord
from orchestration.tracking import make_trackers
from trainers.paths import RunPaths

ROOT = Path(__file__).resolve().parents[2]
WANDB_HEADER_BYTES = 7
LEVELDB_BLOCK_BYTES = 32 * 1024
LEVELDB_FULL, LEVELDB_LAST = 1, 4
EXAMPLES = (0, 16, 32)


def row(examples: int, offset: float = 0.0) -> dict:
    """The row of the untouched base has no train_loss."""
    return {
        "examples": examples,
        "steps": examples // 16,
        "tokens": 10 * examples,
        "train_loss": None if examples == 0 else 3.0 - examples / 64 + offset,
        "eval_loss": 3.5 - examples / 64 + offset,
        "lr": 0.001,
        "seconds": 1.0,
    }


def record(
    name: str, num_rows: int, status: str = "unfinished", offset: float = 0.0
) -> TrialRecord:
    return TrialRecord(
        name=name,
        candidate={"lora_rank": 4, "target": ["attn", "mlp"]},
        status=status,
        reason="",
        rows=tuple(row(examples, offset) for examples in EXAMPLES[:num_rows]),
    )


def track(kind: str, folder: Path) -> None:
    """Two trials that run at the same time, updated more often than they have rows."""
    (tracker,) = make_trackers([kind], "sweep", RunPaths(folder))
    for num_rows in (1, 2, 2, 3):
        tracker.update(record("r4-attn+mlp-a", num_rows))
        tracker.update(record("r4-attn+mlp-b", num_rows, offset=0.25))
    for name, status, offset in (("a", "finished", 0.0), ("b", "stopped", 0.25)):
        tracker.finish(record(f"r4-attn+mlp-{name}", 3, status, offset))


def expected_series(metric: str, offset: float = 0.0) -> list[tuple[int, float]]:
    rows = [row(examples, offset) for examples in EXAMPLES]
    return [(r["examples"], r[metric]) for r in rows if r[metric] is not None]


def wandb_records(path: Path) -> Iterator:
    """Records of a .wandb file: a LevelDB log (crc, length, type; blocks of 32 KiB) after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), WANDB_HEADER_BYTES, b""
    assert data[:4] == b":W&B"
    while position < len(data):
        left = LEVELDB_BLOCK_BYTES - position % LEVELDB_BLOCK_BYTES
        if left < WANDB_HEADER_BYTES:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7
        parts += data[position : position + length]
        position += length
        if kind in (LEVELDB_FULL, LEVELDB_LAST):
            found = Record()
            found.ParseFromString(parts)
            parts = b""
            yield found


def wandb_history(records: list) -> list[dict]:
    """The logged rows, as JSON values by key."""
    rows = []
    for found in records:
        if found.WhichOneof("record_type") == "history":
            items = found.history.item
            rows.append(
                {
                    (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
                    for item in items
                }
            )
    return rows


@pytest.fixture(scope="module")
def wandb_files(tmp_path_factory) -> dict[str, list]:
    """run id -> records, of both trials tracked offline."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.delenv("WANDB_PROJECT", raising=False)
        for name in ("CONFIG", "CACHE", "DATA"):
            patch.setenv(f"WANDB_{name}_DIR", str(folder / name))
        track("wandb", folder / "run")
    found = {}
    for path in (folder / "run").rglob("*.wandb"):
        records = list(wandb_records(path))
        (started,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        found[started.run_id] = records
    return found


def started_run(records: list):
    return next(r.run for r in records if r.WhichOneof("record_type") == "run")


def test_wandb_offline_has_one_run_per_trial_in_the_group_of_the_sweep(wandb_files):
    assert sorted(wandb_files) == ["sweep-r4-attn_mlp-a", "sweep-r4-attn_mlp-b"]
    for run_id, records in wandb_files.items():
        started = started_run(records)
        assert (started.run_group, started.project) == ("sweep", "tenfold")
        assert started.display_name == f"r4-attn+mlp-{run_id[-1]}"
        config = {item.key: json.loads(item.value_json) for item in started.config.update}
        assert (config["lora_rank"], config["target"]) == (4, ["attn", "mlp"])


@pytest.mark.parametrize(
    ("run_id", "offset"), [("sweep-r4-attn_mlp-a", 0.0), ("sweep-r4-attn_mlp-b", 0.25)]
)
def test_wandb_offline_rows_are_logged_once_with_examples_as_the_step(wandb_files, run_id, offset):
    rows = wandb_history(wandb_files[run_id])
    assert [logged["_step"] for logged in rows] == list(EXAMPLES)
    for metric in ("eval_loss", "train_loss", "lr", "tokens"):
        found = [(logged["_step"], logged[metric]) for logged in rows if metric in logged]
        assert found == expected_series(metric, offset)


def test_wandb_offline_summary_says_how_the_trial_ended(wandb_files):
    for name, status in (("a", "finished"), ("b", "stopped")):
        records = wandb_files[f"sweep-r4-attn_mlp-{name}"]
        updates = [
            item
            for found in records
            if found.WhichOneof("record_type") == "summary"
            for item in found.summary.update
        ]
        summary = {(u.key or ".".join(u.nested_key)): json.loads(u.value_json) for u in updates}
        assert summary["status"] == status
        assert records[-1].WhichOneof("record_type") in ("exit", "final", "footer")


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value) of a folder's one event file: TFRecords of Event messages."""
    (path,) = folder.iterdir()
    data, position = path.read_bytes(), 0
    series: dict[str, list[tuple[int, float]]] = {}
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        event = Event()
        event.ParseFromString(data[position + 12 : position + 12 + length])
        position += 12 + length + 4
        for value in event.summary.value:
            series.setdefault(value.tag, []).append((event.step, value.simple_value))
    return series


def test_tensorboard_rows_are_written_once_for_each_trial(tmp_path):
    track("tensorboard", tmp_path)
    folders = tmp_path / "tensorboard"
    assert sorted(path.name for path in folders.iterdir()) == ["r4-attn+mlp-a", "r4-attn+mlp-b"]
    for name, offset in (("a", 0.0), ("b", 0.25)):
        series = events(folders / f"r4-attn+mlp-{name}")
        assert set(series) == {"train_loss", "eval_loss", "lr", "tokens"}
        for metric in ("train_loss", "eval_loss"):
            assert series[metric] == expected_series(metric, offset)  # exact in float32
        assert series["lr"] == [(examples, pytest.approx(0.001)) for examples in EXAMPLES]


def test_make_trackers_unknown_name_is_refused_with_the_known(tmp_path):
    with pytest.raises(ValueError, match="must be among wandb, tensorboard, got mlflow"):
        make_trackers(["tensorboard", "mlflow"], "sweep", RunPaths(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_make_trackers_of_none_is_empty(tmp_path):
    assert make_trackers([], "sweep", RunPaths(tmp_path)) == []


def test_wandb_without_a_key_stays_offline_and_says_so(tmp_path):
    code = (
        "from pathlib import Path\nfrom orchestration.tracking import make_trackers\n"
        "from trainers.paths import RunPaths\n"
        "(tracker,) = make_trackers(['wandb'], 'sweep', RunPaths(Path('runs/x')))\n"
        "print(tracker.mode)"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    places = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=kept | places,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "offline\n"
    assert done.stderr == (
        "wandb: no API key, runs stay offline in runs/x/wandb; wandb sync sends them\n"
    )
