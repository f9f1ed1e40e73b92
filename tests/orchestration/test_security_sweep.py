"""A real sweep in an environment full of secrets: it leaves none anywhere, and what goes on with it reads no pickle."""

import subprocess
from pathlib import Path

import pytest

from tests.hostile_models import pickle_into
from tests.orchestration.sweeps import ended, resume, start, statuses, told, write_config
from tests.orchestration.test_security_secrets import SECRETS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def swept(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of a sweep of one trial, and its process."""
    folder = tmp_path_factory.mktemp("swept")
    write_config(folder, examples=16, lora_rank=4, learning_rate=1e-3, quantization="none")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        done = ended(start(folder, "sweep", "sweep.yaml"))
    assert done.returncode == 0, told(done)
    return folder, done


def test_sweep_writes_and_prints_no_secret_of_its_environment(swept):
    folder, done = swept
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"resolved.json", "plan.json", "sweep.yaml", "report.html", "metrics.jsonl"} <= names
    texts = {str(path): path.read_bytes() for path in files}
    texts |= {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    found = [
        (place, name)
        for name, value in SECRETS.items()
        for place, text in texts.items()
        if value.encode() in text
    ]
    assert found == []


def test_resume_of_a_run_whose_tune_state_is_hostile_reads_none_of_it(swept):
    """As if its driver had died before the trial's end was written: Ray runs, and trains nothing anew."""
    folder, _ = swept
    run, marker = folder / "runs" / "run", folder / "marker"
    (attempt,) = (run / "tune").glob("attempt-*")
    assert (attempt / "tuner.pkl").is_file()
    for path in (
        *attempt.rglob("*.pkl"),
        attempt / "trainable.pkl",
        attempt / "searcher-state-1.pkl",
    ):
        pickle_into(path, marker)
    for path in run.glob("trials/*/status.json"):
        path.unlink()
    done = resume(folder)
    assert done.returncode == 0, told(done)
    assert [each["status"] for each in statuses(run).values()] == ["finished"]
    assert not marker.exists()
