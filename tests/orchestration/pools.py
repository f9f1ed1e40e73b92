"""A pool of workers that train nothing (their losses are constant), a sweep over it, and what may be left of them."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import ray

from cluster.inventory import TrialDemand
from orchestration import sweep
from orchestration.ledger import Ledger
from orchestration.pool import Pool
from orchestration.progress import Progress
from orchestration.results import read_trial
from orchestration.rungs import RungLedger
from orchestration.schedulers import make_scheduler
from orchestration.searchers import ListSearcher
from orchestration.thin import ThinTrial
from trainers.paths import RunPaths, write_json_lines, write_state

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
                misbehave(command["trial"])
            else:
                name = command["trial"]
            if command["kind"] == "cancel":
                trials.pop(name, None)
            elif name in trials:
                tell_rows(link, trials[name], told, command["index"])


def misbehave(trial: dict[str, Any]) -> None:
    """What the trial's dict asks for, each time or once in its life."""
    folder, fault = Path(trial["folder"]), trial.get("fault", "")
    if fault == "hang once" and not (folder / "hung").exists():
        (folder / "hung").touch()
        while True:
            time.sleep(1)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def tell_rows(link: Any, trial: dict[str, Any], told: dict[str, int], index: int) -> None:
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
