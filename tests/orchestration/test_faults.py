"""What kills, starves or damages a real sweep, and that it ends in the numbers of an undisturbed one."""

import subprocess
from pathlib import Path

import pytest

from tests.orchestration.sweeps import (
    ROOT,
    WHOLE,
    ended,
    losses,
    resume,
    start,
    statuses,
    told,
    wait_until,
    write_config,
)
from tests.orchestration.test_orch_resume import assert_gone, kill, one_ended_one_begun, rungs
from tests.spoilers import flipped
from trainers.integrity import check_folder
from trainers.paths import read_state

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults]
INJECTED = Path(__file__).with_name("injected")
RATES = WHOLE["learning_rate"]


def ended_with(folder: Path, fault: str) -> subprocess.CompletedProcess[str]:
    """Runs a sweep to its end, with a fault in its workers (see injected/sitecustomize.py)."""
    places = {"TENFOLD_TEST_FAULT": fault, "PYTHONPATH": f"{INJECTED}:{ROOT}"}
    return ended(start(folder, "sweep", "sweep.yaml", **places))


def assert_as_whole(folder: Path, run: Path) -> None:
    """Every trial finished with the numbers of the undisturbed sweep, and so did the scheduler."""
    whole = folder / "runs" / "whole"
    assert {status["status"] for status in statuses(run).values()} == {"finished"}
    assert losses(run) == losses(whole)
    assert rungs(run) == rungs(whole)
    check_folder(run / "best")


def rate_of(run: Path, name: str) -> float:
    return read_state(run / "trials" / name / "config.json")["candidate"]["learning_rate"]


def test_sweep_whose_worker_is_killed_at_some_steps_ends_in_undisturbed_numbers(whole_folder):
    run, numbers = write_config(whole_folder, name="killed", **WHOLE), (1, 17)
    done = ended_with(
        whole_folder, f"kill-once {whole_folder / 'mark'} {' '.join(map(str, numbers))}"
    )
    assert done.returncode == 0, told(done)
    assert all((whole_folder / f"mark-{number}").exists() for number in numbers)
    assert_as_whole(whole_folder, run)


def is_writing(run: Path) -> bool:
    return any(run.glob("trials/*/.checkpoint.*.tmp"))


def has_no_checkpoint(run: Path) -> bool:
    return (run / "packs.json").is_file() and not any(run.glob("trials/*/checkpoint"))


def with_previous(run: Path) -> list[Path]:
    """Trials that have no end, and more than one checkpoint."""
    kept = (path.parent for path in run.glob("trials/*/.checkpoint.old"))
    return [t for t in kept if (t / "checkpoint").is_dir() and not (t / "status.json").exists()]


def has_ended_begun_and_previous(run: Path) -> bool:
    return run.exists() and one_ended_one_begun(run) and bool(with_previous(run))


def test_sweep_killed_at_three_moments_and_damaged_ends_in_undisturbed_numbers(whole_folder):
    run, command = write_config(whole_folder, name="driver", **WHOLE), ("sweep", "sweep.yaml")
    for moment in (has_no_checkpoint, is_writing, has_ended_begun_and_previous):
        driver = start(whole_folder, *command)
        wait_until(lambda moment=moment: moment(run), driver)
        if moment is has_ended_begun_and_previous:
            refused = resume(whole_folder, run.name)
            assert refused.returncode == 2, told(refused)
            assert "being driven by another process" in refused.stderr
        assert_gone(kill(driver))
        command = ("resume", "runs/driver")
    over = sorted(statuses(run))
    flipped(with_previous(run)[0] / "checkpoint" / "adapter_model.safetensors")
    flipped(run / "trials" / over[0] / "status.json")
    flipped(run / "trials" / over[0] / "metrics.jsonl")
    flipped(run / "trials" / over[0] / "best" / "adapter_model.safetensors")
    done = resume(whole_folder, run.name)
    assert done.returncode == 0, told(done)
    text = " ".join(done.stdout.split())
    assert "adapter_model.safetensors: its SHA-256 is not the one that was written down" in text
    assert "the checkpoint before it is taken, of" in text, text
    assert "status.json: must end in the checksum of what it holds" in text
    assert "is damaged; the rows of the trial's checkpoint are taken" in text
    assert_as_whole(whole_folder, run)
    assert not list(run.rglob("*.tmp"))
    assert "Damaged files" in (run / "report.html").read_text()
    _refuses_other_data(whole_folder, run)
    flipped(run / "plan.json")
    refused = resume(whole_folder, run.name)
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    assert "plan.json: must end in the checksum of what it holds" in line


def _refuses_other_data(folder: Path, run: Path) -> None:
    """A run that has ended stays as it is, with its data and with others."""
    again = resume(folder, run.name)
    assert again.returncode == 0, told(again)
    assert_as_whole(folder, run)
    data = folder / "functions.jsonl"
    before = data.read_bytes()
    with data.open("a") as file:
        file.write('{"prompt": "def f():", "completion": " return 1"}\n')
    edited = resume(folder, run.name)
    data.write_bytes(before)
    assert edited.returncode == 2, told(edited)
    assert "must plan the same" in edited.stderr
    assert_as_whole(folder, run)


KILLER = 5e-3


def test_sweep_with_an_adapter_without_memory_and_one_that_kills_ends_the_others(whole_folder):
    # Without memory: forwards are halved, and the adapter for which that is not enough fails alone.
    run = write_config(
        whole_folder, name="both", **WHOLE | {"pack_size": 4, "learning_rate": [*RATES, KILLER]}
    )
    done = ended_with(whole_folder, f"no-room 512; no-room-for {RATES[1]}; kill {KILLER} 3")
    assert done.returncode == 0, told(done)
    ends = {rate_of(run, name): status for name, status in statuses(run).items()}
    assert [ends[rate]["status"] for rate in RATES] == ["finished", "failed", "finished"]
    assert f"tried to allocate {1 << 50} bytes" in ends[RATES[1]]["reason"]
    assert ends[KILLER]["status"] == "failed"
    assert "at last with no other trial beside it" in ends[KILLER]["reason"]
    found, expected = losses(run), losses(whole_folder / "runs" / "whole")
    for name in found:
        if rate_of(run, name) in (RATES[0], RATES[2]):  # by rounding alone: in other forwards
            assert found[name] == [(n, pytest.approx(x, abs=1e-4)) for n, x in expected[name]]
