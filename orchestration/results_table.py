"""What a sweep found, as text on a terminal."""

from rich.console import Console

from orchestration.console import PlainConsole
from orchestration.forgetting import KEY, base_retention, has_retention, retention_text
from orchestration.results import TrialRecord
from orchestration.show import SCALED_LR, target_text, text_table
from trainers.mirror import shown
from trainers.paths import RunPaths

CANDIDATE = ("rank", "learning_rate", SCALED_LR, "batch")
SCORES = ("at examples", "eval_loss", "bits/byte")
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
    lines += _base_lines(records)
    lines.append(f"report: {shown(run.report)}")
    lines.append(
        f"best adapter: {shown(run.best)}" if best else "no trial ended with a usable score"
    )
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def _base_lines(records: list[TrialRecord]) -> list[str]:
    """Losses of the untouched base, which every trial that began has measured."""
    lines = []
    for name, of_record in (("eval_loss", lambda r: r.base_loss), (KEY, base_retention)):
        loss = next((of_record(r) for r in records if of_record(r) is not None), None)
        lines += [f"{name} of the untouched base: {loss:.4f}"] if loss is not None else []
    return lines


def _table(records: list[TrialRecord], best: TrialRecord | None) -> str:
    retained = RETENTION if has_retention(records) else ()
    numbers = (*CANDIDATE, *SCORES, *retained)
    rows = [_cells(record, best, bool(retained)) for record in records]
    return text_table((*numbers, *ENDS), rows, numeric=len(numbers))


def _cells(record: TrialRecord, best: TrialRecord | None, retained: bool) -> tuple[str, ...]:
    c, top = record.candidate, record.best
    scaled = f"{record.settings.scaled_learning_rate:.2e}"
    candidate = (
        str(c["lora_rank"]),
        f"{c['learning_rate']:.2e}",
        scaled,
        str(c["global_batch_size"]),
    )
    scores = ("", "", "")
    if top is not None:
        scores = (
            f"{top['examples']:,}",
            f"{top['eval_loss']:.4f}",
            f"{top['eval_bits_per_byte']:.4f}",
        )
    retention = (retention_text(record),) if retained else ()
    mark = "<- best" if best and record.name == best.name else ""
    return (*candidate, *scores, *retention, record.status, target_text(c), mark)
