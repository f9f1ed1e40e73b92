"""`tenfold status`: how far a run is, read from its folder alone, whether somebody drives it or not. Imports neither
torch nor ray."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestration.choosing import is_of_limit
from orchestration.clones import clone_records
from orchestration.commands import unanswered
from orchestration.durations import duration
from orchestration.objective import (
    Objective,
    objective_named,
    objective_of,
    objective_of_plan,
    objective_of_rows,
)
from orchestration.results import USABLE
from orchestration.run_folder import driver_of, run_at
from orchestration.saved import saved_sweep, study_command_of
from orchestration.show import text_table
from trainers.credentials import masked
from trainers.integrity import DamagedError, sound_rows
from trainers.metrics import Judge
from trainers.mirror import mirror_of
from trainers.paths import RunPaths, TrialPaths, read_state
from trainers.terminal import printable

ENDED = ("finished", "stopped", "diverged", "failed")
OPEN_ORDER = ("running", "interrupted", "waiting", "damaged")
"""How a trial without an end stands, in the order in which they are told."""


def status_of(place: str) -> dict[str, Any]:
    """Everything that `tenfold status` says, as JSON.

    Args:
        place: folder or URL of a sweep or study.

    Raises:
        ValueError: it is none.
    """
    run = run_at(place)
    driver = driver_of(run)
    found: dict[str, Any] = {"name": run.root.name, "place": place}
    found["driver"] = vars(driver) if driver else None
    if (command := study_command_of(run)) is not None:
        return found | _study(run, command, is_driven=driver is not None)
    if driver is not None and not run.plan.is_file():
        return found | {"kind": "sweep", "state": "starting", "trials": [], "counts": {}}
    return found | _sweep(run, place, is_driven=driver is not None)


def _sweep(run: RunPaths, place: str, *, is_driven: bool) -> dict[str, Any]:
    saved, clones = saved_sweep(run, place), clone_records(run)
    score = objective_of_plan(saved.plan)
    trials = [_trial(run.trial(name), score, is_driven) for name in saved.trials]
    for trial in trials:
        if trial["name"] in clones:
            trial["clone_of"] = clones[trial["name"]]["of"]
    expected = len(saved.planned) + saved.plan["num_proposed"] + len(clones)
    if sum(t["best"] is not None and t["status"] in USABLE for t in trials) > 1:
        expected += 2 * saved.plan.get("choice", {}).get("confirm", 0)
    is_whole = len(trials) >= expected or any(is_of_limit(trial["reason"]) for trial in trials)
    commands = [command for _, command in unanswered(run) if command]
    has_ended = all(trial["status"] in ENDED for trial in trials) and is_whole
    return {
        "kind": "sweep",
        "state": _state(is_driven, has_ended and not commands),
        "goes_on_by": None
        if is_driven or (has_ended and not commands)
        else f"tenfold resume {place}",
        "objective": score.key,
        "num_trials": max(expected, len(trials)),
        "num_discarded": len(saved.plan["discarded"]),
        "discarded": dict(Counter(item["reason"] for item in saved.plan["discarded"])),
        "commands": [vars(command) for command in commands],
    } | _of_trials(run, trials, score)


def _study(run: RunPaths, command: str, *, is_driven: bool) -> dict[str, Any]:
    folders = [paths for root in (run.root, *_parts(run.root)) for paths in _trials_in(root)]
    rows = [sound_rows(paths.metrics)[0] for paths in folders]
    score = next((objective_of_rows(some) for some in rows if some), objective_of("sft"))
    trials = [_trial(paths, score, is_driven) for paths in folders]
    has_ended = run.results.is_file() and all(trial["status"] in ENDED for trial in trials)
    return {
        "kind": "study",
        "state": _state(is_driven, has_ended),
        "goes_on_by": None if is_driven or has_ended else command,
        "objective": score.key,
        "num_trials": len(trials),
        "num_discarded": 0,
        "discarded": {},
        "commands": [],
    } | _of_trials(run, trials, score)


def _parts(root: Path) -> list[Path]:
    """Runs within a study's (capacity has one for each set of facts)."""
    return sorted(path.parent for path in root.glob("*/trials") if path.is_dir())


def _trials_in(root: Path) -> Iterator[TrialPaths]:
    yield from (TrialPaths(path.parent) for path in sorted(root.glob("trials/*/config.json")))


def _state(is_driven: bool, has_ended: bool) -> str:
    if is_driven:
        return "running"
    return "ended" if has_ended else "interrupted"


def _of_trials(run: RunPaths, trials: list[dict[str, Any]], score: Objective) -> dict[str, Any]:
    counts = Counter(trial["status"] for trial in trials)
    usable = [
        t for t in trials if t["best"] is not None and t["status"] not in ("failed", "diverged")
    ]
    best = score.best(usable, key=lambda trial: trial["best"]["score"]) if usable else None
    return {
        "counts": {status: counts[status] for status in (*ENDED, *OPEN_ORDER) if counts[status]},
        "best": best and {"trial": best["name"], **best["best"], "base": best["base"]},
        "trained_s": sum(trial["seconds"] for trial in trials),
        **_times(run),
        "trials": trials,
    }


