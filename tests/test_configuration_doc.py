"""docs/configuration.md is what its script makes of the code, and leaves nothing out."""

import importlib.util
import re
from functools import cache
from types import ModuleType

import pytest

from orchestration.config import SweepConfig
from orchestration.environment import seconds_from
from orchestration.studies.config import StudyConfig
from tests.test_layers import LAYERS, ROOT

SCRIPT = ROOT / "docs" / "update_configuration.py"
SET_BY_TENFOLD = {"TENFOLD_SHARED_CACHE"}


@cache
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_configuration", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def committed() -> str:
    return (ROOT / "docs" / "configuration.md").read_text()


def test_configuration_page_is_what_its_script_writes():
    assert committed() == script().page(), f"run: PYTHONPATH=. .venv/bin/python {SCRIPT}"


def test_configuration_page_has_every_key_and_every_variable_of_ours():
    for key in SweepConfig.model_fields.keys() | StudyConfig.model_fields.keys():
        assert f"`{key}`" in committed()
    sources = [path.read_text() for layer in LAYERS for path in (ROOT / layer).rglob("*.py")]
    found = {name for text in sources for name in re.findall(r'"(TENFOLD_[A-Z_]+)"', text)}
    assert {"TENFOLD_CACHE", "TENFOLD_HANG_S"} <= found
    assert [name for name in found - SET_BY_TENFOLD if f"`{name}`" not in committed()] == []


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"type": "integer", "minimum": 2}, "whole number >= 2"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 10}, "number > 0 and <= 10"),
        ({"anyOf": [{"const": "auto", "type": "string"}, {"type": "boolean"}]}, "`auto` or `true`, `false`"),
        ({"anyOf": [{"enum": ["a", "b"]}, {"type": "array", "items": {"enum": ["a", "b"]}}]},
            "`a`, `b` or a list of such"),
        ({"anyOf": [{"$ref": "#/$defs/Text"}, {"type": "null"}]}, "text"),
    ],
)  # fmt: skip
def test_configuration_page_says_a_form_in_words(form, words):
    assert script().given(form) == words


def test_seconds_from_the_environment_are_above_0_or_refused(monkeypatch):
    monkeypatch.delenv("TENFOLD_HANG_S", raising=False)
    assert seconds_from("TENFOLD_HANG_S", 1800) == 1800
    monkeypatch.setenv("TENFOLD_HANG_S", "2.5")
    assert seconds_from("TENFOLD_HANG_S", 1800) == 2.5
    for bad in ("soon", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("TENFOLD_HANG_S", bad)
        with pytest.raises(
            ValueError, match=r"^TENFOLD_HANG_S must be a number of seconds above 0"
        ):
            seconds_from("TENFOLD_HANG_S", 1800)
