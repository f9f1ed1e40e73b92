"""Field cases of sweeps (part C), each with its own input and value: on a real local Ray with workers that train
nothing where Ray decides, else without it. Those of one trial are in tests/trainers/test_field_cases_c.py, those
of a whole `tenfold sweep` in test_field_cases_c_sweeps.py."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle, tune

from cluster.inventory import Inventory, TrialDemand
from orchestration import engines, sweep
from orchestration.cli import main
from orchestration.config import make_config
from orchestration.ledger import Ledger
from orchestration.packs import plan_packs, trial_demand
from orchestration.planning import Plan, make_plan
from orchestration.pool import Pool
from orchestration.preflight import problems
from orchestration.progress import Progress
from orchestration.results import TrialRecord, best_trial, read_trial, read_trials
from orchestration.rungs import RungLedger
from orchestration.schedulers import make_scheduler
from orchestration.searchers import ListSearcher
from orchestration.solo import solo_trial
from orchestration.thin import ThinTrial
from orchestration.tracking import make_trackers
from orchestration.trials import TrialMaker
from tests.orchestration import stubs
from tests.orchestration.local_cluster import local_cluster
from tests.orchestration.pools import assert_nothing_left
from tests.orchestration.test_orch_preflight import FACTS, NEEDS
from tests.orchestration.tracked import FakeWandb
from trainers.paths import RunPaths, write_state

ONE = TrialDemand(num_workers=1, cpus_per_worker=1, gpus_per_worker=0)
TWO = TrialDemand(num_workers=2, cpus_per_worker=1, gpus_per_worker=0)
NAN = math.nan


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with local_cluster():
        yield


def write_trials(
    run: RunPaths, losses: Mapping[str, list[float | None]], num_examples: int
) -> list[dict[str, Any]]:
    """The dicts of trials by name, an evaluation for each example, each in its folder."""
    trials = []
    for name, each in losses.items():
        paths = run.trial(name)
        trial: dict[str, Any] = {"name": name, "folder": str(paths.root), "losses": each}
        trial |= {"num_examples": num_examples, "eval_every": 1, "base": {}, "data": {}}
        trial |= {"candidate": {"full_finetune": False, "name": name}}
        write_state(paths.config, {key: trial[key] for key in trial if key != "losses"})
        trials.append(trial)
    return trials


@contextmanager
def pool_for(run: RunPaths, warm: dict[str, Any], demand: TrialDemand) -> Iterator[Pool]:
    """A group with a place for one trial at a time."""
    with Pool(demand, 1, warm, {}, str(run.tune / "train"), serve=stubs.serve) as pool:
        pool.first_group()
        pool.open(1, [])
        yield pool


def run_trials(
    pool: Pool,
    run: RunPaths,
    trials: list[dict[str, Any]],
    *,
    kind: str = "fifo",
    tracking: tuple[str, ...] = (),
) -> None:
    """Runs trials one at a time, as engines.py does."""
    names, most = [trial["name"] for trial in trials], trials[0]["num_examples"]
    trackers = make_trackers(list(tracking), "sweep", run)
    ends = {"on_end": pool.cancel, "on_put_off": pool.put_off, "check": pool.require_group}
    ledger = Ledger(run, Progress(names, 0, most), trackers, **ends)
    sweep.run_trials(
        ThinTrial,
        ListSearcher(trials, {"broker": pool.address, "seen": {}}),
        make_scheduler(kind, 1, most, 4, RungLedger(run.rungs)),
        run,
        max_concurrent=1,
        callback=ledger,
    )
    assert ledger.never_began == []


CASES: dict[str, tuple[str, int, list[list[float | None]]]] = {
    "c01": ("fifo", 1, [[NAN], [1.0], [2.0]]),
    "c01-alone": ("fifo", 1, [[NAN], [math.inf]]),
    "c02": ("asha", 9, [[NAN], [1.0], [5.0], [9.0]]),
    "c03": ("asha", 9, [[9.0], [5.0], [1.0]]),
    "c04": ("fifo", 2, [[2.0], [None], [1.0]]),
}
"""Case -> scheduler, evaluations of a trial, the losses of each trial in their order."""


@pytest.fixture(scope="module")
def cases(local_ray, tmp_path_factory) -> dict[str, list[TrialRecord]]:
    """The trials of each of CASES in their order, run one after the other by the same workers."""
    folder = tmp_path_factory.mktemp("one")
    runs = {case: RunPaths(folder / case) for case in CASES}
    trials = {
        case: write_trials(
            runs[case], {f"{case}-{n}": each for n, each in enumerate(losses)}, num_examples
        )
        for case, (_, num_examples, losses) in CASES.items()
    }
    with pool_for(runs["c01"], trials["c01"][0], ONE) as pool:
        for case, (kind, _, _) in CASES.items():
            run_trials(pool, runs[case], trials[case], kind=kind)
    return {
        case: [read_trial(runs[case].trial(trial["name"])) for trial in trials[case]]
        for case in CASES
    }


def evaluations(run: RunPaths, name: str) -> list[list[str]]:
    """(pid, examples) of everything that workers evaluated."""
    lines = (run.trial(name).root / "evaluated").read_text().splitlines()
    return [line.split() for line in lines]


@pytest.mark.ray
def test_c01_of_losses_nan_1_2_the_best_is_1_and_of_nan_alone_there_is_none(cases):
    # Field case C01.
    records = cases["c01"]
    assert [record.status for record in records] == ["diverged", "finished", "finished"]
    assert records[0].reason == "eval_loss nan at step 1"
    best = best_trial(records)
    assert best is records[1]
    assert best.best is not None
    assert best.best["eval_loss"] == 1.0
    assert [record.status for record in cases["c01-alone"]] == ["diverged", "diverged"]
    assert best_trial(cases["c01-alone"]) is None


@pytest.mark.ray
def test_c02_nan_first_ends_after_one_iteration_and_1_5_9_have_9_1_1_under_asha(cases):
    # Field case C02: losses nan, 1, 5, 9 in this order, max_t 9; Ray alone: 9, 9, 1, 1.
    statuses = [record.status for record in cases["c02"]]
    assert statuses == ["diverged", "finished", "stopped", "stopped"]
    assert [len(record.rows) - 1 for record in cases["c02"][1:]] == [9, 1, 1]
    assert cases["c02"][0].reason == "eval_loss nan at step 1"


@pytest.mark.ray
def test_c03_worst_first_one_at_a_time_all_run_to_the_end_under_asha(cases):
    # Field case C03: stub trials with constant loss 9, 5, 1.
    assert [len(record.rows) - 1 for record in cases["c03"]] == [9, 9, 9]


def test_c03_estimate_promises_nothing_of_a_scheduler_and_the_best_guess_comes_first(
    write_sweep, capsys
):
    # Field case C03: what ASHA saves depends on the order.
    rates = [1e-4, 3e-3, 3e-2]
    plans = {}
    for scheduler in ("fifo", "asha"):
        values = {"lora_rank": 8, "learning_rate": rates, "global_batch_size": 16}
        path = write_sweep(scheduler=scheduler, epochs=4, **values)
        assert main(["plan", str(path), "--json", "--inventory", "1xH100-80GB"]) == 0
        plans[scheduler] = json.loads(capsys.readouterr().out)
    assert plans["asha"]["packs"]["cost"] == plans["fifo"]["packs"]["cost"]
    assert plans["asha"]["packs"]["cost"]["hours"] > 0
    assert main(["plan", str(path), "--inventory", "1xH100-80GB"]) == 0
    assert "nothing stopped early" in capsys.readouterr().out
    path = write_sweep(lora_rank=8, global_batch_size=16, full_ft_learning_rate=2e-5)
    assert main(["plan", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["candidates"]
    rates = [item["candidate"]["learning_rate"] for item in found]
    assert rates[0] == pytest.approx(2e-4)  # 10x the rate of full fine-tuning
    assert rates[0] not in (min(rates), max(rates))


@pytest.mark.ray
def test_c04_trial_that_never_reports_the_metric_fails_alone(cases):
    # Field case C04: one report without the metric must not be the end of fit().
    assert [record.status for record in cases["c04"]] == ["finished", "failed", "finished"]
    assert [len(record.rows) for record in cases["c04"]] == [3, 1, 3]  # the base's row, and two


@pytest.mark.parametrize("engine", ["packed", "solo"])
def test_c08_eight_gpus_a_trial_on_a_laptop_are_refused_with_both_numbers(
    write_sweep, capsys, monkeypatch, engine
):
    # Field case C08: 8 GPUs per trial in the YAML on a laptop (workplace hides any GPU).
    def never(address: str | None) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(sweep, "start_ray", never)
    values = {"workers_per_trial": 8, "gpus_per_worker": 1, "engine": engine}
    assert main(["sweep", str(write_sweep(global_batch_size=16, **values))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a trial needs 8 GPUs" in line
    assert "this machine has 0" in line
    assert not Path("runs").exists()


@dataclass(frozen=True)
class TwoRanks:
    """Trials of two workers each, that ran on two CPUs."""

    run: RunPaths
    fake: FakeWandb


@pytest.fixture(scope="module")
def two_ranks(local_ray, tmp_path_factory) -> TwoRanks:
    """Four trials of 2 ranks with a tracker; then a second driver goes on with the last, which has no end."""
    folder = tmp_path_factory.mktemp("two")
    run, fake = RunPaths(folder / "run"), FakeWandb(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in fake.environment.items():
            patch.setenv(name, value)
        trials = write_trials(run, {f"trial{n}": [3.0, 2.0 + n] for n in range(4)}, 3)
        for left in (trials, trials[3:]):
            with pool_for(run, trials[0], TWO) as pool:
                run_trials(pool, run, left, tracking=("wandb",))
            if left is trials:
                _forget(run, "trial3")
    return TwoRanks(run, fake)


def _forget(run: RunPaths, name: str) -> None:
    """Makes a run one whose driver died before it heard anything of a trial."""
    run.trial(name).status.unlink()
    lines = run.rungs.read_text().splitlines(keepends=True)
    run.rungs.write_text("".join(line for line in lines if name not in line))


@pytest.mark.ray
def test_c09_trials_of_two_workers_on_two_cpus_finish_and_leave_everything_free(two_ranks):
    # Field case C09: 2 CPUs, trials of 2 workers.
    for record in read_trials(two_ranks.run):
        assert record.status == "finished"
        done = evaluations(two_ranks.run, record.name)
        for examples in ("1", "2", "3"):
            assert len({pid for pid, at in done if at == examples}) == 2
    assert_nothing_left()


@pytest.mark.ray
def test_c20_four_trials_of_two_ranks_have_four_runs_and_the_resumed_one_its_id(two_ranks):
    # Field case C20: 4 stub trials with 2 ranks each, one resumed; wandb is a fake that takes notes.
    inits = two_ranks.fake.calls("init")
    ids = [call["id"] for call in inits]
    assert ids == [*(f"sweep-trial{number}" for number in range(4)), "sweep-trial3"]
    assert {(call["resume"], call["group"]) for call in inits} == {("allow", "sweep")}
    first, second = inits[0]["pid"], inits[4]["pid"]
    assert [call["pid"] for call in inits] == [first] * 4 + [second]
    workers = {int(pid) for name in ids for pid, _ in evaluations(two_ranks.run, name[6:])}
    assert not workers & {first, second}
    for number in range(4):
        steps = [call["step"] for call in two_ranks.fake.calls("log", id=ids[number], pid=first)]
        assert steps == [0, 1, 2, 3]  # of examples: not counted anew by whoever goes on


def test_c10_tuner_and_the_trainer_inside_write_to_one_storage(
    write_sweep, monkeypatch, workplace, base
):
    # Field case C10: storage ./out.
    write_sweep()
    values = {"model": str(base), "data": "good.jsonl", "storage": "./out", "engine": "solo"}
    plan = _plan(values | {"lora_rank": 4, "learning_rate": 1e-3, "global_batch_size": 16})
    asked: dict[str, Any] = {}

    class Tuner:
        def __init__(self, trainable: Any, tune_config: Any, run_config: Any) -> None:
            asked["tuner"] = run_config.storage_path
            asked["trainer"] = tune_config.search_alg.suggest("id")["workers"]["storage"]

        def fit(self) -> None:
            """Nothing runs."""

    monkeypatch.setattr(tune, "Tuner", Tuner)
    run = RunPaths(Path("out") / "run")
    here = Inventory(num_cpus=2, num_gpus=0, where="this machine")
    engines.train(plan, here, run, Progress([], 0, 1))
    assert asked["tuner"] == str(workplace / "out" / "run" / "tune")
    assert asked["trainer"] == f"{asked['tuner']}/train"


def test_c10_storage_of_one_node_alone_is_refused_with_its_name():
    # Field case C10: a local path and more than one node.
    (line,) = problems(replace(NEEDS, storage="/home/me/out"), FACTS, FACTS, storage_seen=False)
    assert line.startswith("storage /home/me/out must be a folder that all nodes share")


def _plan(values: dict[str, Any]) -> Plan:
    return make_plan(make_config(values, "test"))


@pytest.mark.parametrize("engine", ["packed", "solo"])
def test_c19_what_travels_with_200_mb_of_data_is_small(write_sweep, workplace, base, engine):
    # Field case C19: 200 MB jsonl; pickled trainable < 1 MB.
    write_sweep()
    rates = {"low": 1e-4, "high": 1e-2, "num": 50}
    values = {"model": str(base), "data": "good.jsonl", "lora_rank": [4, 8, 16], "engine": engine}
    plan = _plan(values | {"learning_rate": rates, "global_batch_size": 16})
    big = workplace / "big.jsonl"
    with big.open("wb") as file:
        file.truncate(200_000_000)  # planned on few rows, then trained on a file of that size
    assert plan.data_spec is not None
    plan = replace(plan, data_spec=replace(plan.data_spec, data=str(big)))
    here, run = Inventory(num_cpus=2, num_gpus=0, where="this machine"), RunPaths(workplace / "run")
    maker = TrialMaker(plan, trial_demand(plan.config, here), plan_packs(plan, here), run)
    trials = [maker.make(candidate) for candidate in plan.pruned.admitted]
    assert len(trials) == 150
    assert {trial["data"]["data"] for trial in trials} == {str(big)}
    searcher = ListSearcher(trials, {"broker": {"name": "b", "namespace": "n"}, "seen": {}})
    trainable = ThinTrial if engine == "packed" else solo_trial
    pickled = cloudpickle.dumps((tune.with_resources(trainable, {"CPU": 1}), searcher))
    assert str(big).encode() in pickled
    assert len(pickled) < 1_000_000


@pytest.mark.parametrize("flags", [[], ["--inventory", "8xH100-80GB"]])
def test_c21_bf16_is_planned_on_a_machine_without_a_gpu(write_sweep, capsys, flags):
    # Field case C21: bf16 in the YAML, no GPU on the planning machine.
    path = write_sweep(dtype="bf16", lora_rank=4, learning_rate=1e-3, global_batch_size=16)
    assert main(["plan", str(path), "--json", *flags]) == 0
    assert len(json.loads(capsys.readouterr().out)["candidates"]) == 1
