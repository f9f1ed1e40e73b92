"""Whether anything is lost: a sweep of stub candidates, some of which go wrong, whose driver, actors and controller are
killed as well.

    python benchmarks/soak.py                      # 1,000 candidates, 5% with a fault, 4 drivers killed
    python benchmarks/soak.py --candidates 60 --driver-kills 1

Tune, Train, the broker, the scheduler (ASHA), the ledger and the files of a run are the real ones; only the
training is a stub (soak_worker.py). Each driver is a process of its own, which goes on where the last died.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import ROOT, say, write_result
from benchmarks.soak_worker import FAULTS, NUM_EVALUATIONS, serve
from orchestration.mending import mend
from orchestration.results import mark_ended, read_trials
from orchestration.rungs import RungLedger
from orchestration.trials import known_names, settle, unended, untold
from trainers.paths import RunPaths, read_state, write_state

PLACES, NUM_GROUPS = 8, 2
SAY_EVERY_S = 10.0
EXPECTED = {
    "": {"finished", "stopped"},
    "kill once": {"finished", "stopped"},
    "kill": {"failed"},
    "hang once": {"finished", "stopped"},
    "diverge": {"diverged"},
    "fail": {"failed"},
    "damage": {"finished", "stopped"},
}
"""Fault -> how its trial may end."""
CANDIDATE = {
    "full_finetune": False,
    "lora_rank": 1,
    "learning_rate": 1e-3,
}
VICTIMS = ("ray::TrainController", "ray::ThinTrial", "ray::Resource", "ray::RayTrainWorker")


def main() -> int:
    args = arguments()
    if args.drive:
        drive(RunPaths(Path(args.drive)))
        return 0
    found = soak(RunPaths(Path(args.work) / "run"), args)
    keys = ("candidates", "fault_frac", "driver_kills", "actor_kills", "seed")
    write_result(args.output, {key: getattr(args, key) for key in keys}, found)
    return 0 if not found["lost"] and not found["unexpected"] else 1


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked for on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json"
    )
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--fault-frac", type=float, default=0.05)
    parser.add_argument("--driver-kills", type=int, default=4)
    parser.add_argument("--actor-kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", default="soak-run", help="a folder that is not there yet")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def soak(run: RunPaths, args: argparse.Namespace) -> dict[str, Any]:
    """Drives a run to its end through all its deaths, and counts what became of every candidate."""
    rng, began = random.Random(args.seed), time.monotonic()
    planned = write_trials(run, args, rng)
    _notes(run).touch()
    kills, done = Counter[str](), 0
    drivers_left, actors_left = args.driver_kills, args.actor_kills
    next_word = began
    driver = _start(run)
    while driver.poll() is None or done < args.candidates:
        if driver.poll() is not None:
            assert driver.returncode, "a driver that ended well left trials without an end"
            driver = _start(run)
        time.sleep(1.0)
        done = sum((run.trial(name).status).exists() for name in planned)
        share = done / args.candidates
        if drivers_left and share > 1 - drivers_left / (args.driver_kills + 1):
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            drivers_left, kills["driver"] = drivers_left - 1, kills["driver"] + 1
        elif actors_left and share > 1 - actors_left / (args.actor_kills + 1):
            victim = _victim(driver, rng)
            kills[victim] += bool(victim)
            actors_left -= bool(victim)
        if time.monotonic() > next_word:
            say(f"{done} of {args.candidates} ended; killed {dict(kills)}")
            next_word += SAY_EVERY_S
    return account(run, planned, kills) | {"seconds": round(time.monotonic() - began)}


def write_trials(run: RunPaths, args: argparse.Namespace, rng: random.Random) -> dict[str, str]:
    """Candidate -> its fault."""
    planned = {}
    for number in range(args.candidates):
        name = f"stub-{number:04d}"
        fault = rng.choice(FAULTS) if rng.random() < args.fault_frac else ""
        paths = run.trial(name)
        trial = {"name": name, "folder": str(paths.root.resolve()), "fault": fault}
        trial |= {"num_examples": NUM_EVALUATIONS, "base": {}, "data": {}, "candidate": CANDIDATE}
        write_state(paths.config, trial)
        planned[name] = fault
    return planned


def _start(run: RunPaths) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.soak", "--drive", str(run.root.resolve())]
    return subprocess.Popen(
        command, cwd=Path(__file__).parents[1], env=os.environ | {"TENFOLD_HANG_S": "8"}
    )


def _victim(driver: subprocess.Popen[bytes], rng: random.Random) -> str:
    """Kills one of the driver's actors or workers; what it was, or nothing."""
    try:
        below = psutil.Process(driver.pid).children(recursive=True)
        titles = {process: " ".join(process.cmdline()) for process in below}
    except psutil.NoSuchProcess:
        return ""
    found = [(p, kind) for p, title in titles.items() for kind in VICTIMS if title.startswith(kind)]
    if not found:
        return ""
    process, kind = rng.choice(found)
    process.send_signal(signal.SIGKILL)
    return kind


