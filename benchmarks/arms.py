"""The arms of sweep_makespan.py: each is started as a user starts it, a cold process, and watched from outside."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import BASE_MODEL, FUNCTIONS, ROOT, SHARED, say, tenfold_command
from orchestration.config import load_config
from orchestration.planning import Plan, make_plan
from orchestration.results import read_trial
from search_spaces.candidate import Candidate, trial_name
from trainers.data.examples import RowEncoder
from trainers.data.records import BadRows
from trainers.data.row_reader import RowReader
from trainers.data.rows import CompletionRow, row_digest
from trainers.data.sources import resolve_source
from trainers.data.spec import DataSpec
from trainers.data.token_rows import fitted_rows
from trainers.data.tokenizer import load_tokenizer
from trainers.paths import (
    RunPaths,
    read_json,
    read_json_lines,
    write_json,
    write_json_lines,
    write_text,
)

HELD_OUT_FRAC = 0.1
TARGET = ["attn", "mlp"]
"""Not the head: TRL 1.16 refuses an adapter on lm_head."""
LORA_RANKS = [8, 16]
ENGINES: dict[str, dict[str, Any]] = {
    "solo": {"engine": "solo", "scheduler": "fifo"},
    "warm": {"engine": "packed", "scheduler": "fifo", "pack_size": 1},
    "packed": {"engine": "packed", "scheduler": "fifo"},
    "packed-asha": {"engine": "packed", "scheduler": "asha"},
}
"""Tenfold's arms: what their sweep.yaml has beside the common part."""
POLL_S, TELL_S = 0.2, 20.0
RUN = "sweep"


@dataclass(frozen=True)
class Dataset:
    """Where rows come from, and the longest row that is kept."""

    path: Path
    seq_len: int


