"""Trackers that fail: the sweep is told in one line and goes on, and what was not sent is on disk."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import IO

import psutil
import pytest

from orchestration import tracking
from orchestration.tracking import make_trackers
from tests.orchestration.sweeps import wait_until
from tests.orchestration.tracked import (
    EXAMPLES,
    FakeWandb,
    WandbServer,
    events,
    record,
    row,
    track,
    wandb_history,
    wandb_records,
)
from trainers.paths import RunPaths

TRIALS = ("r4-attn+mlp-a", "r4-attn+mlp-b")
IDS = ("sweep-r4-attn_mlp-a", "sweep-r4-attn_mlp-b")
GOES_OFFLINE = "its runs go on offline in {}/wandb; wandb sync sends them"
GIVEN_UP = "nothing more is tracked there, the sweep goes on; its metrics are in {}/trials"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run's folder, of a user who is logged in."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    return RunPaths(tmp_path / "run")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request) -> FakeWandb:
    folder = tmp_path / "fake"
    folder.mkdir()
    made = FakeWandb(folder, getattr(request, "param", ""))
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        ("login raises", "RuntimeError: the network is unreachable at line 2"),
        ("init raises", "RuntimeError: the network is unreachable at line 2"),
        ("log raises", "RuntimeError: the network is unreachable at line 2"),
        ("finish raises", "RuntimeError: the network is unreachable at line 2"),
        ("log dies", "its process ended with exit code 139"),
        ("init hangs", "no answer within 6 s"),
        ("log hangs", "no answer within 6 s"),
        ("finish hangs", "no answer within 6 s"),
    ],
    indirect=["fake"],
)
def test_wandb_that_fails_goes_on_offline_with_every_row_and_is_told_once(
    run, fake, reason, capsys, monkeypatch
):
    if "hangs" in os.environ["FAKE_WANDB_FAULT"]:
        monkeypatch.setattr(tracking, "ANSWER_S", 6.0)
    track("wandb", run.root)
    assert one_line(capsys) == f"wandb: {reason}; {GOES_OFFLINE.format(run.root)}"
    for run_id, status in zip(IDS, ("finished", "stopped"), strict=True):
        logged = fake.calls("log", id=run_id, mode="offline")
        assert [call["step"] for call in logged] == list(EXAMPLES)
        (end,) = fake.calls("finish", id=run_id, mode="offline")
        assert end["status"] == status
    assert _alive(fake) == []


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        ("always-init raises", "RuntimeError: the network is unreachable at line 2"),
        ("always-log dies", "its process ended with exit code 139"),
        ("always-import raises", "RuntimeError: the network is unreachable at line 2"),
    ],
    indirect=["fake"],
)
def test_wandb_that_fails_offline_too_is_given_up_and_told_once(run, fake, reason, capsys):
    track("wandb", run.root)
    assert one_line(capsys) == f"wandb: {reason}; {GIVEN_UP.format(run.root)}"
    assert fake.calls("finish") == []
    assert _alive(fake) == []


def test_wandb_whose_folder_cannot_be_written_is_given_up_and_told_once(run, fake, capsys):
    run.root.mkdir()
    (run.root / "wandb").touch()
    track("wandb", run.root)
    line = one_line(capsys)
    assert line.startswith("wandb: FileExistsError: ")
    assert line.endswith(GIVEN_UP.format(run.root))
    assert fake.calls("init") == []


def test_wandb_that_works_is_told_of_each_row_once_and_says_nothing(run, fake, capsys):
    track("wandb", run.root)
    assert capsys.readouterr() == ("", "")
    for run_id in IDS:
        logged = fake.calls("log", id=run_id, mode="online")
        assert [call["step"] for call in logged] == list(EXAMPLES)
        assert len(fake.calls("finish", id=run_id)) == 1
    assert {call["mode"] for call in fake.calls("init")} == {"online"}


def test_wandb_that_reads_nothing_any_more_is_given_up_though_a_pipe_holds_no_more(
    run, fake, capsys, monkeypatch
):
    (tracker,) = make_trackers(["wandb"], "sweep", run)
    tracker.update(record("long", 1))
    below = psutil.Process().children()
    (process,) = (p for p in below if "tracker_process.py" in " ".join(p.cmdline()))
    process.suspend()
    monkeypatch.setattr(tracking, "ANSWER_S", 6.0)
    many = tuple(row(examples) for examples in range(5000))  # a megabyte
    tracker.finish(replace(record("long", 1, "finished"), rows=many))
    assert one_line(capsys).startswith("wandb: no answer within 6 s; its runs go on offline in ")
    assert [call["step"] for call in fake.calls("log", mode="offline")] == list(range(5000))


def _alive(fake: FakeWandb) -> list[int]:
    """Processes of the fake that live."""
    return [pid for pid in {call["pid"] for call in fake.calls("log")} if psutil.pid_exists(pid)]


# ---- the real package


def offline_steps(run: RunPaths, prefix: str = "offline-run-") -> dict[str, list[int]]:
    """Run id -> steps that its last file holds."""
    found = {}
    for path in sorted(run.root.rglob("*.wandb"), key=lambda path: path.stat().st_ctime_ns):
        if path.parent.name.startswith(prefix):
            records = list(wandb_records(path))
            found[path.stem.removeprefix("run-")] = [r["_step"] for r in wandb_history(records)]
    return found


def all_steps(*ids: str) -> dict[str, list[int]]:
    return {run_id: list(EXAMPLES) for run_id in ids}


def test_wandb_whose_service_is_killed_in_the_middle_leaves_every_row_offline(
    run, capsys, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tracker,) = make_trackers(["wandb"], "sweep", run)
    first, second = TRIALS
    tracker.update(record(first, 1))
    (service,) = (p for p in psutil.Process().children(recursive=True) if p.name() == "wandb-core")
    service.kill()
    wait_until(lambda: service.status() == psutil.STATUS_ZOMBIE)
    tracker.update(record(first, 2))
    tracker.finish(record(second, 3, "finished"))
    tracker.finish(record(first, 3, "finished"))
    del tracker  # its process ends, and with it wandb's, which writes when it likes
    assert one_line(capsys).endswith(GOES_OFFLINE.format(run.root))
    assert offline_steps(run) == all_steps(*IDS)


@pytest.mark.slow
@pytest.mark.faults
def test_wandb_whose_server_is_not_there_begins_offline(run, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    track("wandb", run.root)
    line = one_line(capsys)
    assert "connection refused" in line
    assert line.endswith(GOES_OFFLINE.format(run.root))
    assert offline_steps(run) == all_steps(*IDS)


@pytest.mark.slow
@pytest.mark.faults
def test_wandb_whose_server_vanishes_in_the_middle_keeps_what_was_not_sent(
    run, capsys, monkeypatch
):
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    (tracker,) = make_trackers(["wandb"], "sweep", run)
    for name in TRIALS:
        tracker.update(record(name, 1))
    tracker.finish(record(TRIALS[1], 3, "finished"))
    assert capsys.readouterr() == ("", "")
    server.vanish()
    tracker.finish(record(TRIALS[0], 3, "finished"))
    tracker.finish(record("late", 3, "finished"))
    del tracker
    assert one_line(capsys).endswith(GOES_OFFLINE.format(run.root))
    assert offline_steps(run) == all_steps(IDS[0], "sweep-late")
    # That of the sent run is there as well, as wandb keeps it.
    assert offline_steps(run, "run-")[IDS[1]] == list(EXAMPLES)


# ---- TensorBoard


def test_tensorboard_whose_folder_cannot_be_made_is_given_up_and_told_once(run, capsys):
    run.root.mkdir()
    (run.root / "tensorboard").touch()
    track("tensorboard", run.root)
    line = one_line(capsys)
    assert line.startswith("tensorboard: FileExistsError: ")
    assert line.endswith(GIVEN_UP.format(run.root))


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_tracker_whose_disk_is_full_is_given_up_and_told_once(run, capsys, monkeypatch, kind):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run.root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(run.root)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        (tracker,) = make_trackers([kind], "sweep", run)
        tracker.update(record(TRIALS[0], 1))
        _fill(run.root / "filler")
        tracker.update(record(TRIALS[0], 2))
        tracker.finish(record(TRIALS[0], 3, "finished"))
        assert "No space left on device" in (line := one_line(capsys))
        assert line.endswith(GIVEN_UP.format(run.root))
    finally:
        subprocess.run(["umount", "--lazy", str(run.root)], check=True)


def _fill(path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), path.open("wb", buffering=0) as file:
        _write_for_ever(file)


def _write_for_ever(file: IO[bytes]) -> None:
    while True:
        file.write(bytes(4096))


def test_tensorboard_beside_a_wandb_that_is_broken_has_every_row(run, fake, monkeypatch):
    monkeypatch.setenv("FAKE_WANDB_FAULT", "always-init raises")
    trackers = make_trackers(["wandb", "tensorboard"], "sweep", run)
    for tracker in trackers:
        tracker.finish(record(TRIALS[0], 3, "finished"))
    series = events(run.root / "tensorboard" / TRIALS[0])
    assert [step for step, _ in series["eval_loss"]] == list(EXAMPLES)
