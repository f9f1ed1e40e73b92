"""Whatever stands in a data file: `tenfold check` and `plan` end with 0, or with 2 and one clear line for each
problem; no traceback, no hang, nothing left behind. TENFOLD_FUZZ_EXAMPLES=N tries N new files in each test."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given

from tests.data.data_cases import SHAPES, TEXT_FILES, DataCase, fill, mutated, parquet, structured
from tests.fuzzing import LONGEST_LINE, fuzz_folder, quick_settings

CHECK, PLAN = ("check", "DATA"), ("plan", "sweep.yaml")

pytestmark = pytest.mark.own_process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with fuzz_folder(tmp_path_factory.mktemp("fuzz")) as work:
        fill(work)
        yield work


@quick_settings(80)
@given(case=structured())
def test_fuzz_data_of_any_values_ends_in_0_or_2_and_leaves_nothing(folder, case):
    assert case.run(folder).fault is None


@quick_settings(80)
@given(case=mutated())
def test_fuzz_data_damaged_ends_in_0_or_2_and_leaves_nothing(folder, case):
    assert case.run(folder).fault is None


@quick_settings(60)
@given(case=parquet())
def test_fuzz_data_in_parquet_of_any_type_ends_in_0_or_2_and_leaves_nothing(folder, case):
    assert case.run(folder).fault is None


@pytest.mark.parametrize("shape", SHAPES)
def test_fuzz_data_undamaged_of_every_shape_is_read(folder, shape):
    """Else the cases above would all end before anything is looked at."""
    names = ["data.jsonl", "list.json", "object.json", "data.jsonl.gz", "bom.jsonl"]
    rows = [SHAPES[shape](n) for n in range(40)]
    columns = "columns: {prompt: question, completion: answer}\n" if shape == "question" else ""
    for name in names:
        case = DataCase(PLAN, f"eval: 0.3\n{columns}", ((name, TEXT_FILES[name](rows)),))
        ending = case.run(folder)
        assert (ending.code, ending.fault, ending.err) == (0, None, "")


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet_of(**columns: pyarrow.Array) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


LONG = "n" * 5000
FAULTY_MESSAGE = {"role": "user", "\x1b[2J": "x"}
FOUND = {
    "name of a column of 5,000 characters": (
        "a.jsonl", lines({LONG: "x"}), ["a.jsonl:1: no known row shape, found columns nnn", "nnn ... nnn"],
    ),
    "role of 5,000 characters": (
        "a.jsonl", lines({"messages": [{"role": LONG, "content": "x"}]}), ["a.jsonl:1: message 1: unknown role 'nnn"],
    ),
    "key of a message with an escape of terminals": (
        "a.jsonl", lines({"messages": [FAULTY_MESSAGE]}), ["must have content, found role, \\x1b[2J"],
    ),
    "kind of a part of 5,000 characters": (
        "a.jsonl", lines({"messages": [{"role": "user", "content": [{"type": LONG}]}]}),
        ["content parts must be text, one is nnn"],
    ),
    "tab that a tsv file lacks": (
        "a.tsv", b'prompt\tcompletion\n"a"b\tc\n', ["a.tsv:2: not valid CSV: '\\t' expected after '\"'"],
    ),
    "date beyond the year 9999": (
        "a.parquet",
        parquet_of(text=pyarrow.array([86_400_000 * 10**7], pyarrow.date64())),
        ["a.parquet: a value after row 0 cannot be read: date value out of range"],
    ),
    "time beyond the year 9999": (
        "a.parquet", parquet_of(text=pyarrow.array([2**62], pyarrow.timestamp("us"))),
        ["a.parquet: a value after row 0"],
    ),
}  # fmt: skip
"""What the campaigns found, and what must be said of it."""


@pytest.mark.parametrize("command", [CHECK, PLAN], ids=["check", "plan"])
@pytest.mark.parametrize("name", FOUND)
def test_fuzz_data_found_before_gives_one_line_with_its_place(folder, name, command):
    file, content, parts = FOUND[name]
    ending = DataCase(command, "", ((file, content),)).run(folder)
    assert ending.fault is None
    assert ending.code == 2
    told = ending.err + ending.out  # check shows bad rows with the rest of what it found
    assert all(len(line) <= LONGEST_LINE for line in told.splitlines())
    for part in parts:
        assert part in told
