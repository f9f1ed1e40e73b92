"""What a sweep found, as text on a terminal."""

from typing import Any

from rich.console import Console

from orchestration.choosing import choice_lines
from orchestration.console import PlainConsole
from orchestration.forgetting import KEY, base_retention, has_retention, retention_text
from orchestration.objective import Objective
from orchestration.results import TrialRecord, objective_of_records
from orchestration.show import SCALED_LR, target_text, text_table
from trainers.mirror import shown
from trainers.paths import RunPaths

CANDIDATE = ("rank", "learning_rate", SCALED_LR, "batch")
BESIDE = {
    "eval_loss": {"eval_bits_per_byte": ("bits/byte", ".4f")},
    "eval_bits_per_byte": {"eval_loss": ("eval_loss", ".4f")},
    "eval_score": {"eval_loss": ("eval_loss", ".4f"), "completion_length": ("tokens", ".1f")},
    "eval_reward": {
        "kl": ("kl", ".3f"),
        "entropy": ("entropy", ".3f"),
        "completion_length": ("tokens", ".1f"),
    },
}
"""Key of a score -> the keys of a metrics row that stand beside it, each with its column's name and format."""
RETENTION = ("retention (over base)",)
ENDS = ("status", "target", "")


def show_results(
    records: list[TrialRecord],
    best: TrialRecord | None,
    run: RunPaths,
    num_discarded: int,
    console: Console | None = None,
) -> None:
    """The results table, and where the report and the best adapter are."""
    console = console or PlainConsole()
    lines = [
        f"{run.root.name}: {len(records)} trials, {num_discarded} candidates discarded before any trial"
    ]
    lines.append(_table(records, best))
    lines += [f"{record.name}: {record.reason}" for record in records if record.reason]
    lines += choice_lines(records, best)
    lines += _base_lines(records)
    lines.append(f"report: {shown(run.report)}")
    lines.append(
        f"best adapter: {shown(run.best)}" if best else "no trial ended with a usable score"
    )
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def _base_lines(records: list[TrialRecord]) -> list[str]:
    """Losses of the untouched base, which every trial that began has measured."""
    lines = []
    score = objective_of_records(records)
    base = next((r.base_loss for r in records if r.base_loss is not None), None)
    lines += [f"{score.key} of the untouched base: {score.text(base)}"] if base is not None else []
    lines += _idle_lines(records)
    kept = next((k for k in map(base_retention, records) if k is not None), None)
    lines += [f"{KEY} of the untouched base: {kept:.4f}"] if kept is not None else []
    return lines


def _idle_lines(records: list[TrialRecord]) -> list[str]:
    """Of reinforcement learning, where most steps of every trial taught nothing: no learning rate mends that."""
    last = [record.rows[-1] for record in records if record.rows]
    shares = [row["idle_steps"] / row["steps"] for row in last if row.get("idle_steps")]
    if not shares or len(shares) < len(last) or min(shares) <= 0.5:
        return []
    return [
        f"in {min(shares):.0%} or more of every trial's steps all completions of a prompt earned the same, which "
        "teaches nothing: give more num_generations, or a reward that tells more apart"
    ]


def _table(records: list[TrialRecord], best: TrialRecord | None) -> str:
    retained = RETENTION if has_retention(records) else ()
    score = objective_of_records(records)
    scores = ("at examples", score.key, *beside_names(score))
    numbers = (*CANDIDATE, *scores, *retained)
    rows = [_cells(record, best, score, bool(retained)) for record in records]
    return text_table((*numbers, *ENDS), rows, numeric=len(numbers))


def beside_names(score: Objective) -> tuple[str, ...]:
    """Columns beside a score."""
    return tuple(name for name, _ in BESIDE[score.key].values())


def beside_texts(score: Objective, row: dict[str, Any]) -> tuple[str, ...]:
    """What of a metrics row stands beside its score."""
    return tuple(format(row[key], form) for key, (_, form) in BESIDE[score.key].items())


def _cells(
    record: TrialRecord, best: TrialRecord | None, score: Objective, retained: bool
) -> tuple[str, ...]:
    c, top = record.candidate, record.best
    scaled = f"{record.settings.scaled_learning_rate:.2e}"
    candidate = (
        str(c["lora_rank"]),
        f"{c['learning_rate']:.2e}",
        scaled,
        str(c["global_batch_size"]),
    )
    scores = ("",) * (2 + len(beside_names(score)))
    if top is not None:
        scores = (f"{top['examples']:,}", score.text(record.best_loss), *beside_texts(score, top))
    retention = (retention_text(record),) if retained else ()
    seed = [f"seed {record.settings.seed}"] if record.repeats else []
    chosen = ["<- best"] if best and record.name == best.name else []
    mark = " ".join(seed + chosen)
    return (*candidate, *scores, *retention, record.status, target_text(c), mark)
