"""The JSON Schema: it takes what config.py takes, refuses what config.py refuses, and says what each key means."""

import json
import sys
from pathlib import Path

import hypothesis.strategies as st
import jsonschema
import pytest
from hypothesis import given

from orchestration.cli import main
from orchestration.config import ConfigError, SweepConfig, make_config
from orchestration.schema import Schema, study_schema, sweep_schema, undescribed
from orchestration.studies.config import DECIDED, KINDS, StudyConfig
from orchestration.yaml_file import read_values
from tests.fuzzing import quick_settings
from tests.orchestration import test_orch_config, test_study_config
from tests.orchestration.config_cases import LEGAL, ODD_SCALARS, SHIPPED, STUDY
from tests.test_imports import HEAVY, VERB, loaded_after

SCHEMAS = {SweepConfig: sweep_schema(), StudyConfig: study_schema()}
VALIDATORS = {kind: jsonschema.Draft202012Validator(schema) for kind, schema in SCHEMAS.items()}
LATER = {"format", "size_class", "columns"}
"""Keys whose words are looked up when data and model are read: config.py takes any."""
BEYOND = (
    "0 < low <= high",  # one value against another
    "nan",  # no number of JSON
    "of a size between",  # next to 0
    "(letters, digits",  # of any script: \w of ECMA is ASCII
    "multiple such as '2*rank'",  # a multiple beyond a float
    "no user's home",
    "255 bytes between",  # characters are counted, not their bytes
    "inventory must be",  # no GPU, or too many
    "a URL with a bucket",
    "method: rl needs",
    "max_completion_length is for",
    "metric_rows is for",
    "confirm must be 0 or at least 2",
    "select must be",  # 0 percent
    "method: rl without data",
    "is for method: sft",
    "with method rl",
    "list a value twice",  # 1 and 1.0 of a list, dora+rslora and rslora+dora
)
"""Parts of config.py's messages for what no schema says."""


def given_cases(test) -> list[tuple]:
    """The cases of a parametrized test."""
    return [case for mark in test.pytestmark for case in mark.args[1]]


def values_of(text: str, folder: Path) -> dict:
    path = folder / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return read_values(path)


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=["sweep", "study"])
def test_schema_is_one_of_the_draft_and_describes_every_key(schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    assert list(undescribed(schema)) == []
    assert schema["additionalProperties"] is False


def test_schema_has_every_key_with_its_default():
    found = SCHEMAS[SweepConfig]["properties"]
    assert list(found) == list(SweepConfig.model_fields)
    for key, field in SweepConfig.model_fields.items():
        required = field.is_required()
        assert found[key].get("default") == (None if required else field.default)
    assert found["lr_schedule"]["description"] == "Of the learning rate, after the warmup."
    of_study = SCHEMAS[StudyConfig]["properties"]
    assert of_study.keys() == StudyConfig.model_fields.keys() - set(DECIDED)
    assert of_study["quantization"]["default"] == "none"


@pytest.mark.parametrize(("name", "text"), SHIPPED, ids=dict(SHIPPED))
def test_schema_takes_every_yaml_of_ours(tmp_path, name, text):
    kind = StudyConfig if name.split()[-1] in KINDS else SweepConfig
    VALIDATORS[kind].validate(values_of(text, tmp_path))


def test_schema_takes_the_studies_in_docs():
    for path in test_study_config.ROOT.glob("docs/studies/*/study.yaml"):
        VALIDATORS[StudyConfig].validate(read_values(path))


def test_schema_takes_the_right_values_of_the_config_tests(tmp_path):
    cases = given_cases(test_orch_config.test_load_config_value_as_written_gives_its_meaning)
    for line, *_ in cases:
        VALIDATORS[SweepConfig].validate(values_of(test_orch_config.MINIMAL + line, tmp_path))


NO_JSON = {".nan", "gpus_per_worker: 0.5\nworkers_per_trial: 2"}


def test_schema_refuses_the_wrong_values_of_the_config_tests(tmp_path):
    tests = (
        test_orch_config.test_load_config_value_out_of_range_says_what_must_hold_and_what_came,
        test_orch_config.test_load_config_wrong_value_of_another_key_gives_one_line,
        test_orch_config.test_load_config_unknown_key_names_the_nearest,
    )
    lines = [case[0] for test in tests for case in given_cases(test)]
    taken = [
        line
        for line in lines
        if VALIDATORS[SweepConfig].is_valid(values_of(test_orch_config.MINIMAL + line, tmp_path))
    ]
    assert [line for line in taken if not any(part in line for part in NO_JSON)] == []
    assert len(lines) >= 50


def test_schema_refuses_keys_that_do_not_go_together(tmp_path):
    cases = given_cases(
        test_orch_config.test_load_config_keys_that_do_not_go_together_give_one_line
    )
    for head, lines, _ in cases:
        assert not VALIDATORS[SweepConfig].is_valid(values_of(head + lines, tmp_path)), head + lines


def test_schema_of_a_study_refuses_wrong_keys():
    for keys, _ in given_cases(test_study_config.test_study_keys_out_of_range_are_refused):
        if keys != {"full_learning_rate": {"low": 1e-3, "high": 1e-4, "num": 3}}:
            assert not VALIDATORS[StudyConfig].is_valid(keys), keys


def case_of(table, kind):
    """A key and a value: one of its own kind, or what nobody should write there."""
    keys = st.sampled_from(sorted(table))
    return keys.flatmap(
        lambda key: st.tuples(
            st.just(kind), st.just(key), st.one_of(table[key], st.sampled_from(ODD_SCALARS))
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("schema")


@quick_settings(500)
@given(case=st.one_of(case_of(LEGAL, SweepConfig), case_of(STUDY, StudyConfig)))
def test_schema_takes_and_refuses_what_the_config_does(folder, case):
    kind, key, value = case
    lines = (
        {"model": "base", "data": "good.jsonl"} if key != "dataset_tokens" else {"model": "base"}
    )
    lines |= {key: value} | ({"num_candidates": "3"} if key == "search" else {})
    try:
        values = values_of("".join(f"{k}: {v}\n" for k, v in lines.items()), folder)
    except ConfigError:
        return  # no YAML
    is_valid, problem = VALIDATORS[kind].is_valid(values), ""
    try:
        make_config(values, "here", kind)
    except ConfigError as error:
        problem = str(error)
    if not problem:
        assert is_valid or key in LATER
    elif is_valid:
        assert any(part in problem for part in BEYOND), problem


def printed_schema(capsys, *arguments: str) -> Schema:
    assert main(["schema", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def test_schema_verb_prints_the_sweeps_and_the_studies(capsys):
    assert printed_schema(capsys) == SCHEMAS[SweepConfig]
    assert printed_schema(capsys, "study") == SCHEMAS[StudyConfig]


def test_schema_verb_of_another_file_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["schema", "plan"])
    assert end.value.code == 2
    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["schema"], ["schema", "study"]])
def test_schema_verb_imports_nothing_heavy(tmp_path, arguments):
    code = VERB.format(arguments=arguments)
    assert loaded_after(code, tmp_path) & {*HEAVY, "numpy", "tokenizers"} == set()
    assert "jsonschema" in sys.modules
