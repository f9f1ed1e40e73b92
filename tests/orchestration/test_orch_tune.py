"""Searchers and schedulers under the real Tune, with stub trials on a local Ray."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.search import Searcher

from orchestration.config import make_config
from orchestration.planning import make_plan
from orchestration.rungs import RungLedger, stopped_trials
from orchestration.schedulers import make_scheduler
from orchestration.searchers import ListSearcher, OptunaSearcher
from orchestration.time_limit import TimeLimit
from search_spaces.candidate import Candidate, grid_candidates, trial_name
from tests.orchestration.local_cluster import bare_ray
from trainers.paths import RunPaths

pytestmark = [pytest.mark.ray, pytest.mark.slow]
MAX_T = 9


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    with bare_ray():
        yield


def stub(config: dict) -> None:
    """A trial with a constant loss."""
    for examples in range(1, MAX_T + 1):
        tune.report({"examples": examples, "eval_loss": config["trial"]["loss"]})


def fit(
    folder: Path, name: str, searcher: Searcher, ledger: RungLedger, kind: str, stop: Any = None
) -> None:
    tune.Tuner(
        tune.with_resources(stub, {"CPU": 0.5}),
        tune_config=tune.TuneConfig(
            metric="eval_loss",
            mode="min",
            search_alg=searcher,
            scheduler=make_scheduler(kind, 1, MAX_T, 4, ledger),
            num_samples=-1,
            max_concurrent_trials=1,
        ),
        run_config=tune.RunConfig(name=name, storage_path=str(folder), verbose=0, stop=stop),
    ).fit()


def num_results(ledger: RungLedger) -> dict[str, int]:
    """Trial -> examples at its last result, in the order in which the trials began."""
    return {record.trial: record.examples for record in ledger.records()}


def test_tune_resumed_with_a_new_tuner_decides_as_one_sweep(tmp_path):
    trials = [{"name": f"loss{loss}", "loss": loss} for loss in (1.0, 5.0, 9.0)]
    path = tmp_path / "rungs.jsonl"
    fit(tmp_path, "first", ListSearcher(trials[:1], {}), RungLedger(path), "asha")
    fit(tmp_path, "second", ListSearcher(trials[1:], {}), RungLedger(path), "asha")
    assert num_results(RungLedger(path)) == {"loss1.0": 9, "loss5.0": 1, "loss9.0": 1}
    assert stopped_trials(RungLedger(path).records()) == {"loss1.0", "loss5.0", "loss9.0"}


def test_tune_median_rule_pauses_nothing_and_ends_all(tmp_path):
    trials = [{"name": f"loss{loss}", "loss": loss} for loss in (1.0, 2.0, 3.0, 2.5)]
    ledger = RungLedger(tmp_path / "rungs.jsonl")
    fit(tmp_path, "median", ListSearcher(trials, {}), ledger, "median")
    assert list(num_results(ledger).values()) == [9, 9, 9, 1]
    assert len(stopped_trials(ledger.records())) == 4


def test_tune_optuna_proposes_what_was_asked_from_the_centre_on(tmp_path, workplace, base):
    values = {"model": str(base), "dataset_tokens": 15_000, "search": "optuna", "lora_rank": [1, 8]}
    plan = make_plan(make_config(values | {"num_candidates": 3}, "test"))

    def make_trial(candidate: Candidate) -> dict:
        return {"name": trial_name(candidate), "loss": candidate.learning_rate}

    searcher = OptunaSearcher(plan.space, plan.domains, plan.num_proposed, 0, make_trial, {})
    ledger = RungLedger(tmp_path / "rungs.jsonl")
    fit(tmp_path, "optuna", searcher, ledger, "fifo")
    found = num_results(ledger)
    assert list(found.values()) == [9, 9, 9]
    assert next(iter(found)) == trial_name(next(grid_candidates(plan.space)))


def test_tune_whose_time_is_up_stops_all_and_asks_for_no_more(tmp_path):
    config = make_config({"model": "base", "data": "x", "time_budget": "1h"}, "test")
    limit = TimeLimit(config, 0, RunPaths(tmp_path), print)
    trials = [{"name": f"loss{loss}", "loss": loss} for loss in (1.0, 2.0, 3.0)]

    class Ending(ListSearcher):
        def on_trial_complete(self, *args: Any, **others: Any) -> None:
            limit.used_before_s = 3600  # with the end of the first

    ledger = RungLedger(tmp_path / "rungs.jsonl")
    fit(tmp_path, "limited", Ending(trials, {}), ledger, "fifo", limit)
    found = num_results(ledger)
    assert found["loss1.0"] == 9
    assert "loss3.0" not in found
