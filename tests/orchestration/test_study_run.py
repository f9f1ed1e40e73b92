"""`tenfold study` as a user runs it: to its end, killed and gone on with, and refused."""

import csv
import json
import signal

import pytest
import yaml

from cluster.inventory import Inventory
from orchestration.cli import main
from orchestration.exit_codes import BAD_INPUT
from orchestration.studies.config import load_study
from tests.orchestration.study_results import lr_ratio
from tests.orchestration.sweeps import (
    BASE,
    FUNCTIONS,
    ended,
    losses,
    start,
    statuses,
    told,
    wait_until,
)
from tests.orchestration.watched import Watched, one_line_with
from trainers.paths import read_json, write_state


def study(folder, *arguments: str):
    folder.mkdir(parents=True, exist_ok=True)
    return start(folder, "study", "lr-ratio", *arguments)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.faults
def test_study_killed_and_interrupted_ends_complete_and_ran_nothing_twice(tmp_path):
    run = tmp_path / "runs" / "killed"
    command = ("study.yaml", "--preset", "smoke", "--name", "killed")
    one_group = "cpus_per_worker: 2\n"  # its start is what costs
    (tmp_path / "study.yaml").write_text(one_group)
    process = study(tmp_path, *command)
    wait_until(lambda: len(statuses(run)) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = _ended_trials(run)
    watched = Watched(study(tmp_path, *command))
    watched.wait_for(lambda: len(statuses(run)) > len(killed))
    done = watched.interrupted(signal.SIGTERM)
    assert one_line_with("the same command goes on with it", done), told(done)
    interrupted = _ended_trials(run)
    assert "failed" not in {status["status"] for status in statuses(run).values()}
    done = ended(study(tmp_path, *command))
    assert done.returncode == 0, told(done)
    _check_outputs(run)
    assert len(killed) < len(interrupted) < len(statuses(run))
    assert _ended_trials(run).items() >= interrupted.items() >= killed.items()


def _check_outputs(run) -> None:
    results = read_json(run / "results.json")
    assert results["status"] == "complete"
    assert results["command"] == "tenfold study lr-ratio study.yaml --preset smoke --name killed"
    points = [point for arm in results["arms"] for point in arm["points"]]
    assert {point["trial"] for point in points} == set(statuses(run))
    for point in points:
        assert point["steps"] == 4
        assert point["eval_loss"] == losses(run)[point["trial"]][-1][1]
    with (run / "results.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(points)
    assert results["question"] in (run / "report.html").read_text()
    assert not list(run.glob("trials/*/checkpoint"))  # a study keeps numbers, not weights
    assert not list(run.glob("trials/*/best"))
    again = load_study("lr-ratio", None, run / "study.yaml")
    assert again.lora_rank == load_study("lr-ratio", "smoke", None).lora_rank


def _ended_trials(run) -> dict[str, tuple[int, list]]:
    """Trial that ended -> when, and its losses: what is trained again gets another time."""
    times = {path.parent.name: path.stat().st_mtime_ns for path in run.glob("trials/*/status.json")}
    found = losses(run)
    return {name: (time, found[name]) for name, time in times.items()}


def write_study(folder, **keys) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = {"model": str(BASE), "data": str(FUNCTIONS), "examples": 32, "lora_rank": 4}
    values |= {"global_batch_size": 8, "seq_len": 96}
    (folder / "study.yaml").write_text(yaml.safe_dump(values | keys))


@pytest.mark.parametrize(
    ("keys", "arguments", "said"),
    [
        ({"quantization": "nf4"}, [], "needs quantization: none and dtype: fp32"),
        ({"dtype": "bf16"}, [], "needs quantization: none and dtype: fp32"),
        ({"global_batch_size": [8, 16]}, [], "global_batch_size must be one value"),
        ({"scheduler": "asha"}, [], "a study decides scheduler itself"),
        ({}, ["--preset", "lap"], "--preset must be one of smoke, laptop, gpu, cluster, got 'lap'"),
        ({}, ["--reuse", "runs/none"], "--reuse runs/none: must be the folder of a study"),
    ],
)
def test_study_that_cannot_be_run_is_refused_in_one_line(tmp_path, keys, arguments, said):
    write_study(tmp_path, **keys)
    done = ended(study(tmp_path, "study.yaml", *arguments))
    assert done.returncode == 2, told(done)
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_study_with_a_recipe_of_its_own_takes_no_points_of_others(tmp_path):
    done = ended(start(tmp_path, "study", "compute", "--preset", "smoke", "--reuse", "runs/x"))
    assert done.returncode == 2
    assert (
        "--reuse is for lr-ratio, rank, layers, batch, rl; leave it out of compute" in done.stderr
    )


def test_study_in_a_sweeps_folder_or_another_studys_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sweeps = tmp_path / "runs" / "sweep"
    sweeps.mkdir(parents=True)
    plain = {"config": {}, "versions": {}}
    write_state(sweeps / "resolved.json", plain)
    assert main(["study", "lr-ratio", "--preset", "smoke", "--name", "sweep"]) == BAD_INPUT
    assert "must be a study's folder or a new one" in capsys.readouterr().err
    fixed = {"command": "tenfold study rank", "fixed": {"kind": "rank"}}
    write_state(sweeps / "resolved.json", plain | fixed)
    assert main(["study", "lr-ratio", "--preset", "smoke", "--name", "sweep"]) == BAD_INPUT
    assert "must keep its kind (rank -> lr-ratio)" in capsys.readouterr().err
    assert main(["resume", "runs/sweep"]) == BAD_INPUT
    assert "goes on with its command: tenfold study rank" in capsys.readouterr().err
    assert main(["report", "runs/sweep"]) == BAD_INPUT
    assert "a study must have ended once" in capsys.readouterr().err


def test_report_of_a_study_is_written_again(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(lr_ratio()))
    resolved = {"command": "tenfold study lr-ratio", "fixed": {"kind": "lr-ratio"}}
    write_state(tmp_path / "resolved.json", resolved)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert lr_ratio()["question"] in (tmp_path / "report.html").read_text()
    assert main(["report", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {**lr_ratio(), "report": str(tmp_path / "report.html")}


def test_study_of_an_unknown_kind_is_refused(tmp_path):
    done = ended(start(tmp_path, "study", "lr", "--preset", "smoke"))
    assert done.returncode == 2
    assert "KIND must be one of lr-ratio, rank, layers, batch, capacity, compute, rl" in done.stderr


def test_study_whose_full_fine_tuning_fits_no_worker_is_refused_with_its_bytes(
    tmp_path, monkeypatch, capsys
):
    small = Inventory(num_cpus=2, num_gpus=0, where="this machine", memory_bytes=50_000_000)
    monkeypatch.setattr("orchestration.studies.run.local_inventory", lambda: small)
    monkeypatch.chdir(tmp_path)
    assert main(["study", "lr-ratio", "--preset", "smoke"]) == BAD_INPUT
    # 20 bytes x 2,164,416; each of two workers has half of the memory
    said = capsys.readouterr().err
    assert "full fine-tuning of 2,164,416 parameters needs 43,288,320 bytes" in said
    assert "80% of the 25,000,000 bytes that one worker of this machine has" in said
    assert not (tmp_path / "runs").exists()
