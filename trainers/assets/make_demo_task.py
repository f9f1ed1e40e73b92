"""Cuts the demo's rows from standard-library modules that the shipped base has not seen, and its
retention set from the language reference, which the base was trained on.

    python -m trainers.assets.make_demo_task --out trainers/assets/demo

A row of functions.jsonl asks for the body of a documented function: prompt is the signature and the
docstring, completion the body. reference.jsonl has the reference's words on some statements. Written
once on CPython 3.11.7 and committed, so that the demo is the same everywhere.
"""

import argparse
import ast
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

from trainers.assets.corpus import unseen_files

MIN_BODY_LINES, MAX_CHARACTERS = 2, 900
STATEMENTS = ("await", "pass", "continue", "break", "lambda", "while", "yield", "return", "assert")
"""Topics of the reference in the retention set: about 1,700 tokens, as each evaluation reads them."""


def documented_functions(source: str) -> Iterator[tuple[str, str]]:
    """(signature and docstring, body) of each function that has both, as they stand in the source."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if (
            not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            or ast.get_docstring(node) is None
        ):
            continue
        if len(node.body) < 2 or node.end_lineno is None:
            continue
        docstring_end = node.body[0].end_lineno or node.lineno
        prompt = textwrap.dedent("\n".join(lines[node.lineno - 1 : docstring_end]) + "\n")
        body = "\n".join(lines[docstring_end : node.end_lineno]).strip("\n")
        indent = len(lines[node.lineno - 1]) - len(lines[node.lineno - 1].lstrip())
        yield prompt, "\n".join(line[indent:] for line in body.splitlines()) + "\n"


def rows() -> Iterator[dict[str, str]]:
    seen: set[str] = set()
    for path in unseen_files():
        for prompt, body in documented_functions(path.read_text(encoding="utf-8")):
            short = len(prompt) + len(body) <= MAX_CHARACTERS
            if short and body.count("\n") >= MIN_BODY_LINES and body not in seen:
                seen.add(body)
                yield {"prompt": prompt, "completion": body}


def reference() -> Iterator[dict[str, str]]:
    from pydoc_data.topics import topics

    for statement in STATEMENTS:
        yield {"text": topics[statement]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in (("functions", list(rows())), ("reference", list(reference()))):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        print(f"{path}: {len(found)} rows, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
