"""Where a plan would run: bytes, batches, hours, and what has no room."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.gpus import parse_inventory
from cluster.inventory import Inventory
from orchestration.cli import main
from orchestration.config import make_config
from orchestration.memory_rule import worker_places
from orchestration.packs import plan_packs, trial_demand
from orchestration.placing import asked_inventory, placed_plan
from orchestration.planning import make_plan
from search_spaces.pruner import NothingAdmittedError

MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"


def config_of(model: str, **values: Any):
    path = MODELS / f"{model}.json"
    if not path.is_file():
        pytest.skip(f"needs ../shared/models/{model}.json")
    return make_config({"model": str(path), "dataset_tokens": 10_000_000} | values, "test")


def test_placed_plan_of_70b_on_eight_gpus_is_sharded_with_hours_and_price():
    config = config_of("Llama-3.1-70B", lora_rank=[128, 256], price_per_gpu_hour=2.0)
    plan = placed_plan(config, parse_inventory("8xH100-80GB"))
    packs = plan["packs"]
    assert not plan["discarded"]
    assert packs["strategy"] == "zero3"
    assert packs["num_groups"] * packs["workers_per_group"] == 8
    assert packs["needed_bytes"] <= packs["room_bytes"] == 80e9
    for split in packs["batches"]:
        product = split["micro_batch_size"] * split["grad_accum_steps"] * split["num_workers"]
        assert product == split["global_batch_size"]
    assert packs["cost"]["price"] == pytest.approx(2.0 * packs["cost"]["gpu_hours"])
    assert packs["cost"]["gpu_hours"] == pytest.approx(8 * packs["cost"]["hours"])


def test_placed_plan_discards_the_ranks_that_have_no_room_with_their_bytes():
    config = config_of("Llama-3.1-70B", lora_rank=[128, 256], strategy="single")
    plan = placed_plan(config, parse_inventory("1xH100-80GB"))
    assert {item["candidate"]["lora_rank"] for item in plan["candidates"]} == {128}
    cut = [item for item in plan["discarded"] if item["rule"] == "memory"]
    assert {item["candidate"]["lora_rank"] for item in cut} == {256}
    numbers = cut[0]["numbers"]
    assert numbers["needed_bytes"] > numbers["room_bytes"] == 80e9
    assert "what would fit" in cut[0]["reason"]


def test_placed_plan_on_a_sharded_base_discards_the_variants_that_need_whole_weights():
    variants = ["lora", "rslora", "dora", "lora_plus", "rslora+pissa"]
    config = config_of("Llama-3.1-70B", lora_rank=128, strategy="zero3", variant=variants)
    plan = placed_plan(config, parse_inventory("8xH100-80GB"))
    assert plan["packs"]["strategy"] == "zero3"
    kept = {item["candidate"].get("variant") for item in plan["candidates"]}
    assert kept == {None, "rslora", "lora_plus"}
    reasons = {i["candidate"]["variant"]: i["reason"] for i in plan["discarded"]}
    assert reasons.keys() == {"dora", "rslora+pissa"}
    assert "pissa needs whole weights on each worker" in reasons["rslora+pissa"]
    small = config_of("Llama-3.2-1B", lora_rank=16, variant=["lora", "dora"], num_candidates=2)
    assert not placed_plan(small, parse_inventory("1xH100-80GB"))["discarded"]


@pytest.mark.parametrize(
    ("keys", "who"),
    [
        ({"metric": "exact_match"}, "a metric of answers"),
        ({"method": "rl", "examples": 1000, "dataset_tokens": None}, "method rl"),
    ],
)
def test_placed_plan_that_samples_on_a_base_that_fits_in_parts_only_admits_nothing(keys, who):
    config = config_of("Llama-3.1-70B", lora_rank=256, **keys)
    with pytest.raises(NothingAdmittedError, match=f"{who} needs a whole base on each worker"):
        placed_plan(config, parse_inventory("8xH100-80GB"))


def test_placed_plan_of_a_pissa_holds_each_rank_twice():
    def needed(variant: str) -> int:
        config = config_of(
            "Llama-3.1-8B", lora_rank=256, variant=variant, pack_size=1, num_candidates=1
        )
        return placed_plan(config, parse_inventory("1xH100-80GB"))["packs"]["bytes"]["adapters"]

    assert needed("pissa") == pytest.approx(2 * needed("lora"), rel=0.01)
    assert needed("lora") < needed("dora") < 1.05 * needed("lora")


def test_placed_plan_of_a_random_search_draws_no_rank_without_room():
    config = config_of(
        "Llama-3.1-70B",
        lora_rank=[128, 256],
        strategy="single",
        search="random",
        num_candidates=8,
    )
    plan = placed_plan(config, parse_inventory("1xH100-80GB"))
    assert {item["candidate"]["lora_rank"] for item in plan["candidates"]} == {128}
    assert plan["unfit_ranks"] == [{"target": ["attn", "mlp", "unembed"], "lora_ranks": [256]}]


def test_placed_plan_that_has_no_room_at_all_is_refused_with_what_would_fit():
    config = config_of("Llama-3.1-70B")
    with pytest.raises(NothingAdmittedError, match="what would fit: lora_rank 32") as error:
        placed_plan(config, parse_inventory("8xL4-24GB"))
    assert "ZeRO-3 over 8 workers" in str(error.value)


def test_plan_command_takes_an_inventory_and_a_price(write_sweep, capsys):
    config = str(write_sweep(lora_rank=4, learning_rate=1e-3, strategy="single"))
    assert main(["plan", config, "--inventory", "8xH100-80GB", "--price", "2.5"]) == 0
    out = capsys.readouterr().out
    assert "single on 8xH100-80GB: the whole base on one worker" in out
    assert "at the price given" in out
    assert main(["plan", config, "--inventory", "8xH100-80GB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inventory"]["num_gpus"] == 8
    assert main(["plan", config, "--inventory", "eight"]) == 2
    assert "inventory must be" in capsys.readouterr().err


def test_asked_inventory_of_two_places_is_refused(write_sweep):
    values = {"model": "m", "dataset_tokens": 1, "inventory": "1x24GB", "address": "10.0.0.1:6379"}
    with pytest.raises(ValueError, match="inventory and address must not both"):
        asked_inventory(make_config(values, "test"))


def test_plan_packs_counts_workers_that_share_a_gpu(write_sweep, base):
    config = make_config(
        {"model": str(base), "data": str(write_sweep().parent / "good.jsonl")}
        | {"gpus_per_worker": 0.25, "lora_rank": [1, 2], "learning_rate": [1e-3, 3e-3]},
        "test",
    )
    machine = Inventory(num_cpus=16, num_gpus=2, where="the test", gpu_bytes=80 * 10**9)
    demand = trial_demand(config, machine)
    places = worker_places(demand, machine)
    assert (places.num_gpus, places.gpu_bytes) == (8, 20 * 10**9)
    assert worker_places(demand, replace(machine, num_cpus=3)).num_gpus == 3
    packs = plan_packs(make_plan(config), machine)
    assert (packs.strategy, packs.workers_per_group) == ("single", 1)
    assert packs.num_groups == 8
