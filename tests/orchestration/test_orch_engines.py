"""What an engine does with trials that Tune gave up before they began; Tune itself is replaced."""

from functools import partial
from typing import Any

import pytest

from orchestration import sweep
from orchestration.config import make_config
from orchestration.engines import Work
from orchestration.ledger import Ledger
from orchestration.packs import plan_packs, trial_demand
from orchestration.planning import make_plan
from orchestration.progress import Progress
from orchestration.results import mark_ended, read_trial
from orchestration.trials import TrialMaker
from trainers.paths import RunPaths


@pytest.fixture
def work(workplace, base, write_rows, qa_rows):
    from cluster.inventory import local_inventory

    write_rows("good.jsonl", qa_rows(60))
    values = {"model": str(base), "data": "good.jsonl", "lora_rank": 1, "global_batch_size": 16}
    plan = make_plan(make_config(values | {"learning_rate": [1e-3, 3e-3, 1e-2]}, "test"))
    inventory, run = local_inventory(), RunPaths(workplace / "runs" / "run")
    demand, packs = trial_demand(plan.config, inventory), plan_packs(plan, inventory)
    return Work(plan, TrialMaker(plan, demand, packs, run), run)


def run_all(work: Work, monkeypatch, give_up) -> list[list[str]]:
    """Runs with a Tune that ends every trial but those of `give_up(attempt, names)`; returns the
    names that each attempt was given."""
    attempts: list[list[str]] = []

    def run_trials(trainable: Any, searcher: Any, scheduler: Any, run: Any, **options: Any) -> None:
        suggested = iter(lambda: searcher.suggest("id"), searcher.FINISHED)
        names = [config["trial"]["name"] for config in suggested]
        options["callback"].never_began = give_up(len(attempts), names)
        attempts.append(names)
        for name in names:
            if name not in options["callback"].never_began:
                mark_ended(run.trial(name), "stopped", "")

    monkeypatch.setattr(sweep, "run_trials", run_trials)
    names = [trial["name"] for trial in work.trials]
    work.run_all(None, {}, 1, partial(Ledger, work.run, Progress(names, 0, 1)))
    return attempts


def statuses(work: Work, names: list[str]) -> list[str]:
    return [read_trial(work.run.trial(name)).status for name in names]


def test_engine_runs_what_never_began_once_more(work, monkeypatch):
    attempts = run_all(work, monkeypatch, lambda at, names: names[1:2] if at == 0 else [])
    assert [len(names) for names in attempts] == [3, 1]
    assert attempts[1] == attempts[0][1:2]
    assert statuses(work, attempts[0]) == ["stopped"] * 3


def test_engine_gives_up_what_never_begins(work, monkeypatch):
    attempts = run_all(work, monkeypatch, lambda at, names: names[-1:])
    assert [len(names) for names in attempts] == [3] + [1] * sweep.ACTOR_FAILURES
    assert statuses(work, attempts[0]) == ["stopped", "stopped", "failed"]


def test_engine_leaves_an_interrupted_sweep_to_resume(work, monkeypatch):
    def interrupt(trainable: Any, searcher: Any, *_: Any, callback: Any, **options: Any) -> None:
        callback.never_began = [searcher.suggest("id")["trial"]["name"]]

    names = [trial["name"] for trial in work.trials]
    monkeypatch.setattr(sweep, "run_trials", interrupt)
    work.run_all(None, {}, 1, partial(Ledger, work.run, Progress(names, 0, 1)))
    assert statuses(work, names) == ["unfinished"] * 3
