"""Peak memory and seconds of `tenfold check` on a gigabyte of jsonl, beside a tenth of it: what the audit
holds must not grow with the file.

    PYTHONPATH=. python benchmarks/audit_gigabyte.py

Writes the files into --work, runs the command as a user does on an empty cache, and keeps what it found in
results/. Asserts nothing.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    base_parser,
    machine_text,
    print_verdicts,
    results_of,
    rewrite_readme,
    say,
    table,
    tenfold_command,
    verdict,
    write_result,
)
from benchmarks.count_throughput import text_rows

BOUND_BYTES = 1 << 30
CHILD = (
    "import json, resource, subprocess, sys; "
    "done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE); "
    "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024; "
    "print(json.dumps({'code': done.returncode, 'peak': peak, 'out': done.stdout.decode()}))"
)


def write_rows(path: Path, num_bytes: int) -> None:
    """Prompts and completions of lines drawn at random from the standard library, no two alike."""
    text = "\n".join(row["text"] for row in text_rows(4_000_000))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    rng, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as stream:
        while written < num_bytes:
            drawn = rng.choices(lines, k=rng.randrange(8, 32))
            middle = rng.randrange(1, len(drawn))
            prompt, completion = ("\n".join(part) for part in (drawn[:middle], drawn[middle:]))
            row = {"prompt": f"{prompt}\n", "completion": completion}
            written += stream.write(json.dumps(row) + "\n")


def audited(path: Path, work: Path) -> dict[str, Any]:
    """What `tenfold check` of a file took, in a process of its own."""
    cache = work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *tenfold_command(), "check", str(path), "--json"],
        env=os.environ | {"TENFOLD_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(done.stdout)
    took = time.perf_counter() - began
    data = json.loads(found["out"])["data"]
    shutil.rmtree(cache, ignore_errors=True)
    keys = ("num_rows", "num_train_loss_tokens", "num_too_long", "num_duplicates", "max_row_tokens")
    return {
        "bytes": path.stat().st_size,
        "seconds": took,
        "peak_bytes": found["peak"],
        "exit_code": found["code"],
        "near_duplicates": data["near_duplicates"]["num_train"],
    } | {key: data[key] for key in keys}


def readme_lines(folder: Path) -> list[str]:
    """The table of every result."""
    lines = []
    for name, result in results_of(folder, "audit_gigabyte*.json"):
        lines += [f"**{name}** ({machine_text(result)})", ""]
        rows = [
            [
                f"{file['bytes'] / 1e9:.2f} GB",
                f"{file['num_rows']:,}",
                f"{file['num_train_loss_tokens']:,}",
                f"{file['seconds']:.0f} s",
                f"{file['peak_bytes'] / 2**20:,.0f} MiB",
            ]
            for file in result["files"]
        ]
        lines += [*table(["file", "rows", "loss-bearing tokens", "time", "peak"], rows), ""]
    return lines


def main() -> None:
    parser = base_parser(__doc__ or "")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    args = parser.parse_args()
    if args.readme:
        rewrite_readme("audit_gigabyte", readme_lines(args.results))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    files = []
    for megabytes in args.megabytes:
        path = args.work / f"audit-{megabytes}.jsonl"
        write_rows(path, megabytes * 1_000_000)
        say(f"wrote {path}")
        files.append(audited(path, args.work))
        path.unlink()
        peak = files[-1]["peak_bytes"] / 2**20
        say(f"{megabytes} MB: {files[-1]['seconds']:.0f} s, peak {peak:,.0f} MiB")
    peak = files[-1]["peak_bytes"]
    verdicts = [
        verdict(
            f"{args.megabytes[-1]} MB of jsonl audited in under {BOUND_BYTES / 2**20:,.0f} MiB",
            peak < BOUND_BYTES,
            f"{peak / 2**20:,.0f} MiB",
        )
    ]
    print_verdicts(verdicts)
    settings = {"megabytes": args.megabytes}
    write_result(
        args.results / "audit_gigabyte.json", settings, {"files": files, "verdicts": verdicts}
    )


if __name__ == "__main__":
    main()
