"""Sweeps on a cluster of several raylets: nodes that die, come back, stay away, or are taken away with a notice."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from cluster.inventory import TrialDemand
from orchestration.config import load_config
from orchestration.packs import measurement
from orchestration.planning import make_plan
from orchestration.pool import Pool
from tests.orchestration.pools import DEMAND, pool_of, serve_constant, write_trials
from tests.orchestration.sweeps import (
    WHOLE,
    ended,
    losses,
    start,
    statuses,
    told,
    wait_until,
    write_config,
)
from tests.trainers.links import as_command
from tests.trainers.trials import CANDIDATE, numbers, trial
from trainers.checkpoint_folder import checkpoint_examples
from trainers.data.cache import write_json
from trainers.paths import RunPaths, read_state
from trainers.sft_trainer import TrialSpec, train_trial

pytestmark = [pytest.mark.ray, pytest.mark.slow]
WAIT_S = "90"
"""How long a group may be without workers where a test waits for that; a first start on a busy machine took
82 s."""
ASK_S = 5.0
DEADLINE_S = 15
"""From the notice to the end of a node; the shortest of a cloud is 30."""


@pytest.fixture
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs, where drivers and broker live, and two nodes of one CPU each, or of the parameter's."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        made.add_node(num_cpus=getattr(request, "param", 1))
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def joined(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, with this process as its driver."""
    for name in ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"):
        monkeypatch.setenv(name, "1")  # so that what the pool sets is undone
        monkeypatch.delenv(name)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    return cluster


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


def kill(cluster: Cluster, node: Any) -> None:
    """kill -9 of a raylet and of what it started."""
    cluster.remove_node(node, allow_graceful=False)


def node_of(cluster: Cluster, group: dict[str, Any]) -> Any:
    """The node on which a group's first worker lives."""
    return next(node for node in cluster.worker_nodes if node.node_id == group["node_id"])


def ready_groups(pool: Pool) -> dict[str, dict[str, Any]]:
    return {name: info for name, info in pool.groups().items() if "pid" in info}


# Whole sweeps


def copy_measurement(folder: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a cluster's workers find measured what this machine's did: numbers are equal to the last bit only where
    forwards are of one size."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TENFOLD_CACHE", str(folder / "cache"))
    demand = TrialDemand(num_workers=1, cpus_per_worker=2, gpus_per_worker=0)
    configs = load_config(Path("sweep.yaml")), load_config(Path("sweep.yaml"), address=address)
    shutil.copyfile(*(measurement(make_plan(config), demand)["path"] for config in configs))


@pytest.mark.faults
@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_sweep_that_loses_a_node_and_then_all_says_so_and_resumes_to_undisturbed_numbers(
    cluster, whole_folder, monkeypatch
):
    monkeypatch.setenv("TENFOLD_GROUP_WAIT_S", WAIT_S)
    run = write_config(whole_folder, **WHOLE)
    copy_measurement(whole_folder, cluster.address, monkeypatch)
    sweep = start(whole_folder, "sweep", "sweep.yaml", "--address", cluster.address)
    wait_until(lambda: len(list(run.glob("trials/*/checkpoint"))) > 1, sweep)  # both are at work
    kill(cluster, next(iter(cluster.worker_nodes)))
    # The other node goes on with what that one had.
    wait_until(lambda: len(statuses(run)) > 1, sweep)
    for node in list(cluster.worker_nodes):
        kill(cluster, node)
    done = ended(sweep)
    assert done.returncode not in (0, None), told(done)
    line = f"no worker group is left: it was without workers for {WAIT_S} s"
    assert line in " ".join(done.stderr.split()), told(done)
    assert "tenfold resume" in done.stderr
    before = statuses(run)
    assert {status["status"] for status in before.values()} == {"finished"}
    assert len(before) < 3

    cluster.add_node(num_cpus=2)
    done = ended(start(whole_folder, "resume", "runs/run", "--address", cluster.address))
    assert done.returncode == 0, told(done)
    planned = [candidate["name"] for candidate in read_state(run / "plan.json")["candidates"]]
    ends = {name: status["status"] for name, status in statuses(run).items()}
    assert ends == dict.fromkeys(planned, "finished")
    assert losses(run) == losses(whole_folder / "runs" / "whole")
    assert (run / "best" / "adapter_model.safetensors").is_file()


