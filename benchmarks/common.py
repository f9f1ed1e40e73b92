"""What the benchmark scripts share: the machine, medians with their spread, verdicts, results on disk."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from search_spaces.candidate import Candidate
from trainers.paths import read_json, write_json, write_text
from trainers.speed import cpu_name

ROOT = Path(__file__).resolve().parent.parent
BASE_MODEL = ROOT / "trainers" / "assets" / "tiny-llama"
FUNCTIONS = ROOT / "trainers" / "assets" / "demo" / "functions.jsonl"
SHARED = ROOT.parent / "shared"
README = ROOT / "benchmarks" / "README.md"
PACKAGES = ("tenfold", "ray", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets")
BEGAN = time.perf_counter()


def say(text: str) -> None:
    """A line of progress with the seconds since the script began."""
    print(f"[{time.perf_counter() - BEGAN:7.1f} s] {text}", flush=True)


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores that this process may use, memory, load now."""
    return {
        "cpu": cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Installed versions of what decides the numbers."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def tenfold_command() -> list[str]:
    """The `tenfold` of this environment."""
    return [str(Path(sys.executable).with_name("tenfold"))]


def stamp() -> str:
    """Now, to the second, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of repeats."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread_text(values: Sequence[float], unit: str = "", digits: int = 2) -> str:
    """ "1.23 s (1.10..1.40)": the median and the range; the range alone is left out for one value."""
    parts = spread(values)
    text = f"{parts['median']:.{digits}f}{unit}"
    return (
        text
        if len(values) == 1
        else f"{text} ({parts['min']:.{digits}f}..{parts['max']:.{digits}f})"
    )


def verdict(name: str, passed: bool | None, numbers: str) -> dict[str, Any]:
    """An acceptance line; passed None: nothing was measured that could decide it."""
    return {"criterion": name, "passed": passed, "numbers": numbers}


def print_verdicts(verdicts: Sequence[dict[str, Any]]) -> None:
    """One line for each criterion."""
    words = {True: "PASS", False: "FAIL", None: "not measured"}
    for each in verdicts:
        print(f"{words[each['passed']]:>12}  {each['criterion']}: {each['numbers']}", flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, padded so that it reads in a terminal too."""
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in [head, *rows]
    ]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def write_result(path: Path, settings: dict[str, Any], values: dict[str, Any]) -> None:
    """Keeps a benchmark's numbers with the machine, the versions and the settings."""
    write_json(
        path,
        {
            "written_at": stamp(),
            "machine": machine(),
            "versions": versions(),
            "settings": settings,
            **finite(values),
        },
    )
    say(f"wrote {path}")


def finite(value: Any) -> Any:
    """A value whose NaN and infinities are text: JSON has neither."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value


def rewrite_readme(marker: str, lines: Sequence[str]) -> None:
    """Puts lines between `<!-- marker -->` and `<!-- end marker -->` of benchmarks/README.md.

    Raises:
        ValueError: the README has no such markers.
    """
    text = README.read_text(encoding="utf-8")
    begin, end = f"<!-- {marker} -->", f"<!-- end {marker} -->"
    if begin not in text or end not in text:
        raise ValueError(f"{README} must hold {begin} and {end}, it does not")
    before, rest = text.split(begin)
    write_text(README, "\n".join([f"{before}{begin}", *lines, f"{end}{rest.split(end)[1]}"]))
    say(f"rewrote {marker} in {README}")


def plain_candidate(
    learning_rate: float,
    lora_rank: int,
    lora_alpha: float,
    global_batch_size: int,
    target: tuple[str, ...],
) -> Candidate:
    """One with a constant rate and nothing that a benchmark does not vary."""
    return Candidate(
        learning_rate=learning_rate,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        global_batch_size=global_batch_size,
        target=target,
        lr_schedule="constant",
        warmup=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        dropout=0.0,
        seed=0,
    )


def results_of(folder: Path, pattern: str) -> list[tuple[str, dict[str, Any]]]:
    """Result files by name, the oldest name first."""
    return [(path.stem, read_json(path)) for path in sorted(folder.glob(pattern))]


def machine_text(result: dict[str, Any]) -> str:
    """One line: where and with what a result was measured."""
    where, what = result["machine"], result["versions"]
    device = result["settings"].get("device_name") or f"{where['num_cpus']} cores of {where['cpu']}"
    packages = ", ".join(f"{name} {what[name]}" for name in ("ray", "torch", "peft", "trl"))
    return f"{device}; {packages}; {result['written_at'][:10]}"


def base_parser(description: str) -> argparse.ArgumentParser:
    """A parser with what every script has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "benchmarks", help="part files and runs"
    )
    parser.add_argument(
        "--readme", action="store_true", help="only rewrite the tables of README.md"
    )
    return parser


def read_part(path: Path) -> dict[str, Any] | None:
    """A part that was measured before; None: it must be measured."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
