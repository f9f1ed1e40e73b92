"""A whole sweep of which every trial diverges: a readable end, a report, and nothing to train again."""

import pytest

from tests.orchestration.sweeps import (
    processes_of,
    resume,
    statuses,
    sweep,
    told,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults]


@pytest.mark.parametrize("engine", ["packed", "solo"])
def test_sweep_whose_trials_all_diverge_says_so_and_exits_with_1_also_when_resumed(
    tmp_path, engine
):
    config = {"lora_rank": 4, "learning_rate": [1e14, 1e15], "max_grad_norm": 0, "examples": 64}
    config |= {"quantization": "none", "dtype": "fp32", "scheduler": "asha", "engine": engine}
    config |= {"cpus_per_worker": 2, "eval": 0.01}
    run, done = sweep(tmp_path, **config)
    assert done.returncode == 1, told(done)
    assert "no trial ended with a usable score" in done.stdout.splitlines()
    assert done.stderr == ""
    found = statuses(run)
    assert [status["status"] for status in found.values()] == ["diverged"] * 2
    for status in found.values():
        assert " at step " in status["reason"]
        assert "nan" in status["reason"] or "inf" in status["reason"]
        assert status["examples"] < 64
    page = (run / "report.html").read_text()
    assert page.count("diverged") >= 2
    assert not (run / "best").exists()
    files = [path for path in (run / "trials").rglob("*.json*") if path.is_file()]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}
    again = resume(tmp_path)
    assert again.returncode == 1, told(again)
    assert "no trial ended with a usable score" in again.stdout.splitlines()
    after = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}
    assert after == before
    assert not processes_of(tmp_path)
