"""A sweep that is steered while it runs: a trial stopped, others cloned, its driver killed, and the resume."""

import os
import signal

import pytest

from orchestration.status import status_of
from orchestration.trial_verb import clone_trial, stop_trial
from tests.orchestration.sweeps import (
    SHORT,
    ended,
    rows,
    start,
    statuses,
    told,
    wait_until,
    write_config,
)
from tests.orchestration.watched import STUBS
from trainers.paths import RunPaths, read_state

pytestmark = [pytest.mark.ray, pytest.mark.slow]
WHOLE_TRIAL = list(range(0, 161, 32))


def names_by_rate(run) -> dict[float, str]:
    configs = (read_state(path) for path in run.glob("trials/*/config.json"))
    return {config["candidate"]["learning_rate"]: config["name"] for config in configs}


def test_sweep_with_a_stopped_and_two_cloned_trials_killed_and_resumed_ends_with_exactly_those(
    tmp_path,
):
    run = write_config(tmp_path, **SHORT | {"pack_size": 2, "cpus_per_worker": 2})
    place, paced = str(run), {"module": STUBS, "TENFOLD_STUB_PACE_S": "0.7"}
    driver = start(tmp_path, "sweep", "sweep.yaml", **paced)
    wait_until(lambda: any(run.glob("trials/*/evaluated")), driver)
    first = names_by_rate(run)
    assert len(first) == 3
    begun = min(name for name in first.values() if (run / "trials" / name / "evaluated").exists())

    (line,) = stop_trial(place, begun)
    assert line.startswith(f"{begun}: stop"), line
    of = min(name for name in first.values() if name != begun)
    live, lines = clone_trial(place, of, {"learning_rate": 2e-3})
    assert lines[0].startswith(f"{live}: cloned of {of}"), lines
    status = status_of(place)
    assert (status["state"], status["num_trials"]) == ("running", 4)
    assert status["driver"]["pid"] == driver.pid
    wait_until(lambda: begun in statuses(run), driver)
    stopped = statuses(run)[begun]
    assert stopped["status"] == "stopped"
    assert stopped["reason"].endswith("(tenfold trial stop)")
    os.kill(driver.pid, signal.SIGKILL)
    ended(driver)

    assert status_of(place)["state"] == "interrupted"
    assert live not in statuses(run)
    late, lines = clone_trial(place, begun, {"learning_rate": 4e-3})
    assert "`tenfold resume" in lines[0]
    done = ended(start(tmp_path, "resume", "runs/run", **paced))
    assert done.returncode == 0, told(done)
    after = statuses(run)
    assert after.keys() == {*first.values(), live, late}
    assert after.pop(begun) == stopped
    assert {one["status"] for one in after.values()} == {"finished"}
    for name in after:
        assert [row["examples"] for row in rows(run / "trials" / name)] == WHOLE_TRIAL
    assert read_state(RunPaths(run).trial(late).clone)["of"] == begun
    assert live in done.stdout
    status = status_of(place)
    assert (status["state"], status["counts"]) == ("ended", {"finished": 4, "stopped": 1})
    assert status["goes_on_by"] is None
