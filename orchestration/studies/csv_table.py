"""results.csv: the runs of a study as one flat table."""

import csv
import io
from pathlib import Path
from typing import Any

from trainers.paths import write_text

ARM_COLUMNS = (
    "method",
    "lora_rank",
    "lora_alpha",
    "target",
    "global_batch_size",
    "trained_params",
)
POINT_COLUMNS = (
    "learning_rate",
    "seed",
    "status",
    "reason",
    "eval_loss",
    "base_loss",
    "examples",
    "steps",
    "loss_tokens",
    "seconds",
    "peak_bytes",
    "trial",
)


def write_csv(folder: Path, results: dict[str, Any]) -> None:
    """Writes folder/results.csv: one row a run of every arm, or the rows of all tables of a study
    that has no arms (a column each title, empty where a table lacks it)."""
    header, rows = _run_rows(results) if results["arms"] else _table_rows(results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(folder / "results.csv", text.getvalue())


def _run_rows(results: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    rows = []
    for arm in results["arms"]:
        of_arm = [arm["label"], *(arm[key] for key in ARM_COLUMNS)]
        of_arm[4] = "+".join(arm["target"])
        rows += [[*of_arm, *(point[key] for key in POINT_COLUMNS)] for point in arm["points"]]
    return ["arm", *ARM_COLUMNS, *POINT_COLUMNS], rows


def _table_rows(results: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    # A dict keeps the titles in the order in which they first come.
    titles = list({title: None for table in results["tables"] for title, _ in table["headers"]})
    rows = []
    for table in results["tables"]:
        for cells in table["rows"]:
            of_title = dict(zip((title for title, _ in table["headers"]), cells, strict=True))
            rows.append([table["title"], *(of_title.get(title, "") for title in titles)])
    return ["table", *titles], rows
