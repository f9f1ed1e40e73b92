"""The worker pool on a real local Ray, with workers that train nothing: their losses are constant."""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cluster.inventory import TrialDemand
from orchestration import sweep
from orchestration.board import MAX_STARTS
from orchestration.ledger import Ledger
from orchestration.pool import Pool
from orchestration.progress import Progress
from orchestration.results import read_trial
from orchestration.rungs import RungLedger
from orchestration.schedulers import make_scheduler
from orchestration.searchers import ListSearcher
from orchestration.thin import ThinTrial
from tests.orchestration.local_cluster import local_cluster
from tests.orchestration.sweeps import wait_until
from trainers.paths import RunPaths, read_state, write_json_lines, write_state

pytestmark = pytest.mark.ray
MAX_T = 4
LOSSES = [3.0, 2.0, 5.0, 2.5, 2.6]
# ASHA, reduction factor 2, rungs at 1, 2 and 4 examples, the trials one after another. A trial goes on
# whose loss is at most the median of those that were recorded at the rung before it:
#   loss 3.0   the first everywhere                                           to the end
#   loss 2.0   rung 1: 3; rung 2: 3                                           to the end
#   loss 5.0   rung 1: 3, 2, median 2.5                                       stopped at 1
#   loss 2.5   rung 1: 3, 2, 5, median 3; rung 2: 3, 2, median 2.5            to the end
#   loss 2.6   rung 1: 3, 2, 5, 2.5, median 2.75; rung 2: 3, 2, 2.5, median 2.5   stopped at 2
EXAMPLES = [4, 4, 1, 4, 2]


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    with local_cluster():
        yield


def serve_constant(config: dict[str, Any]) -> None:
    """A group's worker: tells each row that is asked for, with the loss that the trial's dict names."""
    from orchestration.broker_link import link_of

    link = link_of(config)
    link.here()
    if not link.begin():
        return
    link.hello({"max_tokens": 512})
    trials: dict[str, dict[str, Any]] = {}
    told: dict[str, int] = {}
    while True:
        for command in link.commands(idle=True):
            if command["kind"] == "stop":
                return
            if command["kind"] == "enter":
                name = command["trial"]["name"]
                trials[name], told[name] = command["trial"], 0
                _misbehave(command["trial"])
            else:
                name = command["trial"]
            if command["kind"] == "cancel":
                trials.pop(name, None)
            elif name in trials:
                _tell_rows(link, trials[name], told, command["index"])


def _misbehave(trial: dict[str, Any]) -> None:
    """What the trial's dict asks for, each time or once in its life."""
    folder, fault = Path(trial["folder"]), trial.get("fault", "")
    if fault == "hang once" and not (folder / "hung").exists():
        (folder / "hung").touch()
        while True:
            time.sleep(1)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def _tell_rows(link: Any, trial: dict[str, Any], told: dict[str, int], index: int) -> None:
    name, folder = trial["name"], Path(trial["folder"])
    rows = [
        {"examples": step + 1, "steps": step + 1, "eval_loss": trial["loss"]}
        for step in range(index + 1)
    ]
    last = len(rows) == trial["num_examples"]
    write_json_lines(folder / "metrics.jsonl", rows)
    if last:
        ended = {"status": "finished", "reason": ""}
        write_state(folder / "status.json", ended | {"examples": len(rows), "steps": len(rows)})
    for step in range(told[name], index + 1):
        event = {"trial": name, "index": step, "row": rows[step]}
        link.tell(event | {"kind": "row", "last": step + 1 == trial["num_examples"]})
    told[name] = index + 1
    if last:
        link.tell({"kind": "end", "trial": name, "status": "finished", "reason": ""})


def serve_dying(config: dict[str, Any]) -> None:
    """A group whose workers die while they load."""
    from orchestration.broker_link import link_of

    if link_of(config).begin():
        os.kill(os.getpid(), signal.SIGKILL)


DEMAND = TrialDemand(num_workers=1, cpus_per_worker=1, gpus_per_worker=0)


def pool_of(run: RunPaths, num_groups: int, serve: Any, *, one_run: bool = False, **config) -> Pool:
    warm, measure = config.get("warm", {}), config.get("measure", {})
    storage = str(run.tune / "train")
    return Pool(DEMAND, num_groups, warm, measure, storage, one_run=one_run, serve=serve)


def name_of(loss: float) -> str:
    return f"loss{loss}"


