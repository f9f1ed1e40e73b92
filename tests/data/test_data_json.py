"""Files of JSON: arrays are streamed, and no chunk's end shows in what is read."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from trainers.data.json_arrays import MARGIN, TextWindow, read_json
from trainers.data.json_rows import RowDecoder
from trainers.data.records import BadRows, DataError, DataFile
from trainers.data.text_files import text_pieces

ARRAY = (
    '[{"a": 1, "b": [12, -0.5, 1e+10, 1.50]},\r\n {"é🦊": "\\ud83d\\ude00 \\\\ \\" é🦊 \\u0041"},\n'
    '\n{"c":\n{"d": [true, false, null, {}], "e": []}} , {"f": -7},{"long": "' + "x" * 80 + '"} ]\n'
)
# Broken, with the line that json names for the whole text.
BROKEN = {
    "cut string": ('[{"a": 1},\n{"a": "b', 2),
    "cut number": ('[{"a": 1},\n\n{"a": -', 3),
    "cut escape": ('[{"a": "\\ud83d\\u12"}, {"a": 1}]', 1),
    "no comma": ('[{"a": 1},\n{"a": 2}\n{"a": 3}]', 3),
    "no colon": ('[{"a": 1},\n{"a" 2}, {"a": 3}, {"a": 4}, {"a": 5}]', 2),
    "no key": ('[{"a": 1},\n{a: 2}, {"a": 3}, {"a": 4}, {"a": 5}]', 2),
    "no value": ('[{"a": 1},\n{"a": }, {"a": 3}, {"a": 4}, {"a": 5}]', 2),
    "no quote": ('[{"a": 1},\n{"a": "b, "c": 3}, {"a": 4}, {"a": 5}]', 2),
    "raw newline": ('[{"a": 1},\n{"a": "b\nc"}, {"a": 4}, {"a": 5}]', 2),
    "bad word": ('[{"a": 1},\n{"a": nul}, {"a": 3}, {"a": 4}, {"a": 5}]', 2),
    "trailing comma": ('[{"a": 1},\n]', 2),
    "no end": ('[{"a": 1}\n\n', 3),
    "half an end": ('[{"a": 1},\n', 2),
    "text after": ('[{"a": 1}]\n\n[{"a": 2}]', 3),
    "letters after": ('[{"a": 1}]\nx', 2),
}


def rows_of(path, **options):
    bad = BadRows()
    records = [*read_json(DataFile(Path(path), str(path)), bad, **options)]
    return [(record.columns, record.origin.number) for record in records], bad.shown


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("chunk_bytes", [*range(1, 40), 64, 1 << 18])
def test_json_array_gives_the_rows_of_json_loads_at_every_chunk_size(chunk_bytes, mark, write_rows):
    path = write_rows((mark + ARRAY).encode(), "rows.json")
    rows, bad = rows_of(path, chunk_bytes=chunk_bytes)
    assert [columns for columns, _ in rows] == json.loads(ARRAY)
    assert [line for _, line in rows] == [1, 2, 4, 5, 5]
    assert rows[0][0]["b"][3].source == "1.50"
    assert bad == []


def test_json_text_cut_in_two_at_any_byte_gives_the_same_values():
    data = ARRAY.encode()
    for cut in range(1, len(data)):
        window = TextWindow("x.json", text_pieces("x.json", [data[:cut], data[cut:]]))
        assert window.next_character() == "["
        assert window.value(RowDecoder())[0] == json.loads(ARRAY)


@pytest.mark.parametrize(
    "number", ["1", "12", "-1", "1.5", "-1.25e+10", "1E5", "123456789012345678"]
)
def test_json_number_that_a_chunk_cuts_is_read_whole(number, write_rows):
    path = write_rows(f"[{number} , {number}]", "rows.json")
    for chunk_bytes in range(1, 30):
        _, bad = rows_of(path, chunk_bytes=chunk_bytes)
        assert len(bad) == 2
        window = TextWindow("x", iter([number[:chunk_bytes], number[chunk_bytes:], " ]"]))
        assert window.value(RowDecoder())[0].source == number


@pytest.mark.parametrize("name", BROKEN)
def test_json_array_broken_is_one_verdict_with_its_line_at_every_chunk_size(name, write_rows):
    text, line = BROKEN[name]
    path = write_rows(text, "rows.json")
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    verdicts = set()
    for chunk_bytes in (*range(1, len(text) + 2), 1 << 18):
        with pytest.raises(DataError) as error:
            rows_of(path, chunk_bytes=chunk_bytes)
        verdicts.add(str(error.value))
    (verdict,) = verdicts
    assert verdict.startswith(f"{path}:{line}: not valid JSON: ")
    assert "\n" not in verdict


def test_json_array_broken_far_from_its_end_is_refused_without_reading_on():
    def pieces():
        yield '[{"a": 1}, {"a" 2}' + " " * MARGIN
        raise AssertionError("read on")

    window = TextWindow("x.json", pieces())
    window.next_character()
    window.advance(1)
    window.value(RowDecoder())
    window.advance(window.text.index(", {") + 2)
    with pytest.raises(DataError, match=r"x\.json:1: not valid JSON: Expecting ':'.*column 17"):
        window.value(RowDecoder())


@pytest.mark.parametrize("chunk_bytes", [*range(1, 20), 1 << 18])
def test_json_array_with_a_latin1_byte_names_line_and_column(chunk_bytes, write_rows):
    path = write_rows(b'[{"a": "\xc3\xa9"},\n{"\xc3\xa9": "caf\xe9"}]', "rows.json")
    with pytest.raises(
        DataError, match=r"rows\.json:2: must be UTF-8, has byte 0xE9 at column 12;"
    ):
        rows_of(path, chunk_bytes=chunk_bytes)


def test_json_array_that_ends_within_a_character_is_not_utf8(write_rows):
    path = write_rows('[{"a": "é'.encode()[:-1], "rows.json")
    with pytest.raises(DataError, match=r"rows\.json:1: must be UTF-8, has byte 0xC3 at column 9;"):
        rows_of(path, chunk_bytes=4)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 18])
def test_json_file_of_lines_is_read_as_jsonl(chunk_bytes, write_rows):
    text = '\n{"a": 1}\r\n\n{"a": 2\n{"a": NaN}\n17\n'
    rows, bad = rows_of(write_rows(text, "rows.json"), chunk_bytes=chunk_bytes)
    assert [line for _, line in rows] == [2, 5]
    assert [reason.split(": ")[0][-1] for reason in bad] == ["4", "6"]


@pytest.mark.parametrize("key", ["data", "rows", "train"])
def test_json_object_that_holds_the_rows_names_them_by_element(key, write_rows):
    path = write_rows(json.dumps({"version": 1, key: [{"a": 1}, 2, {"a": 3}]}), "rows.json")
    rows, bad = rows_of(path, chunk_bytes=5)
    assert rows == [({"a": 1}, 1), ({"a": 3}, 3)]
    assert bad == [f"{path}, {key} element 2: must be a JSON object, is int"]


def test_json_array_elements_that_are_no_objects_are_bad_rows(write_rows):
    path = write_rows('[{"a": 1},\n17, "x", [1],\nnull, NaN, true, {"a": 2}]', "rows.json")
    rows, bad = rows_of(path)
    assert [columns for columns, _ in rows] == [{"a": 1}, {"a": 2}]
    kinds = ["int", "str", "list", "null", "bool"]
    assert bad[:3] == [f"{path}:2: must be a JSON object, is {kind}" for kind in kinds[:3]]
    assert bad[3:] == [
        f"{path}:3: must be a JSON object, is null",
        f"{path}:3: NaN is not JSON; write a number, a string or null",
    ]


def test_json_nested_too_deeply_is_one_line(write_rows):
    deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    with pytest.raises(DataError, match=r"rows\.json:2: is nested too deeply"):
        rows_of(write_rows(f'[{{"a": 1}},\n{deep}]', "rows.json"))


def big_array(path, num_bytes):
    row = json.dumps({"prompt": "p" * 500, "completion": "c" * 500, "n": [1.5] * 20})
    with path.open("w") as stream:
        stream.write("[" + row)
        for _ in range(num_bytes // len(row)):
            stream.write("," + row)
        stream.write("]")


@pytest.mark.parametrize("is_gzip", [False, True])
def test_json_array_of_20_mb_is_read_in_a_fraction_of_its_size(is_gzip, tmp_path):
    path = tmp_path / "big.json"
    big_array(path, 20_000_000)
    size = path.stat().st_size
    if is_gzip:
        path = tmp_path / "big.json.gz"
        path.write_bytes(gzip.compress((tmp_path / "big.json").read_bytes(), 1))
    tracemalloc.start()
    try:
        file = DataFile(path, str(path))
        num_rows = sum(1 for _ in read_json(file, BadRows()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_rows > 15_000
    assert peak < size / 8


def test_json_array_row_larger_than_many_chunks_is_read(write_rows):
    row = {"text": "word " * 40_000, "end": 1}
    rows, _ = rows_of(write_rows(json.dumps([row, row]), "rows.json"), chunk_bytes=1000)
    assert [columns for columns, _ in rows] == [row, row]
