"""Damaged files of a run: each is known as such, whatever byte it is that changed."""

import hashlib
import json
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.integrity import (
    CHECKSUMS,
    DamagedError,
    check_folder,
    first_whole,
    seal_folder,
    sealed,
    sealed_row,
    unsealed,
    unsealed_row,
)
from trainers.paths import read_json_lines, read_state, write_json_lines, write_state

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=4)
ROW = {"examples": 16, "eval_loss": 2.0625, "text": '"}, "crc": "\u2028\x85'}
STATE = {"status": "finished", "reason": '\n "sha256": "', "examples": 64}


@given(OBJECTS)
def test_integrity_state_and_row_come_back_as_they_were(value):
    assert unsealed(sealed(value), "x") == value
    assert unsealed_row(sealed_row(value)) == value


def test_integrity_state_is_json_whose_checksum_anybody_can_check():
    text = sealed(STATE)
    assert json.loads(text).keys() == {*STATE, "sha256"}
    body = json.dumps(STATE, indent=1)
    assert json.loads(text)["sha256"] == hashlib.sha256(body.encode()).hexdigest()
    assert json.loads(sealed_row(ROW))["crc"] == f"{zlib.crc32(json.dumps(ROW).encode()):08x}"


def damages(data: bytes, count: int) -> list[bytes]:
    """Every cut of some bytes, and single bits that flipped."""
    cuts = [data[:length] for length in range(len(data))]
    draw = random.Random(count)
    flipped = []
    for _ in range(count):
        at, bit = draw.randrange(len(data)), draw.randrange(8)
        flipped.append(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
    return [*cuts, *flipped]


def test_integrity_state_file_cut_or_flipped_anywhere_is_refused(tmp_path):
    path = tmp_path / "status.json"
    write_state(path, STATE)
    for damaged in damages(path.read_bytes(), 400):
        path.write_bytes(damaged)
        with pytest.raises(DamagedError, match=r"status\.json: must end in the checksum"):
            read_state(path)


def test_integrity_row_cut_or_flipped_anywhere_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_json_lines(path, [ROW, ROW | {"examples": 32}])
    whole = path.read_bytes()
    first_line = whole.index(b"\n")
    for damaged in damages(whole, 400):
        path.write_bytes(damaged)
        if damaged in (b"", whole[:first_line], whole[: first_line + 1], whole[:-1]):
            continue  # fewer rows, each as it was: what a kill may leave, and the checkpoint knows better
        with pytest.raises(DamagedError, match=r"metrics\.jsonl:[12]: must be a row"):
            read_json_lines(path)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(range(256)) * 8)
    (folder / "empty").write_bytes(b"")
    seal_folder(folder)
    check_folder(folder)
    return folder


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "weights").write_bytes(b""), r"weights: must have 2,048 bytes, has 0"),
        (lambda f: (f / "weights").write_bytes(bytes(2047)), r"must have 2,048 bytes, has 2,047"),
        (lambda f: (f / "weights").write_bytes(bytes(2048)), r"weights: its SHA-256 is not"),
        (lambda f: (f / "weights").unlink(), r"weights: must be there, is not"),
        (lambda f: (f / CHECKSUMS).unlink(), r"checksums\.json: must be there, is not"),
        (lambda f: (f / CHECKSUMS).write_text(""), r"checksums\.json: must end in the checksum"),
    ],
)
def test_integrity_folder_that_is_not_what_was_written_is_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(DamagedError, match=message):
        check_folder(folder)


def test_integrity_folder_flipped_in_any_bit_is_refused(folder):
    path = folder / "weights"
    for damaged in damages(path.read_bytes(), 100)[-100:]:
        path.write_bytes(damaged)
        with pytest.raises(DamagedError):
            check_folder(folder)


def test_integrity_first_whole_skips_the_damaged_and_names_them(folder, tmp_path):
    other = tmp_path / "previous"
    other.mkdir()
    seal_folder(other)
    assert first_whole((folder, other)) == (folder, [])
    (folder / "weights").unlink()
    found, problems = first_whole((folder, other, tmp_path / "none"))
    assert found == other
    assert [problem.split(":")[0] for problem in problems] == [str(folder / "weights")]
    assert first_whole((folder, tmp_path / "none")) == (None, problems)
    assert first_whole((tmp_path / "none",)) == (None, [])
