"""A campaign of the fuzz tests with new cases: configs and data files, of odd values and damaged.

    PYTHONPATH=. python benchmarks/fuzz.py --cases 2500 --seed 1

Counts, for each target, how its cases ended: exit 0; exit 2 with one clear line for each problem; where a sweep
or study would have started Ray; and the rest, of which there must be none. Keeps the counts in
results/fuzz.json, prints what was wrong with every case of the rest, and exits 1 if there is one.
"""

import importlib.metadata
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from benchmarks.common import (
    base_parser,
    machine_text,
    results_of,
    rewrite_readme,
    say,
    table,
    write_result,
)
from tests.data import data_cases
from tests.fuzzing import Ending, fuzz_folder
from tests.orchestration import config_cases

ENDS = {0: "exit_0", 2: "exit_2", None: "would_start"}
MAX_FAULTS = 50
"""Kept of a target; all are counted."""


@dataclass(frozen=True)
class Target:
    """A kind of cases: how they are drawn, and what their folder must hold."""

    cases: Callable[[], SearchStrategy[Any]]
    fill: Callable[[Path], None]


TARGETS = {
    "config, any values": Target(config_cases.structured, config_cases.fill),
    "config, damaged": Target(config_cases.mutated, config_cases.fill),
    "data, any values": Target(data_cases.structured, data_cases.fill),
    "data, damaged": Target(data_cases.mutated, data_cases.fill),
    "data, parquet": Target(data_cases.parquet, data_cases.fill),
}


def campaign(name: str, num_cases: int, number: int) -> dict[str, Any]:
    """Tries so many cases of a target, and counts their ends.

    Args:
        number: of the random sequence.
    """
    target = TARGETS[name]
    ends: Counter[str] = Counter()
    faults: list[dict[str, str]] = []
    how = settings(
        deadline=None,
        database=None,
        max_examples=num_cases,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as parent, fuzz_folder(Path(parent)) as folder:
        target.fill(folder)

        @seed(number)
        @how
        @given(target.cases())
        def tried(case: Any) -> None:
            ending: Ending = case.run(folder)
            ends["other" if ending.fault else ENDS[ending.code]] += 1
            if ending.fault and len(faults) < MAX_FAULTS:
                faults.append({"fault": ending.fault, "case": repr(case)})

        tried()
    counts = {name: ends[name] for name in (*ENDS.values(), "other")}
    seconds = time.perf_counter() - began
    return {"cases": ends.total(), **counts, "seconds": round(seconds, 1), "faults": faults}


def readme_lines(folder: Path) -> list[str]:
    """The table of the last campaign."""
    lines: list[str] = []
    for name, result in results_of(folder, "fuzz*.json"):
        settings_ = result["settings"]
        lines += [f"**{name}** ({machine_text(result)}; seed {settings_['seed']})", ""]
        head = ["target", "cases", "exit 0", "exit 2", "would start", "other"]
        keys = ("cases", "exit_0", "exit_2", "would_start", "other")
        rows = [
            [target, *(f"{found[key]:,}" for key in keys)]
            for target, found in result["targets"].items()
        ]
        rows.append(["all", *(f"{result['total'][key]:,}" for key in keys)])
        lines += [*table(head, rows), ""]
    return lines


def main() -> int:
    parser = base_parser(__doc__ or "")
    parser.add_argument("--cases", type=int, default=2500, help="of each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="targets at once")
    args = parser.parse_args()
    if args.readme:
        rewrite_readme("fuzz", readme_lines(args.results))
        return 0
    found: dict[str, dict[str, Any]] = {}
    # A process for each target: each has a current folder of its own.
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as processes:
        numbers = ([args.cases] * len(TARGETS), [args.seed] * len(TARGETS))
        results = processes.map(campaign, TARGETS, *numbers)
        for name, result in zip(TARGETS, results, strict=True):
            found[name] = result
            say(f"{name}: { ({key: value for key, value in result.items() if key != 'faults'}) }")
            for item in result["faults"]:
                print(f"{item['fault']}\n    {item['case']}")
    summed = ("cases", *ENDS.values(), "other", "seconds")
    total = {key: round(sum(each[key] for each in found.values()), 1) for key in summed}
    asked = {
        "cases": args.cases,
        "seed": args.seed,
        "hypothesis": importlib.metadata.version("hypothesis"),
    }
    write_result(args.results / "fuzz.json", asked, {"total": total, "targets": found})
    return 1 if total["other"] else 0


if __name__ == "__main__":
    sys.exit(main())
