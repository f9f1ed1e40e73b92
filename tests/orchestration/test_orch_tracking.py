"""Trackers for real: what they left on disk, read back in the formats' own terms."""

import json
import os
import subprocess
import sys

import pytest

from orchestration.tracking import make_trackers
from tests.orchestration.sweeps import ROOT
from tests.orchestration.tracked import (
    EXAMPLES,
    events,
    expected_series,
    track,
    wandb_history,
    wandb_records,
)
from trainers.paths import RunPaths


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


NO_KEY = """
from pathlib import Path
from orchestration.tracking import make_trackers
from tests.orchestration.tracked import record
from trainers.paths import RunPaths
(tracker,) = make_trackers(["wandb"], "sweep", RunPaths(Path("runs/x")))
tracker.update(record("a", 1))
tracker.finish(record("a", 3, "finished"))
"""


def test_wandb_without_a_key_stays_offline_and_says_so(tmp_path):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    places = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", NO_KEY],
        cwd=tmp_path,
        env=kept | places,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert done.stderr == (
        "wandb: no API key, runs stay offline in runs/x/wandb; wandb sync sends them\n"
    )
    (file,) = (tmp_path / "runs" / "x").rglob("*.wandb")
    steps = [row["_step"] for row in wandb_history(list(wandb_records(file)))]
    assert (file.parent.name[:12], steps) == ("offline-run-", list(EXAMPLES))