def _times(run: RunPaths) -> dict[str, float | None]:
    """Seconds since the run began and since its last evaluation; of a copy of a store nobody knows."""
    if mirror_of(run.root):
        return {"began_s_ago": None, "evaluated_s_ago": None}
    now, evaluated = time.time(), [p.stat().st_mtime for p in run.root.glob("**/metrics.jsonl")]
    began = run.resolved.stat().st_mtime
    return {
        "began_s_ago": max(0.0, now - began),
        "evaluated_s_ago": max(0.0, now - max(evaluated)) if evaluated else None,
    }


def _trial(paths: TrialPaths, score: Objective, is_driven: bool) -> dict[str, Any]:
    """A trial as it stands; what is damaged is told, and a resume mends it."""
    try:
        status, reason = _status(paths, is_driven)
        config = read_state(paths.config) if paths.config.is_file() else {}
    except DamagedError as error:
        status, reason, config = "damaged", str(error), {}
    rows, _ = sound_rows(paths.metrics)
    last, top = (rows[-1] if rows else None), Judge(**config.get("judge", {})).best_row(rows)
    every = config.get("eval_every")
    return {
        "name": paths.root.name,
        "status": status,
        "reason": masked(reason),
        "examples": last["examples"] if last else 0,
        "num_examples": config.get("num_examples"),
        "evaluation": sum(row["steps"] > 0 for row in rows),
        "num_evaluations": math.ceil(config["num_examples"] / every) if every else None,
        "score": _score(last, score),
        "best": top and {"score": _score(top, score), "examples": top["examples"]},
        "base": next((_score(row, score) for row in rows if row["steps"] == 0), None),
        "seconds": float(last.get("seconds", 0.0)) if last else 0.0,
    }


def _score(row: dict[str, Any] | None, score: Objective) -> float | None:
    return row.get(score.key) if row else None


def _status(paths: TrialPaths, is_driven: bool) -> tuple[str, str]:
    if paths.status.is_file():
        found = read_state(paths.status)
        return found["status"], found["reason"]
    if not paths.metrics.is_file():
        return "waiting", ""
    return ("running" if is_driven else "interrupted"), ""


def status_lines(status: dict[str, Any]) -> list[str]:
    """The same for a person."""
    lines = [_headline(status)]
    if status["state"] == "starting":
        return lines
    lines.append(f"  {_counts(status)}")
    lines += _best_lines(status)
    lines += [f"  time: {text}" for text in [_time(status)] if text]
    lines += _running_lines(status)
    lines += [
        f"  {t['name']}: {t['status']}: {t['reason']}" for t in status["trials"] if t["reason"]
    ]
    lines += [f"  discarded: {reason}" for reason in status["discarded"]]
    for asked in status["commands"]:
        lines.append(
            f"  asked for, not obeyed yet: {asked['kind']} {asked['trial']} ({asked['by']})"
        )
    if status["goes_on_by"]:
        lines.append(f"  `{status['goes_on_by']}` goes on")
    return [printable(line) for line in lines]


def _headline(status: dict[str, Any]) -> str:
    driver = status["driver"]
    where = f" (process {driver['pid']} on {driver['host']})" if driver else ""
    return f"{status['place']}: {status['kind']}, {status['state']}{where}"


def _counts(status: dict[str, Any]) -> str:
    counts, total = status["counts"], status["num_trials"]
    ended = sum(counts.get(kind, 0) for kind in ENDED)
    unproposed = total - len(status["trials"])
    parts = [f"{count} {kind}" for kind, count in counts.items()]
    parts += [f"{unproposed} not proposed yet"] if unproposed else []
    discarded = (
        f"; {status['num_discarded']} candidates discarded" if status["num_discarded"] else ""
    )
    return f"{ended}/{total} trials ended ({', '.join(parts) or 'none begun'}){discarded}"


def _best_lines(status: dict[str, Any]) -> list[str]:
    best = status["best"]
    if best is None:
        return []
    base = f" (base {best['base']:.4f})" if best["base"] is not None else ""
    so_far = "" if status["state"] == "ended" else " so far"
    score = f"{status['objective']} {best['score']:.4f}{base}"
    return [f"  best{so_far}: {score} after {best['examples']:,} examples: {best['trial']}"]


def _time(status: dict[str, Any]) -> str:
    parts = [f"{duration(status['trained_s'])} of training in all trials"]
    if status["began_s_ago"] is not None:
        parts.append(f"began {duration(status['began_s_ago'])} ago")
    if status["evaluated_s_ago"] is not None:
        parts.append(f"last evaluation {duration(status['evaluated_s_ago'])} ago")
    return ", ".join(parts)


def _running_lines(status: dict[str, Any]) -> list[str]:
    """A table of the trials that have begun and not ended."""
    begun = [trial for trial in status["trials"] if trial["status"] in ("running", "interrupted")]
    if not begun:
        return []
    score = objective_named(status["objective"])
    rows = [
        (
            f"{trial['evaluation']}/{trial['num_evaluations'] or '?'}",
            f"{trial['examples']:,}/{trial['num_examples'] or 0:,}",
            "" if trial["score"] is None else f"{trial['score']:.4f}",
            "" if trial["best"] is None else f"{trial['best']['score']:.4f}",
            trial["status"],
            trial["name"],
        )
        for trial in begun
    ]
    headers = ("rung", "examples", score.key, "best", "status", "trial")
    return text_table(headers, rows, numeric=4).splitlines()
