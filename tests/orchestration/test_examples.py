"""Every file in examples/ is planned, with the shapes of the models that it names."""

import json
import re

import pytest

from orchestration.cli import main
from tests.fuzzing import ROOT
from tests.orchestration.shipped import CONFIGS, EXAMPLES, place_data, place_models
from tests.orchestration.test_orch_carried import write_run


@pytest.fixture
def inputs(workplace):
    """A working folder with what the examples name."""
    if not CONFIGS.is_dir():
        pytest.skip(f"the models' configs are not at {CONFIGS}")
    place_data(workplace)
    place_models(workplace)
    row = {"prompt": "Count to 280.", "completion": ", ".join(map(str, range(1, 281)))}
    with (workplace / "train.jsonl").open("a") as file:
        file.write(
            json.dumps(row)
        )  # nearly as long as rows may be, which is what memory depends on
    write_run(workplace / "runs" / "small")
    return workplace


EXPECTED = {
    "smallest.yaml": ("single", 42),
    "own-data-8b.yaml": ("single", 12),
    "chat.yaml": ("single", 10),
    "rl-gsm8k.yaml": ("single", 54),
    "llama-70b-8xh100.yaml": ("zero3", 8),
    "moe-qwen3-30b.yaml": ("zero3", 8),
    "variants.yaml": ("single", 24),
    "carried.yaml": ("single", 14),
}
"""How the base is held, and how many trials are planned: nothing is lost to a slip in the file."""


SMALL_DATA = {"few_steps"}
"""Pitfalls of the few rows that stand for a user's data here."""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_planned(inputs, capsys, path):
    assert main(["plan", str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    plan = json.loads(out)
    trials = plan["num_proposed"] or len(plan["candidates"])
    assert (plan["packs"]["strategy"], trials) == EXPECTED[path.name]
    assert plan["discarded"] == []
    severe = [pitfall for pitfall in plan["pitfalls"] if pitfall["code"] not in SMALL_DATA]
    assert [pitfall["code"] for pitfall in severe] == []


def test_example_of_episodes_prices_and_carried_rates_have_them(inputs, capsys):
    plans = {}
    for name in ("rl-gsm8k", "own-data-8b", "carried"):
        assert main(["plan", str(ROOT / "examples" / f"{name}.yaml"), "--json"]) == 0
        plans[name] = json.loads(capsys.readouterr().out)
    assert plans["rl-gsm8k"]["rl"]["num_episodes"] == 32_000
    assert plans["own-data-8b"]["packs"]["cost"]["price"] > 0
    assert plans["carried"]["confirmation"]["num_trials"] == 3


def test_examples_are_listed_in_their_readme():
    listed = re.findall(
        r"^\| \[(.*?)\]", (ROOT / "examples" / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == [path.name for path in EXAMPLES]
