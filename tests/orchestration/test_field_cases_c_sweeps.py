"""Field cases of sweeps (part C) that only a whole `tenfold sweep` shows: killed, interrupted, and with trials of
several workers each."""

import json
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.orchestration.sweeps import (
    ended,
    processes_of,
    rows,
    start,
    statuses,
    sweep,
    told,
    wait_until,
    write_config,
)
from tests.orchestration.watched import STUBS

pytestmark = pytest.mark.ray


def evaluated(run: Path) -> Counter[tuple[str, str]]:
    """How often each (trial, examples) was evaluated by any worker."""
    found: Counter[tuple[str, str]] = Counter()
    for path in run.glob("trials/*/evaluated"):
        found.update((path.parent.name, line.split()[1]) for line in path.read_text().splitlines())
    return found


@pytest.mark.slow
@pytest.mark.faults
def test_c12_sweep_of_20_points_killed_at_three_moments_repeats_no_trial_and_loses_none(tmp_path):
    # Field case C12: 20-point stub sweep of 1 s trials (2 in the case), kill -9 of the driver, three times.
    rates = {"low": 1e-4, "high": 1e-2, "num": 20}
    config = {"lora_rank": 4, "learning_rate": rates, "examples": 32, "eval_every": 16}
    config |= {"quantization": "none", "dtype": "fp32", "pack_size": 1, "scheduler": "asha"}
    config |= {"cpus_per_worker": 2}  # one group: four starts are what takes long here
    run = write_config(tmp_path, **config)
    paced = {"module": STUBS, "TENFOLD_STUB_PACE_S": "0.5"}
    command = ("sweep", "sweep.yaml")
    for num_evaluated, num_ended in ((1, 0), (0, 4), (0, 12)):
        driver = start(tmp_path, *command, **paced)
        wait_until(
            lambda a=num_evaluated, b=num_ended: (
                evaluated(run).total() >= a and len(statuses(run)) >= b
            ),
            driver,
        )
        _kill(driver)
        before = statuses(run)
        counts = {at: n for at, n in evaluated(run).items() if at[0] in before}
        command = ("resume", "runs/run")
    done = ended(start(tmp_path, *command, **paced))
    assert done.returncode == 0, told(done)
    after = statuses(run)
    assert len(after) == len(list((run / "trials").iterdir())) == 20
    assert {status["status"] for status in after.values()} <= {"finished", "stopped"}
    assert {name: after[name] for name in before} == before
    assert {at: n for at, n in evaluated(run).items() if at[0] in before} == counts
    for name, status in after.items():
        steps = [row["examples"] for row in rows(run / "trials" / name)]
        assert steps == [0, 16, 32][: len(steps)]
        assert steps[-1] == status["examples"]


def _kill(driver: subprocess.Popen[str]) -> None:
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.faults
def test_c09_c11_solo_trials_of_two_workers_on_three_rows_finish_and_leave_nothing(tmp_path):
    # Field case C09: 2 CPUs, 2 trials of 2 workers. Field case C11: 2 workers, 3 rows (uneven).
    for name in ("train", "eval"):
        lines = [{"prompt": f"{name} {n}?", "completion": f" It is {n}."} for n in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    config = {"data": "train.jsonl", "eval": "eval.jsonl", "engine": "solo", "scheduler": "fifo"}
    config |= {"workers_per_trial": 2, "cpus_per_worker": 1, "global_batch_size": 2}
    config |= {"lora_rank": 4, "learning_rate": [1e-3, 3e-3], "examples": 5, "eval_every": 2}
    run, done = sweep(tmp_path, quantization="none", dtype="fp32", **config)
    assert done.returncode == 0, told(done)
    assert [status["status"] for status in statuses(run).values()] == ["finished"] * 2
    for trial in (run / "trials").iterdir():
        assert [row["examples"] for row in rows(trial)] == [0, 2, 4, 5]
    assert not processes_of(tmp_path)
