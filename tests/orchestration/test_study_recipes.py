"""The studies that have a recipe of their own, capacity and compute: what the user sets over it, and runs."""

from pathlib import Path

import pytest

from orchestration.studies import capacity, compute
from orchestration.studies.capacity_run import recipe_of as capacity_recipe
from orchestration.studies.compute_run import recipe_of as compute_recipe
from orchestration.studies.config import load_study
from tests.orchestration.sweeps import BASE, ended, start, told
from trainers.paths import read_json


def test_capacity_recipe_of_a_preset_is_the_presets():
    for preset, recipe in (("smoke", capacity.SMOKE), ("laptop", capacity.LAPTOP)):
        assert capacity_recipe(load_study("capacity", preset, None), preset) == recipe


def test_capacity_recipe_takes_what_the_user_sets():
    given = {"lora_rank": [1, 4], "learning_rate": 5e-3, "loads": [0.5, 1], "exposures": 7}
    given |= {"global_batch_size": 32, "target": "attn+mlp", "seeds": [3, 4]}
    recipe = capacity_recipe(load_study("capacity", "smoke", None, **given), "smoke")
    assert recipe.lora_ranks == (1, 4)
    assert recipe.learning_rates == (5e-3,)
    assert recipe.loads == (0.5, 1.0)
    assert (recipe.exposures, recipe.global_batch_size) == (7, 32)
    assert recipe.target == ("attn", "mlp")
    assert recipe.seeds == (3, 4)


@pytest.mark.parametrize("key", ["lora_rank", "learning_rate"])
def test_capacity_recipe_of_a_range_is_its_points(key):
    config = load_study("capacity", "smoke", None, **{key: {"low": 1, "high": 4, "num": 3}})
    name = {"lora_rank": "lora_ranks", "learning_rate": "learning_rates"}[key]
    assert getattr(capacity_recipe(config, "smoke"), name) == pytest.approx((1, 2, 4))


def test_compute_recipe_takes_the_users_model_and_ranks(tmp_path):
    config = load_study("compute", "smoke", None, model=str(tmp_path), lora_rank=[2, 3])
    recipe = compute_recipe(config, "smoke")
    assert [(m.name, m.folder) for m in recipe.models] == [(tmp_path.name, str(tmp_path))]
    assert recipe.ranks == (2, 3)
    assert compute_recipe(load_study("compute", "laptop", None), "laptop") == compute.LAPTOP


@pytest.mark.ray
@pytest.mark.slow
def test_study_capacity_smoke_stores_no_more_bits_than_there_are_and_reruns_nothing(tmp_path):
    arguments = ("study", "capacity", "--preset", "smoke", "--name", "c")
    done = ended(start(tmp_path, *arguments))
    assert done.returncode == 0, told(done)
    results = _checked(tmp_path / "runs" / "c", "capacity")
    sets = results["data"]["sets"]
    assert [row.name for row in sorted((tmp_path / "runs" / "c").glob("facts-*"))] == sorted(
        f"facts-{count}" for count in sets
    )
    trials = list((tmp_path / "runs" / "c").glob("facts-*/trials/*/metrics.jsonl"))
    before = {path: path.stat().st_mtime_ns for path in trials}
    again = ended(start(tmp_path, *arguments))
    assert again.returncode == 0, told(again)
    assert {path: path.stat().st_mtime_ns for path in trials} == before


@pytest.mark.slow
def test_study_compute_smoke_counts_and_measures_every_arm(tmp_path):
    done = ended(start(tmp_path, "study", "compute", "--preset", "smoke", "--name", "c"))
    assert done.returncode == 0, told(done)
    results = _checked(tmp_path / "runs" / "c", "compute")
    assert [row[0] for row in results["tables"][0]["rows"]] == ["FullFT", "r1", "r16"]


def _checked(run: Path, kind: str) -> dict:
    results = read_json(run / "results.json")
    assert (results["kind"], results["status"]) == (kind, "complete")
    assert results["command"] == f"tenfold study {kind} --preset smoke --name c"
    assert results["model"]["num_params"] == 2_164_416
    assert results["question"] in (run / "report.html").read_text()
    assert (run / "results.csv").read_text().count("\n") > 2
    assert read_json(run / "resolved.json")["config"]["model"] == str(BASE)
    return results
