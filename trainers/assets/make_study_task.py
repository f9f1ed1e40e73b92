"""Cuts the studies' rows from the standard library's own test suite, which the shipped base has not seen.

    python -m trainers.assets.make_study_task --out trainers/assets/study

A row of tests.jsonl.gz asks for the body of a function: prompt is the signature with the docstring or
comments under it, completion the body. Short rows (128 tokens of the shipped tokenizer with both ends),
and many: a study of 300 steps of 16 examples reads 4,800 of them. Written once on CPython 3.11.7 and
committed, so that a study is the same everywhere.
"""

import argparse
import ast
import gzip
import hashlib
import json
import platform
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

TOKENIZER = Path(__file__).parent / "tiny-llama" / "tokenizer.json"
MIN_TOKENS, MAX_TOKENS = 24, 128
MAX_ROWS = 8_000
RUN_WORDS, MAX_KNOWN_FRAC = 5, 0.5
"""A row is a near-duplicate when over MAX_KNOWN_FRAC of its runs of RUN_WORDS words stand in earlier
rows, taken together: held-out rows must not be known piece by piece."""
NOISE_CHARACTERS, MIN_WORDS_FRAC = 40, 0.8
MAX_DIGITS = 12
MAX_BYTES = 900_000

Function = ast.FunctionDef | ast.AsyncFunctionDef
Row = dict[str, str]


def suite_files() -> list[Path]:
    """Source files of this Python's test suite, sorted by name."""
    return sorted((Path(sysconfig.get_paths()["stdlib"]) / "test").rglob("*.py"))


def functions(source: str) -> Iterator[tuple[Function, Row]]:
    """Each outermost function or method with its row: signature, docstring and leading comments;
    body. Dedented."""
    lines, tree = source.splitlines(), ast.parse(source)
    nodes = [node for node in ast.walk(tree) if isinstance(node, Function)]
    inner = {part for node in nodes for part in ast.walk(node) if part is not node}
    for node in nodes:
        if node in inner:
            continue
        body = node.body[ast.get_docstring(node) is not None :]
        if not body:
            continue
        decorators = getattr(body[0], "decorator_list", [])
        first = min([body[0].lineno, *(decorator.lineno for decorator in decorators)])
        if first == node.lineno:  # def f(): pass
            continue
        text = lines[node.lineno - 1 : node.end_lineno]
        dedented = textwrap.dedent("\n".join(text)).splitlines()
        if len(dedented) != len(text) or dedented[0].startswith((" ", "\t")):
            continue  # a literal with lines further left than the def
        cut = first - node.lineno
        prompt, completion = ("\n".join(part) + "\n" for part in (dedented[:cut], dedented[cut:]))
        yield node, {"prompt": prompt, "completion": completion}


def is_noise(node: Function) -> bool:
    """Whether the function holds data and not code: long numbers, or long literals that are not words."""
    constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return any(
        len(str(abs(value))) > MAX_DIGITS
        if isinstance(value, int)
        else isinstance(value, str | bytes) and _is_noise(str(value))
        for value in constants
    )


def _is_noise(literal: str) -> bool:
    if len(literal) < NOISE_CHARACTERS:
        return False
    words = re.findall(r"[A-Za-z]+|\s", literal)
    return " " not in literal or sum(map(len, words)) < MIN_WORDS_FRAC * len(literal)


def num_tokens(tokenizer: Tokenizer, row: Row) -> tuple[int, int]:
    """Tokens of the prompt with <s> and of the completion with </s>, as they are trained: the two are
    encoded apart, because a token of this tokenizer would straddle the line break between them."""
    prompt, completion = (
        len(tokenizer.encode(row[part], add_special_tokens=False).ids) + 1
        for part in ("prompt", "completion")
    )
    return prompt, completion


def candidates() -> Iterator[Row]:
    """Rows of the right length that are code, in order of their checksum."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    found: dict[str, Row] = {}
    for path in suite_files():
        try:
            rows = list(functions(path.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError):
            continue  # the suite has files that must not parse
        for node, row in rows:
            text = row["prompt"] + row["completion"]
            if text.isascii() and not is_noise(node):
                found[hashlib.sha256(text.encode()).hexdigest()] = row
    for _, row in sorted(found.items()):
        if MIN_TOKENS <= sum(num_tokens(tokenizer, row)) <= MAX_TOKENS:
            yield row


def study_rows() -> list[Row]:
    """At most MAX_ROWS rows, none nearly made of earlier ones."""
    seen: set[tuple[str, ...]] = set()
    kept: list[Row] = []
    for row in candidates():
        words = re.findall(r"\w+|[^\w\s]", row["prompt"] + row["completion"])
        runs = {tuple(words[at : at + RUN_WORDS]) for at in range(len(words) - RUN_WORDS + 1)}
        if len(runs & seen) <= MAX_KNOWN_FRAC * len(runs):
            kept.append(row)
            seen |= runs
        if len(kept) == MAX_ROWS:
            break
    return kept


README = """# tests.jsonl.gz: what `tenfold study` trains on

{rows:,} functions of CPython {python}'s own test suite (its `test` folder, which neither the shipped base
nor the demo has seen), made by `python -m trainers.assets.make_study_task`: `prompt` is the signature with
the docstring or comments under it, `completion` the body. At most {most} tokens a row with both ends, {mean:.1f} on
average of which {loss:.1f} bear loss; {total:,} loss-bearing tokens in all. In order of a checksum, so any slice is a
sample. No row is in it twice, nor one of whose runs of {run} words more than {known:.0%} stand in earlier rows.

The rows are the Python Software Foundation's, under the PSF License 2.0:
Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved. See https://docs.python.org/3/license.html
"""


def readme(rows: list[Row]) -> str:
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    counts = [num_tokens(tokenizer, row) for row in rows]
    num_loss = sum(completion for _, completion in counts)
    return README.format(
        rows=len(rows),
        python=platform.python_version(),
        most=max(map(sum, counts)),
        mean=sum(map(sum, counts)) / len(rows),
        loss=num_loss / len(rows),
        total=num_loss,
        run=RUN_WORDS,
        known=MAX_KNOWN_FRAC,
    )


def packed(rows: list[Row]) -> bytes:
    """The rows as JSON lines, gzipped; equal rows give equal bytes."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return gzip.compress(text.encode(), 9, mtime=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the file and its README")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    rows = study_rows()
    data = packed(rows)
    if len(data) > MAX_BYTES:
        raise SystemExit(
            f"the file must be at most {MAX_BYTES:,} bytes, got {len(data):,}: lower MAX_ROWS"
        )
    (folder / "tests.jsonl.gz").write_bytes(data)
    (folder / "README.md").write_text(readme(rows), encoding="utf-8")
    print(readme(rows))


if __name__ == "__main__":
    main()