def write_trials(
    run: RunPaths, losses: list[float], faults: Mapping[float, str] | None = None
) -> list[dict[str, Any]]:
    """The dicts of trials, as far as board and stub read them, each in its folder."""
    trials = []
    for loss in losses:
        paths = run.trial(name_of(loss))
        trial = {"name": name_of(loss), "folder": str(paths.root), "loss": loss}
        trial |= {"num_examples": MAX_T, "base": {}, "data": {}}
        trial |= {"candidate": {"full_finetune": False}}
        if faults and loss in faults:
            trial["fault"] = faults[loss]
        write_state(paths.config, trial)
        trials.append(trial)
    return trials


class Killer(Ledger):
    """The driver's ledger, which kills a process when a trial has come so far."""

    def __init__(
        self, run: RunPaths, pool: Pool, *, at: tuple[float, int] | None, who: str
    ) -> None:
        names = [name_of(loss) for loss in LOSSES]
        progress = Progress(names, 0, MAX_T)
        super().__init__(
            run,
            progress,
            [],
            on_end=pool.cancel,
            on_put_off=pool.put_off,
            check=pool.require_group,
        )
        self.pool, self.who = pool, who
        self.at = (name_of(at[0]), at[1]) if at else None
        self.killed: list[int] = []
        self.group = ""

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        super().on_trial_result(iteration, trials, trial, result, **info)
        if not self.killed and self.at == (result["trial"], result["examples"]):
            # Any that serves: on a busy machine one group may have done this much before the other
            # has loaded the base.
            self.group, facts = next(iter(sorted(self.pool.groups().items())))
            self.killed = [self._victim(result, facts)]
            os.kill(self.killed[0], signal.SIGKILL)

    def _victim(self, result: dict[str, Any], facts: dict[str, Any]) -> int:
        if self.who in ("thin", "worker"):
            return result["pid"] if self.who == "thin" else facts["pid"]
        (found,) = (p for p in psutil.Process().children(recursive=True) if self.who in _title(p))
        return found.pid


def run_sweep(
    run: RunPaths,
    pool: Pool,
    places: int,
    *,
    kind: str = "asha",
    at=None,
    who: str = "",
    max_concurrent: int = 1,
    faults: Mapping[float, str] | None = None,
) -> Killer:
    """Runs a trial for each of LOSSES on a pool, as engines.py does; those that never began, again."""
    trials = write_trials(run, LOSSES, faults)
    killer = Killer(run, pool, at=at, who=who)
    pool.first_group()
    pool.open(places, [(trial, 0) for trial in trials])
    while trials:
        killer.never_began = []
        sweep.run_trials(
            ThinTrial,
            ListSearcher(trials, {"broker": pool.address, "seen": {}}),
            make_scheduler(kind, 1, MAX_T, 2, RungLedger(run.rungs)),
            run,
            max_concurrent=max_concurrent,
            callback=killer,
        )
        trials = [trial for trial in trials if trial["name"] in killer.never_began]
    return killer


def examples_of(run: RunPaths) -> list[int]:
    """Examples of each trial at the last result that the scheduler saw."""
    seen = {record.trial: record.examples for record in RungLedger(run.rungs).records()}
    return [seen[name_of(loss)] for loss in LOSSES]


def statuses(run: RunPaths) -> list[str]:
    return [read_trial(run.trial(name_of(loss))).status for loss in LOSSES]


OURS = ("ray::RayTrainWorker", "ray::ThinTrial", "ray::ImplicitFunc", "ray::Resource")
OURS += ("ray::Broker", "ray::TrainController")


def assert_nothing_left() -> None:
    """No process and no reservation of a sweep outlives its pool."""
    children = psutil.Process().children(recursive=True)
    left = [child for child in children if _title(child).startswith(OURS)]
    _, alive = psutil.wait_procs(left, timeout=30)  # a killed process takes its time to go
    assert [_title(process) for process in alive] == []
    assert reservations() <= {"REMOVED"}
    assert ray.available_resources()["CPU"] == 2


def reservations() -> set[str]:
    """The states of all placement groups."""
    return {group["state"] for group in ray.util.placement_group_table().values()}


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


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
        "tests.orchestration.test_orch_pool.DEMAND",
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
                    _misbehave(command["trial"])
                dist.barrier()
            name = command["trial"] if command["kind"] != "enter" else name
            if rank == 0 and command["kind"] != "cancel":
                _tell_rows(link, trials[name], told, command["index"])


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
