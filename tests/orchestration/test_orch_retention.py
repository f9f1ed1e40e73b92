"""The retention set in plans, trials, trackers and on the terminal."""

import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from cluster.inventory import TrialDemand
from cluster.packing import PackPlan
from orchestration.config import make_config
from orchestration.forgetting import retention_sentence
from orchestration.plan_json import plan_to_dict
from orchestration.planning import make_plan
from orchestration.results import TrialRecord
from orchestration.results_table import show_results
from orchestration.tracking import metrics_of
from orchestration.trials import TrialMaker
from tests.orchestration.sweeps import candidate_dict
from trainers.paths import RunPaths
from trainers.sft_trainer import TrialSpec

TEXTS = [{"text": f"Sentence number {i} of a general text. " * (i + 1)} for i in range(9)]


@pytest.fixture
def planned(workplace, base, write_rows, qa_rows):
    write_rows("train.jsonl", qa_rows(60))
    write_rows("general.jsonl", TEXTS)

    def plan(**values):
        config = {"model": str(base), "data": "train.jsonl", "lora_rank": 4, "seq_len": 64}
        return make_plan(make_config(config | {"learning_rate": 1e-3} | values, "test"))

    return plan


def test_make_plan_tells_how_much_of_the_retention_set_is_evaluated(planned):
    facts = plan_to_dict(planned(retention="general.jsonl"))["retention"]
    assert (facts["data"], facts["num_rows"]) == ("general.jsonl", facts["num_all_rows"])
    assert facts["num_all_rows"] > len(TEXTS)  # long texts were split
    sentence = retention_sentence(facts)
    for part in ("general.jsonl", f"{facts['num_loss_tokens']:,} of", "at every evaluation"):
        assert part in sentence
    assert plan_to_dict(planned())["retention"] is None


def test_make_plan_retention_counts_nothing_towards_the_data(planned):
    plain, with_text = plan_to_dict(planned()), plan_to_dict(planned(retention="general.jsonl"))
    for key in ("data", "dataset_bits", "budget", "candidates"):
        assert with_text[key] == plain[key]


def test_trial_maker_gives_workers_absolute_paths_and_every_option(planned, workplace, tmp_path):
    config = {"retention": "general.jsonl", "packing": True, "group_by_length": True}
    config |= {"system_role": "fold", "data": {"train.jsonl": 1, "general.jsonl": 0.5}}
    plan = planned(**config)
    demand = TrialDemand(num_workers=1, cpus_per_worker=1, gpus_per_worker=0)
    packs = PackPlan(num_groups=1, places=1, max_tokens=64, keep_dequantized=False, reason="")
    maker = TrialMaker(plan, demand, packs, RunPaths(tmp_path / "run"))
    made = json.loads(json.dumps(maker.make(plan.pruned.admitted[0])))
    spec = TrialSpec.from_dict(made)
    paths = [Path(str(spec.data.retention)), *map(Path, spec.data.weights)]
    assert [path.name for path in paths] == ["general.jsonl", "train.jsonl", "general.jsonl"]
    assert all(path.is_absolute() and path.is_file() for path in paths)
    assert list(spec.data.weights.values()) == [1.0, 0.5]
    assert (spec.data.packing, spec.data.system_role) == (True, "fold")
    assert spec.group_by_length


def record(name: str, losses: list[float | None], *, retained: bool = True) -> TrialRecord:
    """A trial of one evaluation every 16 examples, whose eval_loss falls."""
    rows = [
        {"examples": 16 * at, "steps": at, "eval_loss": 3.0 - at, "eval_bits_per_byte": 1.0}
        | ({"retention_loss": loss} if retained else {})
        for at, loss in enumerate(losses)
    ]
    return TrialRecord(
        name=name, candidate=candidate_dict(), status="finished", reason="", rows=tuple(rows)
    )


def shown(records: list[TrialRecord], tmp_path: Path) -> list[str]:
    console = Console(record=True, width=300, file=(tmp_path / "out").open("w"))
    show_results(records, records[0], RunPaths(tmp_path / "run"), 0, console)
    return console.export_text().splitlines()


def test_show_results_has_a_column_of_what_was_forgotten(tmp_path):
    lines = shown([record("a", [2.0, 2.5]), record("b", [2.0, None])], tmp_path)
    assert "retention (over base)" in lines[1]
    assert "2.5000 (+0.5000)" in lines[2]
    assert "not finite" in lines[3]
    assert "retention_loss of the untouched base: 2.0000" in lines
    assert "eval_loss of the untouched base: 3.0000" in lines


def test_show_results_without_a_retention_set_does_not_speak_of_it(tmp_path):
    lines = shown([record("a", [2.0, 2.5], retained=False)], tmp_path)
    assert not [line for line in lines if "retention" in line]


def test_trackers_log_retention_beside_eval_loss_and_skip_what_is_not_finite():
    row = {"eval_loss": 2.0, "retention_loss": 1.5, "examples": 16}
    assert metrics_of(row) == {"eval_loss": 2.0, "retention_loss": 1.5}
    assert metrics_of(row | {"retention_loss": None}) == {"eval_loss": 2.0}


def test_make_plan_retention_of_many_tokens_says_how_few_are_used(planned, write_rows):
    write_rows(
        "long.jsonl", [{"text": f"{i} and {i * i} and {math.sqrt(i)} " * 20} for i in range(200)]
    )
    facts = plan_to_dict(planned(retention="long.jsonl"))["retention"]
    assert facts["num_loss_tokens"] <= 32_768 < facts["num_all_loss_tokens"]
    assert facts["num_loss_tokens"] > 30_000
