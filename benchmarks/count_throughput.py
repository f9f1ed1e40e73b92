"""Throughput of `count_tokens` (reading, shaping, masking and all) beside the tokenizer alone on the same
texts, already in memory (`Tokenizer.encode_batch`, its own threads).

    PYTHONPATH=. python benchmarks/count_throughput.py

Prints, for a file of plain text and for one of prompts and completions, MB/s of both and the median and
range of their ratio over pairs of runs that alternate; keeps them in results/. Asserts nothing.
"""

import json
import os
import pydoc_data.topics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import (
    FUNCTIONS,
    SHARED,
    base_parser,
    machine_text,
    print_verdicts,
    results_of,
    rewrite_readme,
    say,
    spread,
    spread_text,
    table,
    verdict,
    write_result,
)
from trainers.data import count_tokens, load_tokenizer

WANTED_RATIO = 0.7
GSM8K = SHARED / "data" / "gsm8k" / "test.jsonl"


def text_rows(num_bytes: int) -> list[dict[str, str]]:
    """Documents of a few kilobytes: the language reference and the standard library's sources."""
    topics = list(pydoc_data.topics.topics.values())
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    sources = [path.read_text(encoding="utf-8", errors="ignore")[:8000] for path in library]
    return repeated([{"text": text} for text in (*topics, *sources) if text], num_bytes)


def pair_rows(num_bytes: int) -> list[dict[str, str]]:
    """gsm8k where it is at hand, else the demo's functions."""
    path = GSM8K if GSM8K.is_file() else FUNCTIONS
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return repeated(rows, num_bytes)


def repeated(rows: list[dict[str, str]], num_bytes: int) -> list[dict[str, str]]:
    """Rows over and over until they hold so many bytes of text."""
    once = sum(len(text.encode()) for row in rows for text in row.values())
    return rows * max(1, round(num_bytes / once))


def seconds(work: Callable[[], Any]) -> float:
    """Wall seconds of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measured(rows: list[dict[str, str]], runs: int) -> dict[str, Any]:
    """Seconds and ratio of both arms, alternating."""
    encoder = load_tokenizer(None).encoder
    texts = ["".join(row.values()) for row in rows]
    num_bytes = sum(len(text.encode()) for text in texts)
    raw_s, ours_s = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for run in range(runs + 1):
            os.environ["TENFOLD_CACHE"] = str(Path(folder) / f"cache-{run}")
            raw = seconds(lambda: encoder.encode_batch(texts, add_special_tokens=False))
            ours = seconds(lambda: count_tokens(path))
            if run:  # the first of each pays for code and pages
                raw_s.append(raw)
                ours_s.append(ours)
    ratios = [raw / ours for raw, ours in zip(raw_s, ours_s, strict=True)]
    return {"rows": len(rows), "bytes": num_bytes, "raw_s": raw_s, "ours_s": ours_s} | {
        "ratio": spread(ratios),
        "ratios": ratios,
    }


def readme_lines(folder: Path) -> list[str]:
    """The table of every result."""
    lines = []
    for name, result in results_of(folder, "count_throughput*.json"):
        lines += [f"**{name}** ({machine_text(result)})", ""]
        rows = [
            [
                kind,
                f"{cell['bytes'] / 1e6 / spread(cell['raw_s'])['median']:.2f} MB/s",
                f"{cell['bytes'] / 1e6 / spread(cell['ours_s'])['median']:.2f} MB/s",
                spread_text(cell["ratios"]),
            ]
            for kind, cell in result["cells"].items()
        ]
        head = ["file", "tokenizers alone", "count_tokens", "ratio (range of pairs)"]
        lines += [*table(head, rows), ""]
    return lines


def main() -> None:
    parser = base_parser(__doc__ or "")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=20)
    args = parser.parse_args()
    if args.readme:
        rewrite_readme("count_throughput", readme_lines(args.results))
        return
    makers = {"text": text_rows, "prompt/completion": pair_rows}
    cells = {}
    for kind, make in makers.items():
        cells[kind] = measured(make(args.megabytes * 1_000_000), args.runs)
        say(f"{kind}: {spread_text(cells[kind]['ratios'])} of the tokenizer's throughput")
    verdicts = [
        verdict(
            f"{kind} at {WANTED_RATIO:.0%} of raw tokenizer throughput",
            cell["ratio"]["median"] >= WANTED_RATIO,
            spread_text(cell["ratios"]),
        )
        for kind, cell in cells.items()
    ]
    print_verdicts(verdicts)
    settings = {"runs": args.runs, "megabytes": args.megabytes}
    values = {"cells": cells, "verdicts": verdicts}
    write_result(args.results / "count_throughput.json", settings, values)


if __name__ == "__main__":
    main()
