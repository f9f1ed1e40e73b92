"""What a sweep found, as text on a terminal."""

from rich.console import Console

from orchestration.results import TrialRecord
from orchestration.show import text_table
from trainers.paths import RunPaths

HEADERS = (
    "rank",
    "learning_rate",
    "batch",
    "at examples",
    "eval_loss",
    "bits/byte",
    "status",
    "target",
    "",
)


def show_results(
    records: list[TrialRecord],
    best: TrialRecord | None,
    run: RunPaths,
    num_discarded: int,
    console: Console | None = None,
) -> None:
    """The results table, and where the report and the best adapter are."""
    console = console or Console(highlight=False)
    lines = [
        f"{run.root.name}: {len(records)} trials, {num_discarded} candidates discarded before any trial"
    ]
    rows = [_cells(record, best) for record in records]
    lines.append(text_table(HEADERS, rows, numeric=6))
    lines += [f"{record.name}: {record.reason}" for record in records if record.reason]
    base = next((record.base_loss for record in records if record.base_loss is not None), None)
    lines += [f"eval_loss of the untouched base: {base:.4f}"] if base is not None else []
    lines.append(f"report: {run.report}")
    lines.append(f"best adapter: {run.best}" if best else "no trial ended with a usable score")
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def _cells(record: TrialRecord, best: TrialRecord | None) -> tuple[str, ...]:
    c, top = record.candidate, record.best
    candidate = (str(c["lora_rank"]), f"{c['learning_rate']:.2e}", str(c["global_batch_size"]))
    scores = ("", "", "")
    if top is not None:
        scores = (
            f"{top['examples']:,}",
            f"{top['eval_loss']:.4f}",
            f"{top['eval_bits_per_byte']:.4f}",
        )
    mark = "<- best" if best and record.name == best.name else ""
    return (*candidate, *scores, record.status, "+".join(c["target"]), mark)
