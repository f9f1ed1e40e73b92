"""What a report says a sweep took: times, money, bytes; and the YAML that trains its best again."""

import re
from dataclasses import replace

import pytest
import yaml

from orchestration.best_config import best_config, best_yaml
from orchestration.config import load_config
from orchestration.durations import duration
from orchestration.page import MOST_ROWS, folded_table
from orchestration.placing import placed_plan
from orchestration.report_costs import memory_table, time_table
from orchestration.spending import HELD_S, group_memory, held_before, homes_of, spending
from search_spaces.candidate import Candidate, trial_name
from tests.orchestration.sweep_records import record
from tests.orchestration.sweeps import BASE, FUNCTIONS
from trainers.integrity import sealed_row
from trainers.paths import RunPaths, write_state, write_text

PLAN = {"inventory": {"num_gpus": 2}, "packs": {"needed_bytes": 1_000_000_000, "cost": None}}
PACKS = {"num_groups": 2, "workers_per_group": 1, "needed_bytes": 1_408_000_000, HELD_S: 3600.0}
TRIALS = [record(1e-3, 3.0), record(1e-2, 3.1), record(1e-1, None, status="failed")]


def cells(page: str) -> list[str]:
    return re.findall(r"<td[^>]*>(.*?)</td>", page)


def test_spending_of_gpus_counts_hours_held_and_their_price():
    spent = spending(PLAN, {"price_per_gpu_hour": 2.5}, TRIALS, PACKS)
    assert (spent.trained_s, spent.examples, spent.examples_per_s) == (32.0, 1280, 40.0)
    assert (spent.gpu_hours, spent.price) == (2.0, 5.0)
    quarter = spending(PLAN, {"gpus_per_worker": 0.25}, TRIALS, PACKS)
    assert (quarter.gpu_hours, quarter.price) == (0.5, None)


def test_spending_without_gpus_groups_or_rows_has_no_hours():
    assert spending({"inventory": {"num_gpus": 0}}, {}, TRIALS, PACKS).gpu_hours is None
    assert spending(PLAN, {}, TRIALS, None).gpu_hours is None
    assert spending({}, {}, [], None).examples_per_s is None


def test_time_table_shows_what_was_planned_beside_what_was_used():
    cost = {"hours": 1.5, "low": 1.0, "high": 2.0, "gpu_hours": 3.0, "price": 7.5}
    page = time_table(PLAN | {"packs": {"cost": cost}}, {"price_per_gpu_hour": 2.5}, TRIALS, PACKS)
    assert cells(page) == [
        "training, all trials",
        "32.0 s",
        "examples trained on, all trials",
        "1,280",
        "examples a second, of a worker group that trains",
        "40.0",
        "worker groups held",
        "1 h 0 min",
        "GPU-hours held",
        "2.000",
        "price at 2.5 a GPU-hour",
        "5.00",
        "planned, if no trial stops early",
        "about 1.5 hours (1.0 to 2.0), 3.0 GPU-hours, about 7.50 at the price given",
    ]


def test_group_memory_is_the_peak_of_each_groups_trials_over_the_plan():
    homes = {TRIALS[0].name: "group-0", TRIALS[1].name: "group-1", TRIALS[2].name: "group-1"}
    first, second = group_memory(PLAN, TRIALS, PACKS, homes)
    assert (first.group, first.num_trials, first.peak) == ("group-0", 1, 704_000_000)
    assert first.ratio == 0.5
    assert second.num_trials == 1  # the failed one measured nothing
    shown = cells(memory_table(PLAN, TRIALS, PACKS, homes))
    assert shown[:5] == ["group-0", "1", "1.408", "0.704", "50%"]


def test_group_memory_of_what_was_not_planned_or_not_measured_has_no_ratio():
    (solo,) = group_memory({"packs": None}, TRIALS, None, {})
    assert (solo.planned, solo.peak, solo.ratio) == (None, 704_000_000, None)
    bare = record(1e-3, 3.0)
    for row in bare.rows:
        del row["peak_bytes"]
    (unmeasured,) = group_memory(PLAN, [bare], None, {})
    assert (unmeasured.planned, unmeasured.peak, unmeasured.ratio) == (1_000_000_000, None, None)
    assert "not measured" in memory_table(PLAN, [bare], None, {})


def test_homes_of_a_run_are_the_groups_that_its_trials_entered_last(tmp_path):
    run = RunPaths(tmp_path)
    assert homes_of(run) == {}
    for group, name in (("group-0", "a"), ("group-1", "b")):
        write_text(run.composition(group), f"{sealed_row({'enter': {'name': name}, 'step': 0})}\n")
    assert homes_of(run) == {"a": "group-0", "b": "group-1"}


def test_held_before_is_what_earlier_drivers_wrote(tmp_path):
    run = RunPaths(tmp_path)
    assert held_before(run) == 0
    write_state(run.packs, {"num_groups": 1})
    assert held_before(run) == 0
    write_state(run.packs, {HELD_S: 12.5})
    assert held_before(run) == 12.5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1 min 0 s"),
        (3720, "1 h 2 min"),
        (47.6 * 3600, "47 h 36 min"),
        (53 * 3600, "2 d 5 h"),
    ],
)
def test_duration_is_in_units_that_people_read(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_rows", "num_tables"), [(0, 1), (MOST_ROWS + 5, 1), (MOST_ROWS + 6, 2)]
)
def test_folded_table_has_all_rows_and_folds_many(num_rows, num_tables):
    page = folded_table([("n", True)], [("", [str(i)]) for i in range(num_rows)])
    assert cells(page) == [str(i) for i in range(num_rows)]
    assert page.count("<table>") == num_tables


def test_best_yaml_reruns_the_candidate_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    values = {"model": str(BASE), "data": str(FUNCTIONS), "examples": 64, "seq_len": 256}
    values |= {"lora_rank": [4, 8], "learning_rate": [1e-3, 3e-3], "lora_alpha": "2*rank"}
    values |= {"dropout": [0.0, 0.1], "search": "random", "num_candidates": 3, "name": "mine"}
    write_text(tmp_path / "sweep.yaml", yaml.safe_dump(values))
    config = load_config(tmp_path / "sweep.yaml")
    resolved = {"config": config.model_dump(mode="json")}
    planned = placed_plan(config, None)
    for item in planned["candidates"]:
        won = Candidate.from_dict(item["candidate"])
        best = replace(TRIALS[0], candidate=item["candidate"])
        path = tmp_path / "best.yaml"
        write_text(path, best_yaml("mine", resolved, best))
        again = placed_plan(load_config(path), None)
        assert [one["name"] for one in again["candidates"]] == [trial_name(won)]
        assert (again["discarded"], again["num_proposed"]) == ([], 0)
        assert (again["name"], again["budget"]["num_examples"]) == ("mine-best", 64)


def test_best_config_drops_what_only_a_search_needs_and_keeps_what_trains():
    config = {"model": "m", "data": "d", "search": "optuna", "num_candidates": 9, "confirm": 2}
    config |= {"lr_prior": {"from": "runs/gone"}, "quantization": "none", "bad_rows": "error"}
    found = best_config("run", {"config": config}, record(1e-3, 3.0, variant="rslora"))
    assert not found.keys() & {"search", "num_candidates", "confirm", "lr_prior", "bad_rows"}
    assert found["quantization"] == "none"
    assert (found["variant"], found["lora_rank"], found["scheduler"]) == ("rslora", 8, "fifo")
