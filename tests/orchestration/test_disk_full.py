"""A run's file system that takes nothing more: a small tmpfs, filled to its last byte while a sweep saves."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration.cli import main
from orchestration.exit_codes import BAD_INPUT
from orchestration.rungs import RungLedger, RungRecord
from tests.orchestration.sweeps import (
    WHOLE,
    ended,
    losses,
    processes_of,
    start,
    statuses,
    told,
    wait_until,
    write_config,
)
from trainers.integrity import check_folder
from trainers.paths import RunPaths, write_state, write_text


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leaves no byte; what is written next meets a full disk."""
    filler = folder / "filler"
    descriptor = os.open(filler, os.O_CREAT | os.O_WRONLY)
    for size in (1 << 16, 1 << 8, 1):
        while has_room(descriptor, size):
            pass
    os.close(descriptor)
    return filler


def has_room(descriptor: int, size: int) -> bool:
    try:
        return os.write(descriptor, b"x" * size) > 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False


def test_write_on_a_full_disk_names_the_file_and_leaves_what_was_there(small):
    path = small / "status.json"
    write_state(path, {"status": "running"})
    before = path.read_bytes()
    fill(small)
    with pytest.raises(OSError, match=r"No space left on device: '.*/status\.json'"):
        write_text(path, "x" * 5000)
    assert path.read_bytes() == before
    assert sorted(found.name for found in small.iterdir()) == ["filler", "status.json"]


def test_decision_on_a_full_disk_is_not_half_there_when_there_is_room_again(small):
    ledger = RungLedger(RunPaths(small).rungs)
    record = RungRecord(trial="a" * 3000, examples=16, eval_loss=1.0, decision="CONTINUE")
    ledger.append(record)
    filler = fill(small)

    def append_more() -> None:
        for _ in range(3):  # a page that is begun still has room
            ledger.append(record)

    with pytest.raises(OSError, match=r"rungs\.jsonl"):
        append_more()
    written = len(RungLedger(ledger.path).records())
    filler.unlink()
    ledger.append(record)
    assert len(RungLedger(ledger.path).records()) == written + 1
    again = RungLedger(ledger.path)
    again.records()
    assert again.damaged == []


def test_command_that_meets_a_full_disk_says_so_in_one_line(small, monkeypatch, capsys):
    def full(*_: object) -> None:
        write_text(small / "report.html", "x" * 5000)

    fill(small)
    monkeypatch.setattr("orchestration.cli._report", full)
    assert main(["report", str(small)]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tenfold: {small}/report.html: No space left on device; ")
    assert line.endswith("`tenfold resume` goes on")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.faults
def test_sweep_whose_disk_fills_ends_with_a_clear_line_and_resumes_to_the_same_numbers(
    whole_folder, small
):
    folder, run = whole_folder, small / "runs" / "run"
    write_config(folder, storage=str(small / "runs"), **WHOLE)
    sweep = start(folder, "sweep", "sweep.yaml")
    wait_until(lambda: statuses(run) and len(list(run.glob("trials/*/checkpoint"))) > 1, sweep)
    filler = fill(small)
    done = ended(sweep)
    assert done.returncode == BAD_INPUT, told(done)
    line = done.stderr.strip().splitlines()[-1]
    assert "No space left on device" in line
    assert line.endswith("`tenfold resume` goes on from the last checkpoints")
    assert "Traceback" not in done.stderr, told(done)
    assert not processes_of(folder)
    before = statuses(run)
    assert {status["status"] for status in before.values()} <= {"finished"}
    for checkpoint in run.glob("trials/*/checkpoint"):
        check_folder(checkpoint)

    kept = {name: _written(run, name) for name in before}
    filler.unlink()
    done = ended(start(folder, "resume", str(run)))
    assert done.returncode == 0, told(done)
    assert {name: _written(run, name) for name in before} == kept  # not trained again
    assert {status["status"] for status in statuses(run).values()} == {"finished"}
    assert losses(run) == losses(folder / "runs" / "whole")


def _written(run: Path, name: str) -> tuple[int, int]:
    found = (run / "trials" / name / "metrics.jsonl").stat()
    return found.st_ino, found.st_mtime_ns
