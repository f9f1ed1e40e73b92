"""How long a whole sweep takes: Tenfold's packed engine against the pattern of Ray's docs with TRL and PEFT.

    python benchmarks/sweep_makespan.py                                # 16 candidates x 30 steps, 4 arms
    python benchmarks/sweep_makespan.py --steps 300 --candidates 4
    python benchmarks/sweep_makespan.py --asha --dataset functions gsm8k alpaca --seeds 3
    python benchmarks/sweep_makespan.py --check-naive                  # does the naive arm learn the same?

Arms: `naive` (naive_sweep.py), `solo`, `warm` (packed engine, one adapter a group), `packed`. Every arm
is a cold process with the same candidates, rows, steps and evaluations. What was measured is kept as one
part file for each (arm, dataset, seed, repeat): the same command again goes on where it stopped.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.arms import (
    DATASETS,
    Job,
    Settings,
    naive_spec,
    run_job,
    sweep_yaml,
    write_rows,
)
from benchmarks.asha_curves import asha_readme, summarise_asha
from benchmarks.common import (
    BASE_MODEL,
    ROOT,
    base_parser,
    finite,
    machine_text,
    print_verdicts,
    read_part,
    results_of,
    rewrite_readme,
    say,
    spread,
    spread_text,
    table,
    verdict,
    write_result,
)
from trainers.paths import read_json, write_json

ARMS = ("naive", "solo", "warm", "packed")
RATIOS = (("naive", "packed"), ("naive", "warm"), ("warm", "packed"), ("solo", "packed"))
MIN_RATIO, MAX_OVERHEAD_S, SAME_LOSS, NEAR_LOSS = 6.0, 1.5, 1e-3, 0.01


def main() -> None:
    args = parse_args()
    if args.readme:
        readme(args.results)
        return
    settings = Settings(
        steps=args.steps,
        candidates=args.candidates,
        evaluations=args.evaluations,
        batch=args.batch,
        naive_concurrency=args.naive_concurrency,
        timeout_s=args.timeout_s,
    )
    work = args.work / "makespan"
    datasets = present_datasets(args.dataset, work)
    if args.check_naive:
        check_naive(settings, datasets[0], work, args.check_candidate, args.seeds)
        return
    arms = args.arms or (["naive", "packed-asha"] if args.asha else list(ARMS))
    jobs = make_jobs(arms, datasets, args.seeds, args.repeats)
    parts = measure(jobs, settings, work)
    kind = "asha" if args.asha else "makespan"
    summary = summarise_asha(parts) if args.asha else summarise(parts)
    print("\n".join(summary.pop("lines")))
    print_verdicts(summary["verdicts"])
    path = args.results / f"{kind}-{settings.steps}x{settings.candidates}.json"
    write_result(path, vars(settings) | {"arms": arms}, summary | {"parts": parts})


def parse_args() -> argparse.Namespace:
    parser = base_parser(__doc__ or "")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a trial")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--evaluations", type=int, default=3, help="of a trial, evenly spaced")
    parser.add_argument("--batch", type=int, default=16, help="global batch")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0, 1, ...")
    parser.add_argument("--dataset", nargs="+", choices=list(DATASETS), default=["functions"])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, "packed-asha"])
    parser.add_argument("--asha", action="store_true", help="packed ASHA against the naive grid")
    parser.add_argument("--naive-concurrency", type=int, default=2, help="naive trials at once")
    parser.add_argument("--timeout-s", type=float, default=4 * 3600, help="of one run of one arm")
    parser.add_argument("--check-naive", action="store_true", help="one candidate, both ways")
    parser.add_argument("--check-candidate", type=int, default=6, help="number of that candidate")
    args = parser.parse_args()
    if args.steps % args.evaluations:
        parser.error(f"--steps must be a multiple of --evaluations, got {args.steps}")
    return args


def present_datasets(names: list[str], work: Path) -> list[str]:
    """Writes the rows of the data sets that are on this machine."""
    present = [name for name in names if DATASETS[name].path.exists()]
    for name in names:
        if name not in present:
            say(f"skipped {name}: {DATASETS[name].path} is not there")
    for name in present:
        rows = write_rows(DATASETS[name], work / "rows" / name)
        say(f"{name}: {rows['train']} rows to train, {rows['eval']} held out")
    if not present:
        raise SystemExit("no data set is there")
    return present


def make_jobs(arms: list[str], datasets: list[str], seeds: int, repeats: int) -> list[Job]:
    """All runs; every second repeat takes the arms in reverse, so that a drift hits all alike."""
    return [
        Job(arm=arm, dataset=dataset, seed=seed, repeat=repeat)
        for repeat in range(repeats)
        for dataset in datasets
        for seed in range(seeds)
        for arm in (arms if (repeat + seed) % 2 == 0 else arms[::-1])
    ]


def measure(jobs: list[Job], settings: Settings, work: Path) -> list[dict[str, Any]]:
    """The parts of all jobs, those that were measured before from disk."""
    parts = []
    for number, job in enumerate(jobs, start=1):
        name = job.name(settings)
        path = work / "parts" / f"{name}.json"
        part = read_part(path)
        if part is None:
            say(f"{number}/{len(jobs)} {name}: starting")
            part = finite(run_job(job, settings, work))
            write_json(path, part)
        say(f"{number}/{len(jobs)} {name}: {part['makespan_s']:.1f} s, {best_text(part)}")
        parts.append(part)
    return parts


def best_trial(part: dict[str, Any]) -> dict[str, Any]:
    """The trial with the lowest finite eval_loss, with that loss as "best_loss"."""
    scored = [
        trial | {"best_loss": min(losses)}
        for trial in part["trials"]
        if (losses := finite_losses(trial))
    ]
    return min(scored, key=lambda trial: trial["best_loss"])


def finite_losses(trial: dict[str, Any]) -> list[float]:
    """Losses of a trial's evaluations after training began."""
    losses = [row["eval_loss"] for row in trial["rows"] if row["steps"] > 0]
    return [loss for loss in losses if isinstance(loss, float) and math.isfinite(loss)]


