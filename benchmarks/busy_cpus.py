"""What training takes on CPUs that others want too, by how long the threads of a worker spin while they wait for each
other: as libgomp has it, and as a sweep sets it for its workers (GOMP_SPINCOUNT in orchestration/sweep.py).

    PYTHONPATH=. python benchmarks/busy_cpus.py

One trial of the shipped base alone, and two at once with as many threads as there are CPUs each. The two settings
alternate.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import (
    BASE_MODEL,
    FUNCTIONS,
    base_parser,
    machine_text,
    plain_candidate,
    results_of,
    rewrite_readme,
    say,
    spread,
    spread_text,
    table,
    write_result,
)
from orchestration.sweep import SETTINGS

VARIABLE = "GOMP_SPINCOUNT"
SPINS = {"libgomp's": None, "a sweep's": SETTINGS[VARIABLE]}
CANDIDATE = plain_candidate(1e-3, 16, 32.0, 16, ("attn", "mlp", "unembed"))
AT_ONCE = {"alone": 1, "two at once": 2}


def main() -> None:
    args = parse_args()
    if args.worker:
        print(seconds_here(args.examples))
        return
    if not args.readme:
        samples: dict[str, list[float]] = {}
        for repeat in range(args.repeats):
            for name, count in AT_ONCE.items():
                for spin, value in SPINS.items():
                    found = seconds(count, value, args.examples)
                    samples.setdefault(f"{name}, {spin}", []).extend(found)
                    say(f"{repeat + 1}/{args.repeats} {name}, {spin}: {spread_text(found, ' s')}")
        settings = {"repeats": args.repeats, "examples": args.examples, VARIABLE: SPINS}
        write_result(args.results / "busy_cpus.json", settings, {"seconds": samples})
    readme(args.results)


def parse_args() -> argparse.Namespace:
    parser = base_parser("training on busy CPUs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--examples", type=int, default=160, help="of a trial")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def seconds(count: int, spin: str | None, examples: int) -> list[float]:
    """What each of so many trials at once took to train."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {} if spin is None else {VARIABLE: spin}
    command = [sys.executable, __file__, "--worker", "--examples", str(examples)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    told = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"a trial of {VARIABLE}={spin} failed; what it said is above")
    return [float(line) for line in told]


def seconds_here(examples: int) -> float:
    """What a trial takes to train in this process, without loading."""
    from trainers.base_model import BaseSpec
    from trainers.data.spec import DataSpec
    from trainers.sft_trainer import TrialSpec, train_trial

    with tempfile.TemporaryDirectory() as folder:
        spec = TrialSpec(
            name="trial",
            folder=Path(folder),
            base=BaseSpec(model=str(BASE_MODEL), quantization="none", dtype="fp32"),
            data=DataSpec(data=str(FUNCTIONS), model=str(BASE_MODEL)),
            candidate=CANDIDATE,
            num_examples=examples,
            eval_every=examples,
            max_tokens=1024,
            num_threads=len(os.sched_getaffinity(0)),
        )
        return float(train_trial(spec, lambda row: True).rows[-1]["seconds"])


def readme(results: Path) -> None:
    """Fills the table of README.md."""
    lines = ["Not measured yet."]
    for _, result in results_of(results, "busy_cpus.json"):
        rows = []
        for name in AT_ONCE:
            texts, medians = [], []
            for spin in SPINS:
                found = result["seconds"][f"{name}, {spin}"]
                texts.append(spread_text(found, " s", 1))
                medians.append(spread(found)["median"])
            rows.append([name, *texts, f"{medians[0] / medians[1]:.2f}x"])
        lines = [machine_text(result), "", *table(["trials", *SPINS, "ratio"], rows)]
    rewrite_readme("busy", lines)


if __name__ == "__main__":
    main()
