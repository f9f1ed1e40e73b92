"""The lock that a run's workers hold: the next driver waits for it, and cleans up after them."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainers.paths import RunPaths
from trainers.run_lock import claim_folders, hold_run

HOLDER = """
import sys, time
from pathlib import Path
from trainers.run_lock import hold_run
with hold_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def run(tmp_path) -> RunPaths:
    run = RunPaths(tmp_path / "runs" / "r")
    run.trial("a").root.mkdir(parents=True)
    return run


@pytest.fixture
def holder(run):
    """A process that lives and holds the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.trial("a").root)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_run_of_living_workers_cannot_be_claimed_and_keeps_their_files(run, holder):
    half_written = run.trial("a").root / ".checkpoint.17.tmp"
    half_written.mkdir()
    with pytest.raises(ValueError, match=r"runs/r: the workers of an earlier driver must have"):
        claim_folders(run, lambda: None, wait_s=0.3)
    assert half_written.is_dir()


def test_run_is_claimed_when_its_last_worker_was_killed(run, holder):
    told = []

    def on_wait() -> None:
        told.append(holder.poll())
        holder.kill()

    claim_folders(run, on_wait)
    assert told == [None]  # it lived, and was said once to be waited for


def test_run_held_by_nobody_is_claimed_at_once_and_may_be_held_by_many(run):
    claim_folders(run, lambda: pytest.fail("nobody is there to wait for"))
    with hold_run(run.trial("a").root), hold_run(run.trial("b").root):
        pass
    claim_folders(run, lambda: pytest.fail("both let go"))


def test_claim_of_a_new_run_makes_its_folders(tmp_path):
    run = RunPaths(tmp_path / "new")
    claim_folders(run, lambda: pytest.fail("nobody is there to wait for"))
    assert run.trials.is_dir()


def test_claim_removes_what_was_left_half_written_and_nothing_else(run):
    trial = run.trial("a")
    for folder in (".checkpoint.17.tmp", ".checkpoint.18.gone", ".checkpoint.old", "checkpoint"):
        (trial.root / folder).mkdir()
        (trial.root / folder / "state").write_text("x")
    for file in (trial.root / ".status.json.17.tmp", run.root / ".results.json.17.tmp"):
        file.write_text("{")
    claim_folders(run, lambda: None)
    assert sorted(path.name for path in trial.root.iterdir()) == [".checkpoint.old", "checkpoint"]
    assert sorted(path.name for path in run.root.iterdir()) == [".workers", "trials"]
