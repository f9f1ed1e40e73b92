"""The scheduler's ledger on disk: what is written comes back, a kill while writing costs one line."""

import json
import subprocess
import sys
import zlib
from dataclasses import asdict
from pathlib import Path

import pytest

from orchestration.rungs import RungLedger, RungRecord, stopped_trials
from trainers.integrity import sealed_row
from trainers.paths import RunPaths

ROOT = Path(__file__).resolve().parents[2]


def record(trial: str, examples: int, loss: float = 1.5, decision="CONTINUE") -> RungRecord:
    return RungRecord(trial=trial, examples=examples, eval_loss=loss, decision=decision)


RECORDS = [record("a", 10, 0.1 + 0.2), record("b", 10, 1e30, "STOP"), record("a", 20, 0.3, "STOP")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return RunPaths(tmp_path / "run").rungs


def written(path: Path) -> bytes:
    """The bytes of a ledger of RECORDS."""
    ledger = RungLedger(path)
    for item in RECORDS:
        ledger.append(item)
    return path.read_bytes()


def test_records_of_a_run_that_did_not_begin_are_none(path):
    assert RungLedger(path).records() == []
    assert not path.parent.exists()


def test_append_then_records_gives_the_same_in_order(path):
    written(path)
    assert RungLedger(path).records() == RECORDS


def test_append_writes_one_json_object_a_line(path):
    first = json.loads(written(path).splitlines()[0])
    assert first == {
        "trial": "a",
        "examples": 10,
        "eval_loss": 0.30000000000000004,
        "decision": "CONTINUE",
        "crc": f"{zlib.crc32(json.dumps(asdict(RECORDS[0])).encode()):08x}",
    }


def test_append_goes_on_in_a_file_of_an_earlier_attempt(path):
    written(path)
    RungLedger(path).append(record("c", 5))
    assert RungLedger(path).records() == [*RECORDS, record("c", 5)]


def test_records_of_a_file_cut_anywhere_are_the_whole_lines(path):
    whole = written(path)
    ends = [position for position, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        num_whole = sum(end < length for end in ends)
        assert RungLedger(path).records() == RECORDS[:num_whole]
        assert path.read_bytes() == whole[:length], "a reader must not write"
        RungLedger(path).append(record("next", 1))
        assert RungLedger(path).records() == [*RECORDS[:num_whole], record("next", 1)]


@pytest.mark.parametrize(
    "changes",
    [
        {"decision": None},
        {"more": 1},
        {"decision": "PAUSE"},
        {"eval_loss": "1.5"},
        {"examples": -1},
        {"examples": True},
        {"trial": 7},
        {"decision": ["STOP"]},
    ],
)
def test_records_line_that_was_written_so_and_is_none_names_its_place(path, changes):
    whole = written(path).decode().splitlines(keepends=True)
    values = {"trial": "a", "examples": 10, "eval_loss": 1.5, "decision": "CONTINUE"} | changes
    whole[1] = sealed_row({k: v for k, v in values.items() if v is not None}) + "\n"
    path.write_text("".join(whole))
    with pytest.raises(ValueError, match=r"rungs\.jsonl:2: must hold trial, .*, got "):
        RungLedger(path).records()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b'{"trial": "a", "examples": 10, "eval_loss": 1.5, "decision": "CONTINUE"}',
        b"\xff",
    ],
)
def test_records_damaged_line_is_left_out_and_numbered(path, line):
    whole = written(path).splitlines(keepends=True)
    whole[1] = line + b"\n"
    path.write_bytes(b"".join(whole))
    ledger = RungLedger(path)
    assert ledger.records() == [RECORDS[0], RECORDS[2]]
    assert ledger.damaged == [2]
    ledger.append(record("c", 5))
    assert RungLedger(path).records() == [RECORDS[0], RECORDS[2], record("c", 5)]


def test_stopped_trials_are_those_whose_last_record_says_stop():
    assert stopped_trials([]) == set()
    assert stopped_trials(RECORDS[:1]) == set()
    assert stopped_trials(RECORDS[:2]) == {"b"}
    assert stopped_trials(RECORDS) == {"a", "b"}


def test_rungs_module_imports_neither_ray_nor_torch():
    code = "import orchestration.rungs, sys; print({'ray', 'torch', 'optuna'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
