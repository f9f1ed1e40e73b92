"""The wheel: built, installed where the repository is not, and used from an empty folder."""

import email
import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile

import pytest
import yaml

from tests.test_layers import LAYERS, ROOT, imports_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
"""Distributions of another name than what they are imported by."""


def source_files() -> list[str]:
    """What a commit of the checkout would hold that the wheel is made from."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "--", *LAYERS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(name for name in set(done.stdout.splitlines()) if (ROOT / name).is_file())


def run(*command: object, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*source_files(), "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        copyfile(ROOT / name, folder / "source" / name)
    flags = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", *flags, "-w", folder, folder / "source")
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The folder, empty at first, in which the installed Tenfold runs."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def installed(wheel, work, tmp_path_factory) -> Callable[..., str]:
    """Runs a program of a new environment: its Tenfold is the wheel's, all else is ours."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    flags = ["--no-deps", "--no-index", "--quiet"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *flags, wheel)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    # A line adds a folder without the .pth files in it, of which one is the checkout's.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    hidden = {"TENFOLD_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | hidden

    def run_there(program: str, *arguments: object) -> str:
        program = str(python.parent / program)
        return run(program, *arguments, cwd=work, env=variables)

    return run_there


def test_wheel_holds_every_file_of_the_packages_and_no_other(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name for name in names if ".dist-info/" not in name) == source_files()


def test_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        found = email.message_from_bytes(archive.read(name))
        names = archive.namelist()
    assert (found["Name"], found["Version"]) == ("tenfold", PROJECT["version"])
    assert found["Summary"] == PROJECT["description"]
    assert (found["License-Expression"], found["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload().startswith("# Tenfold\n")
    assert "Programming Language :: Python :: 3.11" in found.get_all("Classifier")
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_asks_for_everything_that_it_imports():
    declared = {line.split(">")[0].split("[")[0] for line in PROJECT["dependencies"]}
    imported = {
        name
        for layer in LAYERS
        for path in (ROOT / layer).rglob("*.py")
        for _, name in imports_of(path, layer)
        if name not in sys.stdlib_module_names and name not in LAYERS
    }
    missing = {name for name in imported if DISTRIBUTIONS.get(name, name) not in declared}
    assert missing == set()
    assert len(imported) > 10


def test_wheel_installed_is_what_answers(installed):
    code = "import orchestration, trainers.assets as a; print(orchestration.__file__, a.__file__)"
    for file in installed("python", "-c", code).split():
        assert "/venv/lib/" in file
        assert not Path(file).is_relative_to(ROOT)
    assert installed("tenfold", "--version") == f"tenfold {PROJECT['version']}\n"
    assert "VERB" in installed("tenfold", "--help")
    assert json.loads(installed("tenfold", "schema"))["title"] == "Tenfold sweep.yaml"


def test_wheel_installed_plans_with_what_it_ships(installed, work):
    code = "from orchestration.demo import ASSETS; print(ASSETS)"
    assets = Path(installed("python", "-c", code).strip())
    values = {"model": str(assets / "tiny-llama"), "data": str(assets / "demo" / "functions.jsonl")}
    (work / "sweep.yaml").write_text(yaml.safe_dump(values))
    assert "admitted, in the order" in installed("tenfold", "plan", "sweep.yaml")
    assert "tenfold plan mine.yaml" in installed(
        "tenfold", "init", *values.values(), "-o", "mine.yaml"
    )
