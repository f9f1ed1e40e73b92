"""What an engine does with trials that Tune gave up before they began; Tune itself is replaced."""

from dataclasses import replace
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
from orchestration.time_limit import TimeLimit
from orchestration.trials import TrialMaker
from trainers.paths import RunPaths, read_state, write_json_lines, write_state


@pytest.fixture
def make(workplace, base, write_rows, qa_rows):
    """make(**keys): what is left of one and the same run of three trials."""
    from cluster.inventory import local_inventory

    write_rows("good.jsonl", qa_rows(60))
    values = {"model": str(base), "data": "good.jsonl", "lora_rank": 1, "global_batch_size": 16}
    values |= {"learning_rate": [1e-3, 3e-3, 1e-2]}

    def made(**keys: Any) -> Work:
        plan = make_plan(make_config(values | keys, "test"))
        inventory, run = local_inventory(), RunPaths(workplace / "runs" / "run")
        demand, packs = trial_demand(plan.config, inventory), plan_packs(plan, inventory)
        return Work(plan, TrialMaker(plan, demand, packs, run), run)

    return made


@pytest.fixture
def work(make) -> Work:
    return make()


def endless(work: Work) -> TimeLimit:
    return TimeLimit(work.config, 0, work.run, print)


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
    work.run_all(None, {}, 1, partial(Ledger, work.run, Progress(names, 0, 1)), endless(work))
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
    work.run_all(None, {}, 1, partial(Ledger, work.run, Progress(names, 0, 1)), endless(work))
    assert statuses(work, names) == ["unfinished"] * 3


class Tune:
    """In Tune's place: ends the trials that it is given, the first `most` of all, each with a loss by its learning rate
    and seed."""

    def __init__(self, work: Work, monkeypatch, most: int = 99, loss=lambda c: c["learning_rate"]):
        self.run, self.left, self.loss = work.run, most, loss
        self.rounds: list[list[str]] = []
        self.schedulers: list[str] = []
        monkeypatch.setattr(sweep, "run_trials", self.run_trials)
        self.limit = endless(work)
        for _ in work.rounds(self.limit):
            ledger = partial(Ledger, work.run, Progress([], 0, 1))
            work.run_all(None, {}, 1, ledger, self.limit)

    def run_trials(self, trainable: Any, searcher: Any, scheduler: Any, run: Any, **_: Any) -> None:
        suggested = list(iter(lambda: searcher.suggest("id"), searcher.FINISHED))
        self.rounds.append([config["trial"]["name"] for config in suggested])
        self.schedulers.append(scheduler._ledger.path.name)
        for config in suggested[: self.left]:
            self._end(config["trial"])
        self.left = max(0, self.left - len(suggested))
        if not self.left:
            self.limit.used_before_s = 1e9

    def _end(self, trial: dict[str, Any]) -> None:
        paths = self.run.trial(trial["name"])
        losses = (9.0, self.loss(trial["candidate"]))
        rows = [{"steps": at, "examples": at, "eval_loss": loss} for at, loss in enumerate(losses)]
        write_json_lines(paths.metrics, rows)
        mark_ended(paths, "finished", "")


def test_engine_confirms_the_best_two_on_new_seeds_that_nobody_stops(make, monkeypatch):
    work = make(confirm=2)
    tune = Tune(work, monkeypatch)
    assert [len(names) for names in tune.rounds] == [3, 4]
    assert tune.schedulers == ["rungs.jsonl", "confirmed.jsonl"]
    records = [read_trial(work.run.trial(name)) for name in tune.rounds[1]]
    best = {r.name: r for r in map(read_trial, map(work.run.trial, tune.rounds[0]))}
    assert [best[str(r.repeats)].settings.learning_rate for r in records] == [1e-3, 3e-3] * 2
    assert [r.settings.seed for r in records] == [1, 1, 2, 2]
    for record in records:
        assert replace(record.settings, seed=0) == best[str(record.repeats)].settings
    assert make(confirm=2).first_trial() is None  # there is nothing left to resume


def test_engine_resumed_while_it_confirms_runs_the_rest_of_it_alone(make, monkeypatch):
    first = Tune(make(confirm=2), monkeypatch, most=5)
    again = Tune(make(confirm=2), monkeypatch)
    assert again.rounds == [first.rounds[1][2:]]
    assert again.schedulers == ["confirmed.jsonl"]


def test_engine_whose_time_is_up_ends_what_is_left_with_the_reason(make, monkeypatch):
    work = make(time_budget="1h")
    tune = Tune(work, monkeypatch, most=1)
    records = [read_trial(work.run.trial(name)) for name in tune.rounds[0]]
    assert [record.status for record in records] == ["finished", "stopped", "stopped"]
    assert {r.reason for r in records[1:]} == {"time_budget 1h was used up before it began"}
    assert read_state(work.run.clock)["seconds"] >= 3600
    assert make(time_budget="1h").first_trial() is None


def test_engine_whose_time_is_up_confirms_nothing(make, monkeypatch):
    tune = Tune(make(time_budget="1h", confirm=2), monkeypatch, most=3)
    assert [len(names) for names in tune.rounds] == [3]
    assert make(time_budget="1h", confirm=2).first_trial() is None


def test_time_limit_counts_all_drivers_and_the_cost_of_gpus(make):
    work = make(time_budget="2h", max_cost=8.0, price_per_gpu_hour=2.0)
    write_state(work.run.clock, {"seconds": 3500.0, "num_gpus": 4})
    limit = TimeLimit(work.config, 4, work.run, print)  # 4 GPU-hours on 4 GPUs
    assert not limit.stop_all()
    limit.began -= 100
    assert limit.reason == "max_cost 8 was used up"
    assert limit.stop_all()
    assert read_state(work.run.clock) == {"seconds": pytest.approx(3600, abs=5), "num_gpus": 4}
    with pytest.raises(ValueError, match="the workers hold no GPU"):
        TimeLimit(work.config, 0, work.run, print)


def test_time_limit_with_a_damaged_clock_counts_the_longest_trial(make):
    work, said = make(time_budget="1h"), []
    name = work.trials[0]["name"]
    row = {"steps": 1, "examples": 1, "eval_loss": 1.0, "seconds": 1800.0}
    write_json_lines(work.run.trial(name).metrics, [row])
    write_state(work.run.clock, {"seconds": 1.0})
    work.run.clock.write_text(work.run.clock.read_text().replace("1.0", "9.0"))
    limit = TimeLimit(work.config, 0, work.run, said.append)
    assert limit.used_before_s == 1800
    assert "clock.json" in said[0]
    assert said[0].endswith("the longest trial's 1800 s are counted")