def account(run: RunPaths, planned: dict[str, str], kills: Counter[str]) -> dict[str, Any]:
    """What became of every candidate."""
    mend(run, set(), partial(_note, run))
    settle(run)
    ends = {record.name: record.status for record in read_trials(run)}
    lost = [name for name in planned if ends.get(name, "unfinished") == "unfinished"]
    wrong = {
        name: f"{fault or 'no fault'}: {ends[name]}"
        for name, fault in planned.items()
        if name not in lost and ends[name] not in EXPECTED[fault]
    }
    records = RungLedger(run.rungs).records()
    twice = len(records) - len({(r.trial, r.examples, r.decision) for r in records})
    return {
        "candidates": len(planned),
        "faults": dict(Counter(filter(None, planned.values()))),
        "kills": dict(kills),
        "ends": dict(Counter(ends.values())),
        # One that ASHA stops before it finishes damages nothing.
        "trials_damaged": sum(
            fault == "damage" and ends.get(name) == "finished" for name, fault in planned.items()
        ),
        "damaged_files_mended": len(_notes(run).read_text().splitlines()),
        "lost": lost,
        "unexpected": wrong,
        "decided_twice": twice,
    }


def _notes(run: RunPaths) -> Path:
    return run.root.with_name("mended.txt")


def _note(run: RunPaths, words: str) -> None:
    """Keeps what a driver said of damage: those after it find the files mended."""
    with _notes(run).open("a") as notes:
        notes.write(words + "\n")


def _noted(run: RunPaths, say: Callable[[str], None], words: str) -> None:
    """What a driver says of a trial that ended with damaged files, which it mends at once."""
    _note(run, words)
    say(words)


def drive(run: RunPaths) -> None:
    """One driver: goes on with what has no end, as engines.py does."""
    import ray

    from cluster.inventory import TrialDemand
    from orchestration.engines import NEVER_BEGAN
    from orchestration.ledger import Ledger
    from orchestration.pool import Pool
    from orchestration.progress import Progress
    from orchestration.run_folder import driving
    from orchestration.sweep import start_ray, stop_ray
    from trainers.run_lock import claim_folders

    with driving(run):
        claim_folders(run, lambda: say("waiting for the last driver's workers"))
        mend(run, set(), partial(_note, run))
        seen = settle(run)
        start_ray(None)
        assert ray.is_initialized()
        trials = _left(run)
        demand = TrialDemand(num_workers=1, cpus_per_worker=1, gpus_per_worker=0)
        warm = {"folder": str(run.trials / "none")}
        storage = str((run.tune / "train").resolve())
        progress = Progress([t["name"] for t in trials], 0, NUM_EVALUATIONS)
        progress.say = partial(_noted, run, progress.say)
        with progress, Pool(demand, NUM_GROUPS, warm, {}, storage, serve=serve) as pool:
            pool.first_group()
            pool.open(PLACES, [(trial, seen.get(trial["name"], 0)) for trial in trials])
            make = partial(
                Ledger, run, progress, [], on_end=pool.cancel, on_put_off=pool.put_off,
                check=pool.require_group,
            )  # fmt: skip
            for _ in range(3):
                never_began = _run(run, pool, trials, settle(run), make())
                trials = [t for t in _left(run) if t["name"] in never_began]
                if not trials:
                    break
            for trial in trials:
                mark_ended(run.trial(trial["name"]), "failed", NEVER_BEGAN)
        stop_ray()


def _left(run: RunPaths) -> list[dict[str, Any]]:
    return [read_state(run.trial(name).config) for name in unended(run, known_names(run))]


def _run(
    run: RunPaths, pool: Any, trials: list[dict[str, Any]], seen: dict[str, int], ledger: Any
) -> list[str]:
    from orchestration.schedulers import make_scheduler
    from orchestration.searchers import ListSearcher
    from orchestration.sweep import run_trials
    from orchestration.thin import ThinTrial

    scheduler = make_scheduler("asha", 1, NUM_EVALUATIONS, 3, RungLedger(run.rungs))
    for name, examples, loss in untold(run):
        scheduler.complete(name, examples, loss)
    run_trials(
        ThinTrial,
        ListSearcher(trials, {"broker": pool.address, "seen": seen}),
        scheduler,
        run,
        max_concurrent=NUM_GROUPS * PLACES + 1,
        callback=ledger,
    )
    return ledger.never_began


if __name__ == "__main__":
    sys.exit(main())
