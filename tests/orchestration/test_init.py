"""`tenfold init`: a file that does what the two lines alone do, and says of every other key what that is."""

import json
import os
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from orchestration.cli import main
from orchestration.config import SweepConfig, load_config
from orchestration.init_file import LEFT_OUT, SCHEMA_FILE, yaml_text
from orchestration.plan_json import plan_to_dict
from orchestration.planning import make_plan
from orchestration.yaml_file import read_values
from tests.test_imports import HEAVY, VERB, loaded_after

KEY_LINE = re.compile(r"(?m)^#(?=[a-z_]+:)")
"""The # of a key that the file does not set."""


@pytest.fixture
def rows(write_rows, qa_rows) -> Path:
    return write_rows("good.jsonl", qa_rows(60))


def init(base: Path, data: str = "good.jsonl", *flags: str) -> int:
    return main(["init", str(base), data, *flags])


def planned(path: Path) -> dict:
    return plan_to_dict(make_plan(load_config(path)))


def test_init_plans_what_the_two_lines_plan(rows, base, capsys):
    assert init(base) == 0
    assert capsys.readouterr().out.startswith(f"written: sweep.yaml, {SCHEMA_FILE}\n")
    two = Path("two.yaml")
    two.write_text(yaml.safe_dump({"model": str(base), "data": "good.jsonl"}))
    assert load_config(Path("sweep.yaml")) == load_config(two)
    assert planned(Path("sweep.yaml")) == planned(two)


def test_init_key_taken_out_of_its_comment_changes_no_trial(rows, base):
    assert init(base) == 0
    path = Path("sweep.yaml")
    plain = planned(path)
    path.write_text(KEY_LINE.sub("", path.read_text()))
    values = read_values(path)
    assert values.keys() == SweepConfig.model_fields.keys() - {*LEFT_OUT} | {"model", "data"}
    assert (values["lora_rank"], values["lora_alpha"]) == ([16, 32], 32)
    found = planned(path)
    assert len(found["candidates"]) > 1
    for key in ("name", "candidates", "discarded", "budget", "seq_len", "dataset_bits", "data"):
        assert found[key] == plain[key]


def test_init_names_the_source_of_the_doctrines_values(rows, base):
    assert init(base) == 0
    prose = " ".join(Path("sweep.yaml").read_text().replace("\n#", "").split())
    for note in plan_to_dict(make_plan(load_config(Path("sweep.yaml"))))["defaults"]:
        assert f"= {note['value']} (source: {note['source']})" in prose


def test_init_file_names_the_schema_beside_it_which_takes_it(rows, base):
    assert init(base, "good.jsonl", "-o", "new/mine.yaml") == 0
    path = Path("new") / "mine.yaml"
    assert path.read_text().startswith(f"# yaml-language-server: $schema={SCHEMA_FILE}\n")
    schema = json.loads((path.parent / SCHEMA_FILE).read_text())
    jsonschema.Draft202012Validator(schema).validate(read_values(path))
    path.write_text(KEY_LINE.sub("", path.read_text()))
    jsonschema.Draft202012Validator(schema).validate(read_values(path))


def files() -> dict[str, bytes]:
    found = (path for path in Path().rglob("*") if path.is_file() or path.is_symlink())
    return {str(path): path.read_bytes() if path.exists() else b"" for path in found}


def refused(capsys, *arguments: str) -> str:
    """The one line of an init that wrote nothing."""
    before = files()
    assert main(["init", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, files()) == ("", before)
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_init_refuses_to_write_over_anything(rows, base, capsys, kind):
    path = Path("sweep.yaml")
    make = {
        "file": path.touch,
        "folder": path.mkdir,
        "dangling link": lambda: os.symlink("x", path),
    }
    make[kind]()
    line = refused(capsys, str(base), "good.jsonl")
    assert line == "tenfold: sweep.yaml: must be a new file, it is there already; name another (-o)"


@pytest.mark.parametrize("text", ["{}", "no json", '{"title": "mine"}', "[]"])
def test_init_writes_over_its_own_schema_alone(rows, base, capsys, text):
    Path(SCHEMA_FILE).write_text(text)
    assert "holds something else" in refused(capsys, str(base), "good.jsonl")
    Path(SCHEMA_FILE).write_text('{"title": "Tenfold sweep.yaml", "earlier": true}')
    assert init(base) == 0
    assert "earlier" not in json.loads(Path(SCHEMA_FILE).read_text())


SECRET = "hf_" + "a1B2" * 6


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        ("./nowhere", "good.jsonl", "model ./nowhere: no such file or folder"),
        ("BASE", "absent.jsonl", "absent.jsonl"),
        ("BASE", "empty.jsonl", "empty.jsonl"),
        ("", "good.jsonl", "model must not be empty"),
        ("BASE", "two\nlines.jsonl", "data must be text of one line"),
        (SECRET, "good.jsonl", "model: must hold no credentials"),
        ("BASE", f"https://me:{SECRET}@example.org/rows.jsonl", "data: must hold no credentials"),
    ],
)
def test_init_of_what_no_sweep_can_use_is_one_line(rows, base, capsys, model, data, said):
    Path("empty.jsonl").touch()
    line = refused(capsys, str(base) if model == "BASE" else model, data)
    assert said in line
    assert SECRET not in line


def test_init_into_a_place_that_is_a_file_is_one_line(rows, base, capsys):
    line = refused(capsys, str(base), "good.jsonl", "-o", "good.jsonl/deep/sweep.yaml")
    assert "good.jsonl/deep/sweep.yaml: must lie in a folder where you can write" in line


@pytest.mark.parametrize(
    "name",
    ["1e5", "yes", "null", "2024-01-01", "a: b #c.jsonl", "数据.jsonl", "'q' \"r\"", "- x", "&a"],
)
def test_init_of_a_name_that_yaml_reads_otherwise_keeps_it(rows, base, name):
    rows.rename(name if "." in name else f"{name}.jsonl")
    data = name if "." in name else f"{name}.jsonl"
    assert init(base, data) == 0
    assert load_config(Path("sweep.yaml")).data == data


@pytest.mark.parametrize(
    "value", ["1e5", "1E-3", "yes", "~", 1e-4, 1e-30, 2.5, [1, "a"], {"a": 1e-9}]
)
def test_yaml_text_is_read_as_what_it_was(tmp_path, value):
    (tmp_path / "x.yaml").write_text(f"key: {yaml_text(value)}\n")
    assert read_values(tmp_path / "x.yaml") == {"key": value}


def test_init_once_counted_imports_nothing_heavy(rows, base):
    first = VERB.format(arguments=["init", str(base), "good.jsonl"])
    again = VERB.format(arguments=["init", str(base), "good.jsonl", "-o", "again.yaml"])
    folder = Path().resolve()
    assert loaded_after(first, folder) & HEAVY == set()
    assert loaded_after(again, folder) & {*HEAVY, "numpy", "tokenizers"} == set()
