"""`tenfold resume` for real: a sweep is cut off, resumed, and compared with one that never was."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from orchestration.results import read_trials
from tests.orchestration.sweeps import (
    FUNCTIONS,
    WHOLE,
    ended,
    losses,
    processes_of,
    resume,
    rows,
    start,
    statuses,
    told,
    wait_until,
    write_config,
)
from tests.orchestration.watched import STUBS
from trainers.object_store import ObjectStore
from trainers.paths import RunPaths

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def one_ended_one_begun(run: Path) -> bool:
    """Whether a trial has ended and another has a checkpoint to go on from."""
    done = statuses(run)
    begun = [path.parents[1].name for path in run.glob("trials/*/checkpoint/trainer_state.json")]
    return bool(done) and any(name not in done for name in begun)


def rungs(run: Path) -> set[tuple[str, int, float]]:
    """What the scheduler was told of, in any order."""
    lines = [json.loads(line) for line in (run / "rungs.jsonl").read_text().splitlines()]
    return {(line["trial"], line["examples"], line["eval_loss"]) for line in lines}


RAY_AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
"""Ray's own, which take a minute or two to see that their raylet is gone."""


def kill(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Kills a driver, and gives its processes: they train and write on for a moment."""
    below = psutil.Process(driver.pid).children(recursive=True)
    below = [process for process in below if process.name() not in RAY_AGENTS]
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=60)
    return below


def assert_gone(processes: list[psutil.Process]) -> None:
    """A killed driver's local Ray ends by itself, so that nothing is left that trains on."""
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, alive


def fetched(url: str, folder: Path) -> Path:
    """A run's copy, as anybody would take it from the store."""
    import fsspec

    fsspec.filesystem("s3", skip_instance_cache=True).get(url, str(folder), recursive=True)
    return folder


def test_resume_on_an_object_store_by_another_machine_ends_in_the_numbers_of_a_whole_sweep(
    whole_folder, bucket, tmp_path
):
    whole, url = whole_folder / "runs" / "whole", f"{bucket.url}/runs/far"
    write_config(whole_folder, name="far", storage=f"{bucket.url}/runs", **WHOLE)
    store = ObjectStore(url)

    def is_half_way() -> bool:
        names = store.listing()
        done = {name.split("/")[1] for name in names if name.endswith("/status.json")}
        begun = {name.split("/")[1] for name in names if name.endswith("checkpoint/manifest.json")}
        return bool(done) and bool(begun - done)

    driver = start(whole_folder, "sweep", "sweep.yaml")
    # While the workers load: watching the lease takes longer than these trials do.
    wait_until(lambda: "plan.json" in store.listing(), driver)
    refused = ended(start(whole_folder, "resume", url))
    assert refused.returncode == 2, told(refused)
    assert f"{url}: this run is being driven by another process" in refused.stderr
    wait_until(is_half_way, driver)
    assert_gone(kill(driver))  # what still lives for a moment writes on
    before = {k: v for k, v in store.listing("trials").items() if k.endswith("status.json")}
    assert 0 < len(before) < 3
    # Another machine has measured its forwards too; here they must be of one size.
    shutil.copytree(whole_folder / "cache" / "speed", whole_folder / "elsewhere" / "speed")
    done = ended(start(whole_folder, "sweep", "sweep.yaml", "--resume", cache="elsewhere"))
    assert done.returncode == 0, told(done)
    assert f"report: {url}/report.html" in done.stdout
    run, after = fetched(url, tmp_path / "far"), store.listing()
    assert {status["status"] for status in statuses(run).values()} == {"finished"}
    assert losses(run) == losses(whole)
    assert rungs(run) == rungs(whole)
    assert {name: after[name] for name in before} == before  # what had ended was left alone
    best, expected = (load_file(f / "best" / "adapter_model.safetensors") for f in (run, whole))
    assert best.keys() == expected.keys()
    assert all(best[name].equal(expected[name]) for name in best)
    assert [name for name in after if "/." in f"/{name}"] == []
    assert list((whole_folder / "elsewhere" / "work").iterdir()) == []
    assert (whole_folder / "elsewhere" / "sets").is_dir()
    write_config(
        whole_folder, name="far", storage=f"{bucket.url}/runs", **WHOLE | {"examples": 161}
    )
    edited = ended(start(whole_folder, "sweep", "sweep.yaml", "--resume"))
    assert edited.returncode == 2, told(edited)
    assert "which differs now (-examples: 160; +examples: 161)" in edited.stderr
    report = ended(start(whole_folder, "report", url))
    assert report.returncode == 0, told(report)
    assert report.stdout == f"{url}/report.html\n"


def test_resume_of_solo_goes_on_from_checkpoints(whole_folder):
    config = WHOLE | {"engine": "solo", "learning_rate": 3e-3, "name": "solo"}
    del config["pack_size"]
    run = write_config(whole_folder, **config)
    driver = start(whole_folder, "sweep", "sweep.yaml")
    begun = "trials/*/checkpoint/trainer_state.json"
    wait_until(lambda: list(run.glob(begun)), driver)
    left = kill(driver)
    kept = {name: found for name, found in losses(run).items() if found}
    done = resume(whole_folder, "solo")
    assert done.returncode == 0, told(done)
    assert_gone(left)
    assert {status["status"] for status in statuses(run).values()} == {"finished"}
    found, whole = losses(run), losses(whole_folder / "runs" / "whole")
    assert all(found[name][: len(before) - 1] == before[:-1] for name, before in kept.items())
    assert [len(each) for each in found.values()] == [6]
    for name, each in found.items():  # packed, and never cut off
        assert each == [(at, pytest.approx(loss, abs=1e-6)) for at, loss in whole[name]]


def test_resume_of_an_interrupted_optuna_sweep_keeps_its_number_of_trials(tmp_path):
    config = WHOLE | {
        "scheduler": "asha",
        "search": "optuna",
        "num_candidates": 4,
        "confirm": 2,
        "learning_rate": {"low": 1e-4, "high": 1e-2, "num": 5},
    }
    shutil.copyfile(FUNCTIONS, tmp_path / "functions.jsonl")
    run, paced = write_config(tmp_path, **config), {"TENFOLD_STUB_PACE_S": "0.5"}
    driver = start(tmp_path, "sweep", "sweep.yaml", module=STUBS, **paced)
    wait_until(lambda: run.exists() and _one_ended_one_waits(run), driver)
    driver.send_signal(signal.SIGINT)
    cut = ended(driver)
    assert cut.returncode == 130, told(cut)
    assert re.search(r"interrupted: \d trials did not end; `tenfold resume .*` goes on", cut.stdout)
    assert not processes_of(tmp_path)
    assert len(statuses(run)) < 4
    done = ended(start(tmp_path, "resume", "runs/run", module=STUBS))
    assert done.returncode == 0, told(done)
    found = statuses(run)
    repeats = {t.name: t.repeats for t in read_trials(RunPaths(run)) if t.repeats}
    assert len(found) == len(list((run / "trials").iterdir())) == 4 + len(repeats)
    assert sorted(Counter(repeats.values()).values()) == [2, 2]
    assert {found[name]["status"] for name in repeats} == {"finished"}  # ASHA stops none of them
    assert re.search(r"on 2 new seeds \S+ has eval_loss", done.stdout), told(done)
    for name, status in found.items():
        examples = [row["examples"] for row in rows(run / "trials" / name)]
        assert examples == sorted(set(examples))
        assert examples[-1] == status["examples"]


def _one_ended_one_waits(run: Path) -> bool:
    done = statuses(run)
    return bool(done) and len(list(run.glob("trials/*/metrics.jsonl"))) > len(done)


def test_resume_refuses_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    done = resume(tmp_path)
    assert done.returncode == 2, told(done)
    (line,) = done.stderr.strip().splitlines()
    assert "must be the folder of a sweep" in line
    assert os.listdir(tmp_path / "runs" / "run") == []