DATASETS = {
    "functions": Dataset(FUNCTIONS, 128),
    # Of gsm8k and alpaca, 128 tokens of a tokenizer made for Python would leave a few dozen rows.
    "gsm8k": Dataset(SHARED / "data" / "gsm8k" / "test.jsonl", 256),
    "alpaca": Dataset(SHARED / "data" / "chat" / "alpaca_en_demo.json", 256),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all arms share. evaluations: of a trial, evenly spaced; steps must be a multiple of it."""

    steps: int
    candidates: int
    evaluations: int
    batch: int
    naive_concurrency: int
    timeout_s: float

    @property
    def eval_steps(self) -> int:
        return self.steps // self.evaluations


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of one arm."""

    arm: str
    dataset: str
    seed: int
    repeat: int

    def name(self, settings: Settings) -> str:
        """Of its part file: everything that must not be mixed up."""
        what = f"{settings.steps}x{settings.candidates}e{settings.evaluations}"
        if self.arm == "naive":
            what += f"-c{settings.naive_concurrency}"
        return f"{self.arm}-{self.dataset}-{what}-seed{self.seed}-repeat{self.repeat}"


def write_rows(dataset: Dataset, folder: Path) -> dict[str, int]:
    """Writes train.jsonl and eval.jsonl, which every arm reads: the rows within seq_len.

    White space between prompt and completion goes to the completion: TRL and Tenfold part a token
    that straddles the seam differently, and nothing else in a row (tests on all three data sets
    showed equal ids and masks).
    """
    spec = DataSpec(data=str(dataset.path), model=str(BASE_MODEL), seq_len=dataset.seq_len)
    tokenizer, bad = load_tokenizer(str(BASE_MODEL)), BadRows()
    reader = RowReader(spec, bad)
    moved = ((_moved(row), place) for row, place in reader.rows(resolve_source(spec.data)))
    sides: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for row, _, tokens in RowEncoder(tokenizer).encode(moved, bad):
        assert isinstance(row, CompletionRow)
        if fitted_rows(tokens, spec.seq_len, "drop", tokenizer.special_ids):
            position = int.from_bytes(row_digest(row)[:8], "big") / 2**64
            side = "eval" if position < HELD_OUT_FRAC else "train"
            sides[side].append({"prompt": row.prompt, "completion": row.completion})
    bad.raise_if_any()
    for side, rows in sides.items():
        write_json_lines(folder / f"{side}.jsonl", rows)
    return {side: len(rows) for side, rows in sides.items()}


def _moved(row: Any) -> CompletionRow:
    prompt = row.prompt.rstrip()
    return CompletionRow(prompt, row.prompt[len(prompt) :] + row.completion)


def sweep_yaml(job: Job, settings: Settings, rows: Path) -> dict[str, Any]:
    """The sweep.yaml of a job. The naive arm trains the candidates that `packed` plans."""
    return {
        "model": str(BASE_MODEL),
        "data": str(rows / "train.jsonl"),
        "eval": str(rows / "eval.jsonl"),
        "seq_len": DATASETS[job.dataset].seq_len,
        "examples": settings.steps * settings.batch,
        "eval_every": settings.eval_steps * settings.batch,
        "global_batch_size": settings.batch,
        "target": TARGET,
        "lora_rank": LORA_RANKS,
        "num_candidates": settings.candidates,
        "seed": job.seed,
        "quantization": "nf4",
        "dtype": "fp32",
        **ENGINES.get(job.arm, ENGINES["packed"]),
    }


def run_job(job: Job, settings: Settings, work: Path) -> dict[str, Any]:
    """Runs an arm in a folder of its own and returns its part: times, rows, losses.

    Raises:
        RuntimeError: the arm failed; its log is kept.
    """
    folder = work / "arms" / job.name(settings)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    values = sweep_yaml(job, settings, work / "rows" / job.dataset)
    write_text(folder / "sweep.yaml", yaml.safe_dump(values, sort_keys=False))
    plan = make_plan(load_config(folder / "sweep.yaml"))
    load = os.getloadavg()[0]
    run = _naive if job.arm == "naive" else _tenfold
    part = run(plan, settings, folder, job)
    shutil.rmtree(folder)
    return {**vars(job), "load_average_before": load, **part}


def _tenfold(plan: Plan, settings: Settings, folder: Path, job: Job) -> dict[str, Any]:
    command = [*tenfold_command(), "sweep", "sweep.yaml", "--name", RUN]
    watcher = Watcher(RunPaths(folder / "runs" / RUN))
    began, makespan = run_process(command, folder, settings.timeout_s, str(job), watcher)
    run = watcher.run
    packs = read_json(run.packs) if run.packs.exists() else None
    parallel = packs["num_groups"] if packs else len(os.sched_getaffinity(0))
    trials = []
    for candidate in plan.pruned.admitted:
        record = read_trial(run.trial(trial_name(candidate)))
        rows = [
            _row(row, watcher.seen[record.name, row["examples"]] - began) for row in record.rows
        ]
        trials.append(_trial(candidate, record.status, rows))
    started = [row["at_s"] for trial in trials for row in trial["rows"] if row["steps"] == 0]
    return _part(makespan, min(started), parallel, trials) | {"packs": packs}


def _naive(plan: Plan, settings: Settings, folder: Path, job: Job) -> dict[str, Any]:
    write_json(folder / "spec.json", naive_spec(plan, settings, folder))
    command = [sys.executable, str(ROOT / "benchmarks" / "naive_sweep.py"), "spec.json"]
    began, makespan = run_process(command, folder, settings.timeout_s, str(job))
    trials = []
    for found in read_json(folder / "result.json"):
        rows = [
            _row(row, row["at"] - began) | {"eval_s": row["eval_seconds"]} for row in found["rows"]
        ]
        starts = [row["started_at"] - began for row in found["rows"]]
        trial = _trial(Candidate.from_dict(found["candidate"]), found["error"] or "finished", rows)
        trials.append(trial | {"started_s": min(starts, default=None)})
    startup = min(trial["started_s"] for trial in trials if trial["started_s"] is not None)
    evals = sum(trial["rows"][-1]["eval_s"] for trial in trials if trial["rows"])
    return _part(makespan, startup, settings.naive_concurrency, trials) | {"eval_seconds": evals}


def naive_spec(plan: Plan, settings: Settings, folder: Path) -> dict[str, Any]:
    """What naive_sweep.py reads: the plan's candidates, in the plan's order."""
    assert plan.data_spec is not None
    linears = plan.shape.resolve_target(plan.pruned.admitted[0].target)
    return {
        "candidates": [candidate.to_dict() for candidate in plan.pruned.admitted],
        "target_modules": sorted({linear.name.rpartition(".")[2] for linear in linears}),
        "model": str(BASE_MODEL),
        "train": plan.data_spec.data,
        "eval": plan.data_spec.eval,
        "seq_len": plan.data_spec.seq_len,
        "steps": settings.steps,
        "eval_steps": settings.eval_steps,
        "concurrency": settings.naive_concurrency,
        "cpus_per_trial": max(1, len(os.sched_getaffinity(0)) // settings.naive_concurrency),
        "out": str(folder / "out"),
        "storage": str(folder / "ray"),
        "result": str(folder / "result.json"),
    }


def _row(row: dict[str, Any], at_s: float) -> dict[str, Any]:
    kept = ("examples", "steps", "eval_loss", "seconds")
    return {key: row[key] for key in kept} | {"at_s": round(at_s, 3)}


def _trial(candidate: Candidate, status: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    name = trial_name(candidate)
    return {"name": name, "candidate": candidate.to_dict(), "status": status, "rows": rows}


def _part(
    makespan: float, startup: float, parallel: int, trials: list[dict[str, Any]]
) -> dict[str, Any]:
    """step_seconds: wall seconds of all workers within optimizer steps, evaluations not counted."""
    return {
        "makespan_s": round(makespan, 3),
        "startup_s": round(startup, 3),
        "parallel": parallel,
        "step_seconds": sum(trial["rows"][-1]["seconds"] for trial in trials if trial["rows"]),
        "trials": trials,
    }


class Watcher:
    """Notes when each metrics row of a run was written, by the files' own times."""

    def __init__(self, run: RunPaths) -> None:
        self.run = run
        self.seen: dict[tuple[str, int], float] = {}
        self.changed: dict[Path, int] = {}

    def look(self) -> str:
        """Looks once; returns how far the run is."""
        for path in self.run.trials.glob("*/metrics.jsonl"):
            stat = path.stat()
            if self.changed.get(path) != stat.st_mtime_ns:
                self.changed[path] = stat.st_mtime_ns
                for row in read_json_lines(path):
                    self.seen.setdefault((path.parent.name, row["examples"]), stat.st_mtime)
        return f"{len(list(self.run.trials.glob('*/status.json')))} trials ended"


def run_process(
    command: list[str], folder: Path, timeout_s: float, what: str, watcher: Watcher | None = None
) -> tuple[float, float]:
    """Runs a command to its end: (time.time() when it began, wall seconds).

    Raises:
        RuntimeError: it failed or ran too long; with the end of its log.
    """
    log = folder / "log.txt"
    with log.open("wb") as output:
        clock, began = time.perf_counter(), time.time()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(folder),
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _wait(process, clock, timeout_s, what, watcher)
        finally:
            seconds = time.perf_counter() - clock
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    if watcher:
        watcher.look()
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise RuntimeError(
            f"{what} ended with {process.returncode} after {seconds:.0f} s ({log}):\n{tail}"
        )
    return began, seconds


def _wait(process: Any, clock: float, timeout_s: float, what: str, watcher: Watcher | None) -> None:
    told = clock
    while process.poll() is None and time.perf_counter() - clock < timeout_s:
        progress = watcher.look() if watcher else "running"
        if time.perf_counter() - told > TELL_S:
            told = time.perf_counter()
            say(f"  {what}: {told - clock:.0f} s, {progress}")
        try:
            process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            continue


def _environment(folder: Path) -> dict[str, str]:
    """A user's environment, but for empty caches (every arm tokenizes; Tenfold measures its forwards)
    and no calls to the network."""
    return os.environ | {
        "TENFOLD_CACHE": str(folder / "cache"),
        "HF_DATASETS_CACHE": str(folder / "hf-datasets"),
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
