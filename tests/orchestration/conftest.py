"""A working folder with a small training file and the shipped base."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from orchestration.config import make_config
from orchestration.planning import Plan, make_plan
from tests.orchestration.sweeps import BASE, FUNCTIONS, WHOLE, sweep, told

# A Ray without a dashboard asks that of another on this machine, which may be of tests that run beside these, and
# then takes its own processes for dead (orchestration/local_ray.py). Here it asks where nobody answers.
os.environ["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:9"


@pytest.fixture(scope="session")
def base() -> Path:
    """The base that Tenfold ships."""
    return BASE


@pytest.fixture(scope="session")
def whole_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the sweep `whole` of sweeps.WHOLE ran to its end, once for all processes of pytest-xdist. It is
    not to be written to; `whole_folder` gives a copy."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "whole"
    with FileLock(f"{folder}.lock"):
        if not (folder / "runs" / "whole" / "report.html").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process whose sweep failed
            folder.mkdir()
            shutil.copyfile(FUNCTIONS, folder / "functions.jsonl")
            _, done = sweep(folder, name="whole", **WHOLE)
            assert done.returncode == 0, told(done)
    return folder


@pytest.fixture(scope="module")
def whole_folder(whole_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of whole_sweep, with its cache, for runs that must end in the same numbers."""
    return shutil.copytree(whole_sweep, tmp_path_factory.mktemp("whole") / "folder")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of a user without a GPU: empty, its cache elsewhere."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return folder


@pytest.fixture
def write_rows(workplace: Path) -> Callable[[str, Iterable[dict]], Path]:
    """Writes a jsonl file into the working folder."""

    def write(name: str, rows: Iterable[dict]) -> Path:
        path = workplace / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def write_sweep(workplace: Path, base: Path, write_rows) -> Callable[..., Path]:
    """Writes sweep.yaml for the shipped base and 60 rows; a value of None leaves a key out."""
    write_rows("good.jsonl", qa_rows(60))

    def write(**values: object) -> Path:
        merged = {"model": str(base), "data": "good.jsonl"} | values
        path = workplace / "sweep.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in merged.items() if value is not None})
        )
        return path

    return write


def qa_rows(count: int) -> list[dict[str, str]]:
    """Different short rows."""
    return [{"prompt": f"{i} plus one?", "completion": f" It is {i + 1}."} for i in range(count)]


@pytest.fixture(name="qa_rows")
def qa_rows_fixture() -> Callable[[int], list[dict[str, str]]]:
    return qa_rows


@pytest.fixture
def planned(workplace: Path, base: Path, write_rows) -> Callable[..., Plan]:
    """The plan of the shipped base for a config, where None leaves a key out; data is 40 rows, held out are 10
    others."""
    rows = qa_rows(50)
    write_rows("train.jsonl", rows[:40])
    write_rows("held.jsonl", rows[40:])

    def plan(**values: object) -> Plan:
        if "dataset_tokens" not in values:
            values = {"data": "train.jsonl", "eval": "held.jsonl"} | values
        values = {key: value for key, value in values.items() if value is not None}
        return make_plan(make_config({"model": str(base)} | values, "test"))

    return plan
