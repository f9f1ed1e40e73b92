"""Whether a long sweep grows: memory of the driver and of the workers against finished trials.

    python benchmarks/memory_200.py                # 200 candidates of 4 steps
    python benchmarks/memory_200.py --candidates 40

Starts `tenfold sweep` as a user does and reads /proc while it runs. The slope is that of a straight
line through the samples after the first fifth of the trials: before it, pools and caches fill.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.arms import TARGET, Dataset, run_process, write_rows
from benchmarks.common import (
    BASE_MODEL,
    FUNCTIONS,
    base_parser,
    machine_text,
    print_verdicts,
    results_of,
    rewrite_readme,
    say,
    table,
    tenfold_command,
    verdict,
    write_result,
)
from cluster.memory import adapter_bytes
from search_spaces.architecture import ModelShape
from trainers.paths import RunPaths, read_json_lines, write_json_lines, write_text

SEQ_LEN, NUM_TRAIN, NUM_EVAL, BATCH = 64, 48, 8, 16
LORA_RANKS = [4, 8]
SETTLED_FRAC = 0.2
RUN = "sweep"
ROLES = (
    ("ray::_RayTrain", "worker"),
    ("ray::RayTrain", "worker"),
    ("ray::TrainController", "train controller"),
    ("ray::Broker", "broker"),
    ("ray::ThinTrial", "thin trials"),
    ("ray::ResourceTrainable", "thin trials"),
    ("ray::", "other ray processes"),
)
"""What a process is by the start of its title; the first that fits."""


class MemoryWatcher:
    """Samples anonymous memory (resident, not shared) of every process of the sweep."""

    def __init__(self, run: RunPaths, sample_s: float) -> None:
        self.run, self.sample_s = run, sample_s
        self.samples: list[dict[str, Any]] = []
        self.sampled_at = 0.0
        self.root = psutil.Process()

    def look(self) -> str:
        """Samples if it is time; returns how far the run is."""
        ended = len(list(self.run.trials.glob("*/status.json")))
        if self.run.trials.is_dir() and time.monotonic() - self.sampled_at > self.sample_s:
            self.sampled_at = time.monotonic()
            self.samples.append({"ended": ended, "bytes": self._bytes()})
        return f"{ended} trials ended"

    def _bytes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for process in self.root.children(recursive=True):
            try:
                memory, role = process.memory_info(), role_of(process)
            except psutil.Error:
                continue  # it ended while we looked
            found[role] = found.get(role, 0) + memory.rss - memory.shared
        return found


def role_of(process: psutil.Process) -> str:
    """driver, worker PID (each alone), thin trials (together), ...; by its title."""
    command = process.cmdline()
    title = command[0] if command else ""
    for start, role in ROLES:
        if title.startswith(start):
            return f"worker {process.pid}" if role == "worker" else role
    return "driver" if "sweep" in command and "tenfold" in " ".join(command[:2]) else "ray services"


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of y over x; 0 where x does not change."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if len(set(xs)) < 2:
        return 0.0
    return statistics.linear_regression(xs, ys).slope


def summarise(samples: list[dict[str, Any]], num_trials: int) -> dict[str, dict[str, float]]:
    """By role: bytes after the first fifth, at the end, largest, and bytes for each finished trial."""
    settled = [each for each in samples if each["ended"] >= SETTLED_FRAC * num_trials]
    roles = {role for each in settled for role in each["bytes"]}
    summary = {}
    for role in sorted(roles):
        points = [(s["ended"], s["bytes"][role]) for s in settled if role in s["bytes"]]
        summary[role] = {
            "first_bytes": points[0][1],
            "last_bytes": points[-1][1],
            "max_bytes": max(value for _, value in points),
            "slope_bytes_per_trial": slope(points),
        }
    return summary


def sweep_yaml(args: argparse.Namespace, rows: Path) -> dict[str, Any]:
    """A grid of tiny trials."""
    return {
        "model": str(BASE_MODEL),
        "data": str(rows / "train.jsonl"),
        "eval": str(rows / "eval.jsonl"),
        "seq_len": SEQ_LEN,
        "examples": args.steps * BATCH,
        "eval_every": max(1, args.steps // 2) * BATCH,
        "global_batch_size": BATCH,
        "target": TARGET,
        "lora_rank": LORA_RANKS,
        "learning_rate": {"low": 1e-4, "high": 1e-2, "num": -(-args.candidates // len(LORA_RANKS))},
        "num_candidates": args.candidates,
        "scheduler": "fifo",
        "engine": "packed",
        "dtype": "fp32",
    }


def measure(args: argparse.Namespace, folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """Runs the sweep: wall seconds and samples."""
    write_rows(Dataset(FUNCTIONS, SEQ_LEN), folder / "rows")
    for side, count in (("train", NUM_TRAIN), ("eval", NUM_EVAL)):
        path = folder / "rows" / f"{side}.jsonl"
        write_json_lines(path, read_json_lines(path)[:count])
    write_text(folder / "sweep.yaml", yaml.safe_dump(sweep_yaml(args, folder / "rows")))
    watcher = MemoryWatcher(RunPaths(folder / "runs" / RUN), args.sample_s)
    command = [*tenfold_command(), "sweep", "sweep.yaml", "--name", RUN]
    _, seconds = run_process(command, folder, args.timeout_s, "sweep", watcher)
    return seconds, watcher.samples


def memory_lines(summary: dict[str, dict[str, float]]) -> list[str]:
    """A row for each process."""
    head = ["process", "after a fifth of the trials", "at the end", "slope per finished trial"]
    rows = [
        [
            role,
            f"{each['first_bytes'] / 1e6:,.1f} MB",
            f"{each['last_bytes'] / 1e6:,.1f} MB",
            f"{each['slope_bytes_per_trial'] / 1e3:+,.1f} kB",
        ]
        for role, each in summary.items()
    ]
    return table(head, rows)


def verdicts(
    summary: dict[str, dict[str, float]], num_trials: int, ended: int
) -> list[dict[str, Any]]:
    """A tenth of an adapter for each trial is the most that counts as no growth."""
    shape = ModelShape.from_config(BASE_MODEL / "config.json")
    adapter = adapter_bytes(shape, TARGET, min(LORA_RANKS))
    lines = [verdict("all trials ended", ended == num_trials, f"{ended} of {num_trials}")]
    for kind in ("driver", "worker"):
        slopes = [
            each["slope_bytes_per_trial"] for role, each in summary.items() if role.startswith(kind)
        ]
        numbers = (
            f"{max(slopes) / 1e3:+.1f} kB; a lost adapter would be {adapter / 1e3:.0f} kB"
            if slopes
            else "-"
        )
        name = f"the {kind} grows by less than a tenth of an adapter for each finished trial"
        lines.append(verdict(name, max(slopes) < adapter / 10 if slopes else None, numbers))
    return lines


def main() -> None:
    parser = base_parser(__doc__ or "")
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a trial")
    parser.add_argument("--sample-s", type=float, default=1.0)
    parser.add_argument("--timeout-s", type=float, default=3 * 3600)
    args = parser.parse_args()
    if args.readme:
        rewrite_readme("memory", readme_lines(args.results))
        return
    folder = args.work / "memory" / time.strftime("%Y%m%d-%H%M%S")
    seconds, samples = measure(args, folder)
    summary = summarise(samples, args.candidates)
    say(f"{args.candidates} trials in {seconds:.0f} s")
    print("\n".join(memory_lines(summary)))
    lines = verdicts(summary, args.candidates, samples[-1]["ended"] if samples else 0)
    print_verdicts(lines)
    write_result(
        args.results / f"memory-{args.candidates}.json",
        {"candidates": args.candidates, "steps": args.steps, "lora_rank": LORA_RANKS},
        {"seconds": seconds, "summary": summary, "verdicts": lines, "samples": samples},
    )


def readme_lines(results: Path) -> list[str]:
    """The README's table."""
    lines: list[str] = []
    for name, result in results_of(results, "memory-*.json"):
        head = f"**{name}** ({machine_text(result)}): {result['seconds']:.0f} s"
        lines += [head, "", *memory_lines(result["summary"]), ""]
    return lines or ["Not measured yet."]


if __name__ == "__main__":
    main()
