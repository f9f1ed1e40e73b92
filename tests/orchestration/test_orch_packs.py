"""The packs of a sweep as plan and report state them."""

import json
from pathlib import Path

import pytest

from cluster.inventory import Inventory
from orchestration.cli import main
from orchestration.config import make_config
from orchestration.packs import measurement, plan_packs, trial_demand
from orchestration.placing import packs_sentence, shown_packs
from orchestration.planning import make_plan
from trainers.data.cache import write_json


@pytest.fixture
def planned(workplace, base, write_rows, qa_rows):
    """The plan of 4 candidates of the shipped base."""
    write_rows("train.jsonl", qa_rows(60))
    values = {"model": str(base), "data": "train.jsonl", "lora_rank": [1, 2]}
    values |= {"learning_rate": [1e-3, 3e-3], "global_batch_size": 16}
    return lambda **more: make_plan(make_config(values | more, "test"))


def machine(num_cpus: int = 2, **values: int) -> Inventory:
    defaults = {"num_gpus": 0, "memory_bytes": 8 * 2**30, "gpu_bytes": None}
    return Inventory(num_cpus=num_cpus, where="this machine", **(defaults | values))


def test_plan_packs_a_group_for_each_core_and_no_more_places_than_trials(planned):
    packs = plan_packs(planned(), machine(2))
    assert packs.num_groups == 2
    assert packs.num_groups * packs.places >= 4
    assert plan_packs(planned(), machine(16)).num_groups == 4


def test_plan_packs_pack_size_is_taken(planned):
    assert plan_packs(planned(pack_size=1), machine(2)).places == 1


def test_plan_packs_measured_forward_is_found_again(planned):
    plan = planned(num_candidates=4)
    before = plan_packs(plan, machine(1))
    assert "not measured here yet" in before.reason
    path = measurement(plan, trial_demand(plan.config, machine(1)))["path"]
    write_json(Path(path), {"max_tokens": 64})
    after = plan_packs(plan, machine(1))
    assert after.max_tokens == 64
    assert "not measured" not in after.reason


def test_plan_packs_base_that_no_worker_holds_is_refused(planned):
    with pytest.raises(ValueError, match=r"needs .* GB a worker"):
        plan_packs(planned(), machine(1, memory_bytes=1_000_000))


@pytest.mark.parametrize(
    "values", [{"engine": "solo"}, {"address": "10.0.0.1:6379"}], ids=["solo", "cluster"]
)
def test_shown_packs_are_stated_where_they_are_known(planned, values):
    assert shown_packs(planned(**values)) is None


def test_packs_sentence_is_in_plan_and_in_its_json(planned, write_sweep, capsys):
    config = write_sweep(lora_rank=1, learning_rate=1e-3)
    assert main(["plan", str(config), "--json"]) == 0
    packs = json.loads(capsys.readouterr().out)["packs"]
    sentence = packs_sentence(packs)
    assert f"up to {packs['places']} adapters each" in sentence
    assert main(["plan", str(config)]) == 0
    assert sentence in " ".join(capsys.readouterr().out.split())
