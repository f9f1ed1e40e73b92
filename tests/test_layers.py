"""The layers of the project, proved from the imports at every level of every file."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("search_spaces", "cluster", "trainers", "orchestration")
PURE = {
    "search_spaces": {"search_spaces", "pydantic", "yaml"},
    "cluster": {"cluster", "search_spaces"},
}
"""What a pure layer may import beside the standard library."""
ABOVE_TRAINERS = {"orchestration", "cluster"}
RAY_IN_TRAINERS = "trainers/worker.py"
IMPORTS_USERS_CODE = ROOT / "trainers" / "rewards.py"
"""Imports a module that a YAML names, which is not ours."""


def imports_of(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every import, function-level and literal dynamic ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, package if node.level else str(node.module).split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            (name, *_) = node.args
            if path == IMPORTS_USERS_CODE and not isinstance(name, ast.Constant):
                continue
            assert isinstance(name, ast.Constant), f"{path}:{node.lineno}: a computed import"
            yield node.lineno, str(name.value).split(".")[0]


def is_allowed(layer: str, name: str, place: str) -> bool:
    """Whether a file of a layer may import a top-level package."""
    if name in sys.stdlib_module_names or layer == "orchestration":
        return True
    if layer in PURE:
        return name in PURE[layer]
    if name == "ray":
        return place == RAY_IN_TRAINERS
    return name not in ABOVE_TRAINERS


def offences(root: Path) -> list[str]:
    """Every import that a layer must not have, as `path:line imports name`."""
    found = []
    for layer in LAYERS:
        for path in sorted((root / layer).rglob("*.py")):
            place = path.relative_to(root).as_posix()
            for line, name in imports_of(path, layer):
                if not is_allowed(layer, name, place):
                    found.append(f"{place}:{line} imports {name}")
    return found


def importers(name: str) -> set[str]:
    """Files of the project that import a package."""
    return {
        path.relative_to(ROOT).as_posix()
        for layer in LAYERS
        for path in (ROOT / layer).rglob("*.py")
        if name in {module for _, module in imports_of(path, layer)}
    }


def test_layers_of_the_project_import_only_what_is_below_them():
    assert offences(ROOT) == []


def test_layers_ray_is_imported_by_orchestration_and_the_worker_alone():
    found = importers("ray")
    assert RAY_IN_TRAINERS in found
    assert "orchestration/sweep.py" in found
    assert {place.split("/")[0] for place in found - {RAY_IN_TRAINERS}} == {"orchestration"}


def test_layers_torch_is_imported_by_trainers_alone():
    assert {place.split("/")[0] for place in importers("torch")} == {"trainers"}


def test_layers_data_is_read_without_torch():
    torch_places = importers("torch") | importers("bitsandbytes") | importers("peft")
    assert "trainers/loop.py" in torch_places
    assert not [place for place in torch_places if place.startswith("trainers/data/")]


@pytest.mark.parametrize(
    ("place", "source", "expected"),
    [
        ("search_spaces/a.py", "import math, torch.nn", ["search_spaces/a.py:1 imports torch"]),
        ("search_spaces/b.py", "import math, pydantic\nfrom search_spaces import c", []),
        ("search_spaces/c.py", "import numpy", ["search_spaces/c.py:1 imports numpy"]),
        ("cluster/a.py", "from trainers.data import x", ["cluster/a.py:1 imports trainers"]),
        ("cluster/b.py", "import yaml", ["cluster/b.py:1 imports yaml"]),
        ("cluster/c.py", "from . import d\nfrom search_spaces.space import x", []),
        ("trainers/a.py", "def f():\n    from ray import tune", ["trainers/a.py:2 imports ray"]),
        ("trainers/sub/worker.py", "import ray", ["trainers/sub/worker.py:1 imports ray"]),
        ("trainers/worker.py", "import ray.train", []),
        (
            "trainers/b.py",
            "if 1:\n  import cluster.x",
            ["trainers/b.py:2 imports cluster"],
        ),
        (
            "trainers/c.py",
            "from importlib import import_module\nimport_module('orchestration.cli')",
            ["trainers/c.py:2 imports orchestration"],
        ),
        ("orchestration/a.py", "import ray, torch, trainers.x", []),
    ],
)
def test_layers_checker_on_a_small_source_names_the_offence(tmp_path, place, source, expected):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert offences(tmp_path) == expected