def best_text(part: dict[str, Any]) -> str:
    best = best_trial(part)
    return f"best eval_loss {best['best_loss']:.4f} by {best['name']}"


def costs(part: dict[str, Any]) -> dict[str, float]:
    """Seconds of a run by kind.

    step_s: a trial's share of the wall time spent in optimizer steps. overhead_s: what a trial costs
    beside them, evaluations included. marginal_s: the same without the start-up of the sweep.
    """
    num, makespan = len(part["trials"]), part["makespan_s"]
    steps = part["step_seconds"] / part["parallel"]
    return {
        "makespan_s": makespan,
        "trials_per_hour": 3600 * num / makespan,
        "startup_s": part["startup_s"],
        "step_s": steps / num,
        "overhead_s": (makespan - steps) / num,
        "marginal_s": (makespan - part["startup_s"] - steps) / num,
    }


def summarise(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Tables and verdicts of the full grids."""
    arms = {arm: [p for p in parts if p["arm"] == arm] for arm in ARMS}
    arms = {arm: found for arm, found in arms.items() if found}
    by_arm = {arm: [costs(part) for part in found] for arm, found in arms.items()}
    ratios = {
        f"{slow}/{fast}": [
            a["makespan_s"] / b["makespan_s"]
            for a, b in zip(arms[slow], _same_runs(arms[fast], arms[slow]), strict=True)
        ]
        for slow, fast in RATIOS
        if slow in arms and fast in arms
    }
    verdicts = _verdicts(by_arm, ratios, arms)
    return {
        "costs": {arm: _spreads(values) for arm, values in by_arm.items()},
        "ratios": {name: spread(values) | {"all": values} for name, values in ratios.items()},
        "best": {arm: [_best_record(part) for part in found] for arm, found in arms.items()},
        "verdicts": verdicts,
        "lines": [*cost_lines(by_arm, arms), "", *ratio_lines(ratios), "", *loss_lines(arms), ""],
    }


def _same_runs(parts: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts in the order of others: same data set, seed and repeat."""
    found = {_key(part): part for part in parts}
    return [found[_key(part)] for part in wanted]


def _key(part: dict[str, Any]) -> tuple[Any, ...]:
    return part["dataset"], part["seed"], part["repeat"]


def _spreads(values: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: spread([value[name] for value in values]) for name in values[0]}


def _best_record(part: dict[str, Any]) -> dict[str, Any]:
    best = best_trial(part)
    return dict(zip(("dataset", "seed", "repeat"), _key(part), strict=True)) | {
        "name": best["name"],
        "eval_loss": best["best_loss"],
    }


def _verdicts(
    by_arm: dict[str, list[dict[str, float]]],
    ratios: dict[str, list[float]],
    arms: dict[str, list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    verdicts = []
    if found := ratios.get("naive/packed"):
        passed = spread(found)["median"] >= MIN_RATIO
        name = f"packed makespan at least {MIN_RATIO:g}x shorter than naive"
        verdicts.append(verdict(name, passed, spread_text(found, "x")))
    if "packed" in by_arm:
        costs_s = [value["overhead_s"] for value in by_arm["packed"]]
        marginal = [value["marginal_s"] for value in by_arm["packed"]]
        verdicts.append(
            verdict(
                f"a packed trial costs at most {MAX_OVERHEAD_S:g} s beside its own steps",
                spread(costs_s)["median"] <= MAX_OVERHEAD_S,
                f"{spread_text(costs_s, ' s')}; without the sweep's start-up {spread_text(marginal, ' s')}",
            )
        )
    if "packed" in arms and "solo" in arms:
        verdicts.append(same_best(arms["packed"], _same_runs(arms["solo"], arms["packed"])))
    return verdicts


def same_best(packed: list[dict[str, Any]], solo: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether both engines choose the same candidate, with the same loss."""
    pairs = [(best_trial(a), best_trial(b)) for a, b in zip(packed, solo, strict=True)]
    gaps = [abs(a["best_loss"] - b["best_loss"]) for a, b in pairs]
    passed = all(a["name"] == b["name"] for a, b in pairs) and max(gaps) <= SAME_LOSS
    names = sorted({each["name"] for pair in pairs for each in pair})
    return verdict(
        f"packed and solo choose the same best candidate, eval_loss within {SAME_LOSS:g}",
        passed,
        f"{', '.join(names)}; largest difference {max(gaps):.2e}",
    )


def cost_lines(
    by_arm: dict[str, list[dict[str, float]]], arms: dict[str, list[dict[str, Any]]]
) -> list[str]:
    """The arms side by side."""
    head = [
        "arm",
        "makespan",
        "trials/hour",
        "start-up",
        "steps/trial",
        "beside steps/trial",
        "same without start-up",
        "best eval_loss",
    ]
    rows = []
    for arm, values in by_arm.items():
        cells = [
            spread_text([value[name] for value in values], " s", 1)
            for name in ("makespan_s", "startup_s", "step_s", "overhead_s", "marginal_s")
        ]
        rate = spread_text([value["trials_per_hour"] for value in values], "", 0)
        losses = spread_text([best_trial(part)["best_loss"] for part in arms[arm]], "", 4)
        rows.append([arm, cells[0], rate, *cells[1:], losses])
    return table(head, rows)


def ratio_lines(ratios: dict[str, list[float]]) -> list[str]:
    """How many times shorter, repeat by repeat."""
    return [f"makespan {name}: {spread_text(values, 'x')}" for name, values in ratios.items()]


def loss_lines(arms: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Last eval_loss of every candidate in the first run of each arm."""
    first = {arm: found[0]["trials"] for arm, found in arms.items()}
    names = [trial["name"] for trial in next(iter(first.values()))]
    rows = []
    for at, name in enumerate(names):
        cells = [_last_loss(trials[at]) for trials in first.values()]
        rows.append([name, *cells])
    return table(["last eval_loss of", *first], rows)


def _last_loss(trial: dict[str, Any]) -> str:
    losses = finite_losses(trial)
    text = f"{losses[-1]:.4f}" if losses else "-"
    return text if trial["status"] == "finished" else f"{text} ({trial['status'][:20]})"


def check_naive(settings: Settings, dataset: str, work: Path, number: int, seeds: int) -> None:
    """Trains one candidate with naive_sweep.py and with Tenfold, both without Ray, and compares losses.

    Rows and their masks are the same, so the base's loss must be; the order of the rows and the
    adapter's start differ, so what is learnt must only be near: seeds tell how near.
    """
    pairs = []
    for seed in range(seeds):
        theirs, ours = _both_ways(settings, dataset, work / "check", work / "rows", number, seed)
        pairs.append((theirs, ours))
        rows = [
            [str(a["steps"]), f"{a['eval_loss']:.5f}", f"{b['eval_loss']:.5f}"]
            for a, b in zip(theirs, ours, strict=True)
        ]
        print(
            "\n".join(table(["step", f"naive eval_loss, seed {seed}", "Tenfold"], rows)), flush=True
        )
    gaps = [abs(a[0]["eval_loss"] - b[0]["eval_loss"]) for a, b in pairs]
    last = [[each[-1]["eval_loss"] for each in side] for side in zip(*pairs, strict=True)]
    apart = abs(spread(last[0])["median"] / spread(last[1])["median"] - 1)
    print_verdicts(
        [
            verdict(
                "same held-out tokens: loss of the base", max(gaps) < 1e-3, f"{max(gaps):.1e} apart"
            ),
            verdict(
                f"the same learning: last eval_loss within {NEAR_LOSS:.0%} (medians over seeds)",
                apart <= NEAR_LOSS,
                f"naive {spread_text(last[0], '', 4)}, Tenfold {spread_text(last[1], '', 4)}",
            ),
        ]
    )


def _both_ways(
    settings: Settings, dataset: str, folder: Path, rows: Path, number: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Metrics rows of a candidate: the naive arm's and Tenfold's."""
    from orchestration.config import make_config
    from orchestration.planning import make_plan
    from trainers.base_model import BaseSpec
    from trainers.sft_trainer import TrialSpec, train_trial

    shutil.rmtree(folder, ignore_errors=True)
    job = Job(arm="naive", dataset=dataset, seed=seed, repeat=0)
    plan = make_plan(make_config(sweep_yaml(job, settings, rows / dataset), "check"))
    assert plan.data_spec is not None
    number = min(number, len(plan.pruned.admitted) - 1)
    write_json(folder / "spec.json", naive_spec(plan, settings, folder) | {"eval_on_start": True})
    script = str(ROOT / "benchmarks" / "naive_sweep.py")
    command = [sys.executable, script, str(folder / "spec.json"), "--trial", str(number)]
    with (folder / "log.txt").open("wb") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    spec = TrialSpec(
        name="check",
        folder=folder / "ours",
        base=BaseSpec(model=str(BASE_MODEL), quantization="nf4", dtype="fp32"),
        data=plan.data_spec,
        candidate=plan.pruned.admitted[number],
        num_examples=settings.steps * settings.batch,
        eval_every=settings.eval_steps * settings.batch,
        num_threads=len(os.sched_getaffinity(0)),
    )
    ours = train_trial(spec, lambda row: True).rows
    return read_json(folder / "result.json")[0]["rows"], list(ours)


def readme(results: Path) -> None:
    """Fills both tables of README.md."""
    lines: list[str] = []
    for name, result in results_of(results, "makespan-*.json"):
        parts = result["parts"]
        arms = {arm: [p for p in parts if p["arm"] == arm] for arm in result["costs"]}
        by_arm = {arm: [costs(part) for part in found] for arm, found in arms.items()}
        ratios = {key: value["all"] for key, value in result["ratios"].items()}
        lines += [f"**{name}** ({machine_text(result)})", "", *cost_lines(by_arm, arms), ""]
        lines += [f"- {line}" for line in ratio_lines(ratios)] + [""]
    rewrite_readme("makespan", lines or ["Not measured yet."])
    rewrite_readme("asha", asha_readme(results))


if __name__ == "__main__":
    main()
