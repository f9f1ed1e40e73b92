"""What a sweep found, as a table on a terminal."""

from rich.console import Console
from rich.table import Table

from orchestration.results import TrialRecord
from trainers.paths import RunPaths


def show_results(
    records: list[TrialRecord],
    best: TrialRecord | None,
    run: RunPaths,
    num_discarded: int,
    console: Console | None = None,
) -> None:
    """The results table, and where the report and the best adapter are."""
    console = console or Console(highlight=False)
    console.print(
        f"{run.root.name}: {len(records)} trials, {num_discarded} candidates discarded before any trial"
    )
    table = Table()
    numbers = ("rank", "learning_rate", "batch", "examples", "eval_loss", "bits/byte")
    for column in ("rank", "learning_rate", "batch", "target", "status", *numbers[3:]):
        table.add_column(column, justify="right" if column in numbers else "left")
    for record in records:
        chosen = best is not None and record.name == best.name
        table.add_row(*_result_cells(record), style="bold green" if chosen else None)
    console.print(table)
    for record in records:
        if record.reason:
            console.print(f"{record.name}: {record.reason}", markup=False, soft_wrap=True)
    base = next((record.base_loss for record in records if record.base_loss is not None), None)
    if base is not None:
        console.print(f"eval_loss of the untouched base: {base:.4f}")
    console.print(f"report: {run.report}", markup=False, soft_wrap=True)
    console.print(
        f"best adapter: {run.best}" if best else "no trial ended with a usable score",
        markup=False,
        soft_wrap=True,
    )


def _result_cells(record: TrialRecord) -> list[str]:
    c, top = record.candidate, record.best
    cells = [str(c["lora_rank"]), f"{c['learning_rate']:.2e}", str(c["global_batch_size"])]
    cells += ["+".join(c["target"]), record.status]
    if top is None:
        return [*cells, "", "", ""]
    return [
        *cells,
        f"{top['examples']:,}",
        f"{top['eval_loss']:.4f}",
        f"{top['eval_bits_per_byte']:.4f}",
    ]
