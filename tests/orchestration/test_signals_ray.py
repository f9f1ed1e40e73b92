"""SIGINT and SIGTERM to `tenfold` while Ray starts, in a sweep and in a study; test_signals.py has those before."""

import os
import signal
from pathlib import Path

import pytest

from tests.orchestration.sweeps import (
    ended,
    processes_of,
    rows,
    start,
    statuses,
    told,
    write_config,
)
from tests.orchestration.test_signals import SWEEP
from tests.orchestration.watched import (
    STUBS,
    Watched,
    assert_goes_on,
    one_line_with,
)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "process"),
    [(signal.SIGINT, "gcs_server"), (signal.SIGTERM, "dashboard/agent.py")],
    ids=["SIGINT-gcs", "SIGTERM-agents"],  # agents live on for a minute or two without their raylet
)
def test_signal_while_ray_starts_ends_what_it_had_started(tmp_path, number, process):
    run = write_config(tmp_path, **SWEEP)
    watched = Watched(start(tmp_path, "sweep", "sweep.yaml", own_session=True))
    watched.wait_for(lambda: watched.runs(process))
    done = watched.interrupted(number, group=number == signal.SIGINT)  # as a terminal sends it
    assert one_line_with("tenfold: interrupted; nothing was trained: the same command", done)
    assert not run.exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("process", ["gcs_server", "dashboard/agent.py"])
def test_sigterm_to_every_process_while_ray_starts_leaves_none(tmp_path, process):
    # As Slurm and systemd send it. Ray may wait for ever for a server of its own that has just ended.
    run = write_config(tmp_path, **SWEEP)
    watched = Watched(start(tmp_path, "sweep", "sweep.yaml", own_session=True))
    watched.wait_for(lambda: watched.runs(process))
    done = watched.interrupted(signal.SIGTERM, group=True)
    assert "Traceback" not in done.stderr
    assert not run.exists()


LONG = SWEEP | {"examples": 640}
"""Trials that no signal's end outlasts."""


def _driven(folder: Path, *command: str, **variables: str) -> Watched:
    """A `tenfold` with stub workers, as a terminal starts it."""
    paced = {"TENFOLD_STUB_PACE_S": "0.5"} | variables
    return Watched(start(folder, *command, module=STUBS, own_session=True, **paced))


def _in_a_rung(folder: Path, *command: str, **variables: str) -> Watched:
    """A driver whose workers have just told more evaluations of a run."""
    run = folder / "runs" / "run"
    before = _num_rows(run)
    watched = _driven(folder, *command, **variables)
    watched.wait_for(lambda: _num_rows(run) >= before + 4)
    return watched


def _writing_its_report(folder: Path) -> Watched:
    held = folder / "report-held"
    held.touch()
    watched = _driven(
        folder, "resume", "runs/run", TENFOLD_STUB_PACE_S="0", TENFOLD_STUB_REPORT_HELD=str(held)
    )
    watched.wait_for(lambda: list(folder.glob("report-held.*")))
    return watched


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.faults
def test_c15_run_that_signals_end_again_and_again_goes_on_to_its_end(tmp_path):
    run, held = write_config(tmp_path, **LONG), tmp_path / "held"
    held.touch()
    watched = _driven(tmp_path, "sweep", "sweep.yaml", TENFOLD_STUB_HELD=str(held))
    watched.wait_for(lambda: list(tmp_path.glob("held.*")))  # its workers load
    watched.interrupted(signal.SIGTERM)
    assert statuses(run) == {}
    _interrupt_twice(_in_a_rung(tmp_path, "resume", "runs/run"))
    before = _num_rows(run)
    # Field case C15: Ctrl-C to a stub trial with a DataLoader of 2 workers.
    watched = _in_a_rung(tmp_path, "resume", "runs/run", TENFOLD_STUB_LOADERS="2")
    loaders = [p for p in watched.look() if p.name() == "pt_data_worker"]
    assert len(loaders) >= 2, [p.name() for p in watched.below]
    done = watched.interrupted(signal.SIGINT, group=True)
    assert not processes_of(tmp_path)
    assert one_line_with("`tenfold resume runs/run` goes on", done)
    assert (run / "report.html").is_file()  # of what there is
    assert _num_rows(run) >= before + 4
    watched = _in_a_rung(tmp_path, "resume", "runs/run")
    done = watched.interrupted(signal.SIGTERM, group=True)  # as Slurm and systemd send it
    assert "failed" not in {status["status"] for status in statuses(run).values()}, told(done)
    done = _writing_its_report(tmp_path).interrupted(signal.SIGINT, group=True)
    assert_goes_on(tmp_path, done, LONG["examples"])


def _interrupt_twice(watched: Watched) -> None:
    """A second Ctrl-C ends at once."""
    driver = watched.process
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.stderr is not None
    assert "a second signal ends at once" in driver.stderr.readline()
    watched.look()
    os.killpg(driver.pid, signal.SIGINT)
    done = ended(driver)
    assert done.returncode == 130, told(done)
    words = "ended at once, without cleaning up; `tenfold resume runs/run` goes on"
    assert done.stderr == f"tenfold: {words}\n"
    watched.assert_gone()


@pytest.mark.slow
@pytest.mark.faults
def test_sigterm_to_a_study_without_ray_ends_the_processes_that_measure(tmp_path):
    watched = Watched(start(tmp_path, "study", "compute", "--preset", "smoke", "--name", "run"))
    watched.wait_for(lambda: watched.runs("trainers.step_cost"))
    done = watched.interrupted(signal.SIGTERM)
    assert one_line_with(
        "`tenfold study compute --preset smoke --name run` goes on with it", done
    ), told(done)


def _num_rows(run: Path) -> int:
    return sum(len(rows(trial)) for trial in run.glob("trials/*"))