# Groups


@pytest.mark.faults
def test_group_restarts_on_a_node_that_comes_back_and_the_end_does_not_wait_for_one_that_does_not(
    joined, run
):
    (one,) = write_trials(run, [1.0])
    with pool_of(run, 2, serve_constant) as pool:
        wait_until(lambda: len(ready_groups(pool)) == 2)
        name, info = sorted(ready_groups(pool).items())[0]
        pool.open(1, [(one, 0)])
        kill(joined, node_of(joined, info))
        # The trial goes on elsewhere while its group waits for a node.
        assert row_of(pool, one, 3)["last"]
        assert pool.groups()[name]["pid"] == info["pid"]
        joined.add_node(num_cpus=1)
        wait_until(lambda: pool.groups()[name]["pid"] != info["pid"])
        kill(joined, node_of(joined, pool.groups()[name]))
        wait_until(lambda: name in ray.get(pool.broker.waiting.remote()))
        began = time.monotonic()
    assert time.monotonic() - began < 60  # seconds; no node comes for board.GROUP_WAIT_S
    # What the run that waited had reserved goes with its driver.
    ray.shutdown()
    ray.init(address=joined.address, log_to_driver=False, logging_level="error")
    wait_until(lambda: {g["state"] for g in placement_group_table().values()} == {"REMOVED"})


def row_of(pool: Pool, trial: dict[str, Any], index: int) -> dict[str, Any]:
    """What a thin trial hears when it asks for an evaluation."""
    answer = None
    while answer is None:
        answer = ray.get(pool.broker.row.remote(trial, index, ASK_S))
    return answer


# Nodes that are taken away


def drain(cluster: Cluster, node: Any, *, deadline_s: int) -> None:
    """What a cloud's notice leads to: Ray is told that a node will be taken away."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    command += ["--address", cluster.address, "--node-id", node.node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command += ["--deadline-remaining-seconds", str(deadline_s)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def long_trial(tmp_path: Path) -> TrialSpec:
    """300 steps of 0.1 s or so with an evaluation after every 100."""
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            f'{{"prompt": "{i} plus one?", "completion": " It is {i + 1}."}}\n' for i in range(3000)
        )
    )
    own = {"num_examples": 2400, "eval_every": 800}
    return trial(path, tmp_path / "run" / "trials" / "long", candidate=CANDIDATE, **own)


def measured(folder: Path, spec: TrialSpec) -> dict[str, Any]:
    """A forward's size that every worker finds measured: other sizes round differently."""
    write_json(folder / "speed.json", {"max_tokens": spec.max_tokens})
    return {"path": str(folder / "speed.json"), "lora_rank": 4, "row_tokens": 32}


@pytest.mark.faults
def test_node_that_is_taken_away_hands_its_trial_on_in_the_middle_of_a_rung(
    joined, run, long_trial, tmp_path
):
    values = as_command(long_trial)
    checkpoint = run.trial("long").checkpoint
    storage = str(run.tune / "train")
    with Pool(DEMAND, 1, values, measured(tmp_path, long_trial), storage) as pool:
        group = pool.first_group()
        pool.open(1, [(values, 0)])
        row_of(pool, values, 0)
        drain(joined, node_of(joined, group), deadline_s=DEADLINE_S)
        began = time.monotonic()
        wait_until(lambda: checkpoint_examples(checkpoint) % long_trial.eval_every)
        assert time.monotonic() - began < DEADLINE_S
        wait_until(lambda: pool.groups()["group-0"]["node_id"] != group["node_id"])
        told_rows = [row_of(pool, values, index)["row"] for index in range(3)]
        assert ray.get(pool.broker.deaths.remote()) == {"long": 0}
    undisturbed = train_trial(replace(long_trial, folder=tmp_path / "alone"), lambda row: True)
    assert numbers(told_rows) == numbers(undisturbed.rows)[1:]
