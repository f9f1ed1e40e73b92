"""Sweeps and studies by rewards as users run them: killed, gone on with, reported, exported."""

import signal
from pathlib import Path

import pytest

from orchestration.results import best_trial, read_trials
from tests.orchestration.sweeps import (
    ROOT,
    ended,
    losses,
    resume,
    rows,
    start,
    statuses,
    told,
    wait_until,
    write_config,
)
from trainers.integrity import check_folder
from trainers.paths import RunPaths, read_json

pytestmark = [pytest.mark.ray, pytest.mark.slow]
TASK = ROOT / "trainers" / "assets" / "rl" / "parameters.jsonl"
RL = {
    "data": str(TASK),
    "method": "rl",
    "reward": r"regex:\A (\w+)\W",
    "num_generations": 8,
    "max_completion_length": 6,
    "seq_len": 64,
    "eval": 0.05,
    "examples": 192,
    "eval_every": 48,
    "quantization": "none",
    "dtype": "fp32",
    "cpus_per_worker": 2,
}


def test_rl_sweep_killed_and_resumed_stops_the_poor_ends_and_exports_the_best(tmp_path):
    # The grid begins next to the prior, and two places are left to the poor ones when there is what beats them: of
    # four at once, whoever comes to a rung first goes on.
    config = RL | {"lora_rank": 4, "learning_rate": [1e-9, 1e-8, 3e-3, 4e-3], "pack_size": 2}
    run = write_config(tmp_path, **config, reduction_factor=2)
    driver = start(tmp_path, "sweep", "sweep.yaml")
    wait_until(lambda: any(run.glob("trials/*/checkpoint/trainer_state.json")), driver)
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=60)
    before = losses(run)
    assert statuses(run).keys() < before.keys()
    done = resume(tmp_path)
    assert done.returncode == 0, told(done)
    records = read_trials(RunPaths(run))
    ends = {record.candidate["learning_rate"]: record.status for record in records}
    assert (ends[1e-9], ends[1e-8]) == ("stopped", "stopped")
    assert set(ends.values()) == {"finished", "stopped"}
    for name, status in statuses(run).items():
        assert (status["examples"] < 192) == (status["status"] == "stopped")
        assert (run / "trials" / name / "best" / "adapter_model.safetensors").exists()
    after = losses(run)
    assert all(after[name][: len(each) - 1] == each[:-1] for name, each in before.items() if each)
    best = best_trial(records)
    assert best is not None
    assert best.candidate["learning_rate"] >= 3e-3
    assert best.best is not None
    assert best.best["eval_reward"] > 0.1
    assert best.best["episodes"] == best.best["examples"] * 8
    for words in ("eval_reward", f"{best.best['eval_reward']:.4f}"):
        assert words in done.stdout
    assert "eval_reward" in (run / "report.html").read_text()
    check_folder(run / "best")
    merged = ended(start(tmp_path, "export", "runs/run", "--merge"))
    assert merged.returncode == 0, told(merged)
    assert list((run / "export" / "merged").glob("*.safetensors"))


def test_rl_study_smoke_compares_the_arms_by_their_rewards_and_reruns_nothing(tmp_path):
    command = ("study", "rl", "--preset", "smoke", "--name", "s")
    done = ended(start(tmp_path, *command))
    assert done.returncode == 0, told(done)
    assert "Held-out reward by arm:" in done.stdout
    run = tmp_path / "runs" / "s"
    results = read_json(run / "results.json")
    assert results["status"] == "complete"
    assert results["objective"] == "eval_reward"
    assert {arm["method"] for arm in results["arms"]} == {"full", "lora"}
    points = [point for arm in results["arms"] for point in arm["points"]]
    assert {point["status"] for point in points} == {"finished"}
    assert all(-1 <= point["eval_loss"] <= 0 for point in points)
    measured = _mtimes(run)
    again = ended(start(tmp_path, *command))
    assert again.returncode == 0, told(again)
    assert _mtimes(run) == measured
    assert all(
        row["eval_loss"] == -row["eval_reward"] for t in run.glob("trials/*") for row in rows(t)
    )


def _mtimes(run: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in run.glob("trials/*/status.json")}
