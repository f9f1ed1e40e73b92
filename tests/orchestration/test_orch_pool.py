"""The worker pool on a real local Ray, with workers that train nothing: their losses are constant."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.inventory import TrialDemand
from orchestration.board import MAX_STARTS
from orchestration.results import read_trial
from orchestration.rungs import RungLedger
from tests.orchestration.local_cluster import local_cluster
from tests.orchestration.pools import (
    EXAMPLES,
    LOSSES,
    MAX_T,
    assert_nothing_left,
    examples_of,
    misbehave,
    name_of,
    pool_of,
    reservations,
    run_sweep,
    serve_constant,
    serve_dying,
    statuses,
    tell_rows,
    write_trials,
)
from tests.orchestration.sweeps import wait_until
from trainers.paths import RunPaths, read_state

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    with local_cluster():
        yield


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


def test_pool_asha_on_one_place_stops_whom_its_rule_stops_and_leaves_nothing(run):
    with pool_of(run, 1, serve_constant) as pool:
        run_sweep(run, pool, places=1)
    assert examples_of(run) == EXAMPLES
    assert statuses(run) == ["finished", "finished", "stopped", "finished", "stopped"]
    assert len(RungLedger(run.rungs).records()) == sum(EXAMPLES)
    assert_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("at", [(2.5, 2), (5.0, 1)], ids=["while-running", "between-two-trials"])
def test_pool_thin_actor_killed_the_sweep_goes_on_with_the_same_decisions(run, at):
    with pool_of(run, 1, serve_constant) as pool:
        killer = run_sweep(run, pool, places=1, at=at, who="thin")
    assert killer.killed
    assert examples_of(run) == EXAMPLES
    assert statuses(run) == ["finished", "finished", "stopped", "finished", "stopped"]
    assert len(RungLedger(run.rungs).records()) == sum(EXAMPLES)  # none was judged twice
    assert_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("one_run", [False, True])
def test_pool_worker_killed_its_trials_go_on_and_end(run, one_run):
    with pool_of(run, 2, serve_constant, one_run=one_run) as pool:
        killer = run_sweep(run, pool, 2, kind="fifo", at=(3.0, 2), who="worker", max_concurrent=5)
        # The others may have done all the work before it is back.
        wait_until(lambda: pool.groups()[killer.group]["pid"] not in killer.killed)
        after = pool.groups()[killer.group]["pid"]
    assert len(killer.killed) == 1
    assert after not in killer.killed
    assert examples_of(run) == [MAX_T] * len(LOSSES)
    assert statuses(run) == ["finished"] * len(LOSSES)
    assert [read_state(run.trial(name_of(loss)).status)["examples"] for loss in LOSSES] == [4] * 5
    assert_nothing_left()


@pytest.mark.slow
@pytest.mark.faults
def test_pool_trial_that_kills_its_workers_fails_with_its_reason_and_the_others_end(run):
    with pool_of(run, 1, serve_constant) as pool:
        run_sweep(run, pool, 3, kind="fifo", max_concurrent=4, faults={5.0: "kill"})
    ends = dict(zip(LOSSES, statuses(run), strict=True))
    assert ends == {loss: "failed" if loss == 5.0 else "finished" for loss in LOSSES}
    reason = read_trial(run.trial(name_of(5.0))).reason
    assert "at last with no other trial beside it" in reason
    assert_nothing_left()


@pytest.mark.slow
@pytest.mark.faults
def test_pool_group_that_hangs_is_ended_and_its_trials_go_on(run, monkeypatch):
    monkeypatch.setenv("TENFOLD_HANG_S", "4")  # these workers speak every second
    monkeypatch.setattr(
        "tests.orchestration.pools.DEMAND",
        TrialDemand(num_workers=2, cpus_per_worker=1, gpus_per_worker=0),
    )
    with pool_of(run, 1, serve_together) as pool:
        run_sweep(run, pool, 2, kind="fifo", max_concurrent=3, faults={2.0: "hang once"})
        deaths = ray.get(pool.broker.deaths.remote())
    assert statuses(run) == ["finished"] * len(LOSSES)
    assert (run.trial(name_of(2.0)).root / "hung").exists()
    assert set(deaths.values()) == {0}  # it was cleared by its next evaluation
    assert_nothing_left()


def serve_that_loads_for_ever(config: dict[str, Any]) -> None:
    """The second group never gets ready."""
    if config["groups"][0] == "group-0":
        serve_constant(config)
        return
    from orchestration.broker_link import link_of

    link = link_of(config)
    link.here()
    while link.begin():
        time.sleep(10_000)


@pytest.mark.slow
@pytest.mark.faults
def test_pool_that_ends_does_not_wait_for_a_group_that_loads(run):
    with pool_of(run, 2, serve_that_loads_for_ever) as pool:
        run_sweep(run, pool, 2, kind="fifo", max_concurrent=3)
        wait_until(lambda: ray.get(pool.broker.loading.remote()))
    assert statuses(run) == ["finished"] * len(LOSSES)
    assert_nothing_left()


def serve_together(config: dict[str, Any]) -> None:
    """A group of two workers that share every command in a collective; the second hangs, and the first waits."""
    import torch.distributed as dist
    from ray.train import get_context

    from orchestration.broker_link import link_of

    rank = get_context().get_world_rank()
    link = link_of(config)
    link.here()
    if rank == 0:
        link.begin()
        link.hello({"max_tokens": 512})
    told: dict[str, int] = {}
    trials: dict[str, dict[str, Any]] = {}
    while True:
        box = [link.commands(idle=True) if rank == 0 else None]
        dist.broadcast_object_list(box)
        for command in box[0]:
            if command["kind"] == "stop":
                return
            if command["kind"] == "enter":
                name = command["trial"]["name"]
                trials[name], told[name] = command["trial"], 0
                if rank == 1:
                    misbehave(command["trial"])
                dist.barrier()
            name = command["trial"] if command["kind"] != "enter" else name
            if rank == 0 and command["kind"] != "cancel":
                tell_rows(link, trials[name], told, command["index"])


@pytest.mark.slow
@pytest.mark.faults
def test_pool_whose_train_controller_dies_starts_its_groups_again(run):
    with pool_of(run, 1, serve_constant) as pool:
        killer = run_sweep(
            run, pool, 1, kind="fifo", at=(2.0, 2), who="ray::TrainController", max_concurrent=2
        )
    assert killer.killed
    assert statuses(run) == ["finished"] * len(LOSSES)
    wait_until(lambda: reservations() <= {"REMOVED"})  # Train's cleaner frees what it had


@pytest.mark.slow
@pytest.mark.faults
def test_pool_whose_broker_dies_ends_with_a_line_that_says_how_to_go_on(run):
    with (
        pytest.raises(ValueError, match=r"the broker .* has died; `tenfold resume` goes on"),
        pool_of(run, 1, serve_constant) as pool,
    ):
        run_sweep(run, pool, 1, kind="fifo", at=(2.0, 2), who="ray::Broker", max_concurrent=2)
    assert "failed" not in statuses(run)
    wait_until(lambda: reservations() <= {"REMOVED"})


@pytest.mark.slow
def test_pool_base_that_cannot_be_loaded_is_a_valueerror_that_names_it(run, tmp_path):
    (tmp_path / "base").mkdir()
    base = {"model": str(tmp_path / "base"), "quantization": "none", "dtype": "fp32"}
    (trial,) = write_trials(run, [1.0])
    trial |= {"base": base, "data": {"data": "absent.jsonl", "model": str(tmp_path / "base")}}
    trial |= {"eval_every": 1}
    trial["candidate"] = CANDIDATE
    del trial["loss"]
    with (
        pytest.raises(ValueError, match=r"no worker group could start: .*absent\.jsonl") as error,
        pool_of(run, 1, None, warm=trial) as pool,
    ):
        pool.first_group()
    assert "\n" not in str(error.value)
    assert_nothing_left()


CANDIDATE = {
    "learning_rate": 1e-3,
    "lora_rank": 1,
    "lora_alpha": 1.0,
    "global_batch_size": 1,
    "target": ["attn"],
    "lr_schedule": "constant",
    "warmup": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "dropout": 0.0,
    "seed": 0,
}


@pytest.mark.slow
def test_pool_workers_that_die_while_they_load_are_given_up(run):
    text = rf"no worker group could start: .*died {MAX_STARTS} times while they loaded the base"
    with (
        pytest.raises(ValueError, match=text),
        pool_of(run, 1, serve_dying) as pool,
    ):
        pool.first_group()
    assert_nothing_left()


@pytest.mark.slow
def test_pool_that_loses_its_last_group_ends_the_sweep_and_no_trial_has_failed(run):
    def serve(config: dict[str, Any]) -> None:
        from orchestration.broker_link import link_of

        link = link_of(config)
        link.begin()
        link.hello({"max_tokens": 512})
        while not link.commands(idle=True):
            pass
        link.lose("RuntimeError: the GPU fell off the bus")

    with (
        pytest.raises(ValueError, match=r"no worker group is left: .*fell off the bus"),
        pool_of(run, 1, serve) as pool,
    ):
        run_sweep(run, pool, places=1)
    assert statuses(run) == ["unfinished"] * len(LOSSES)
    assert_nothing_left()
