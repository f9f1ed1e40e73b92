"""Reading files: what is accepted, what is refused, and with which line."""

import gzip
import json

import pytest

from trainers.data import DataError, DataSpec, count_tokens, prepare_data

ROWS = [
    {"prompt": "What is 1? ", "completion": "1 is a number.\nIt is small."},
    {"prompt": "Où est “Paris”? ", "completion": "En France, évidemment 🦊"},
    {"prompt": "a, b", "completion": 'quoted "text"'},
]


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows):
    quoted = [['"' + value.replace('"', '""') + '"' for value in row.values()] for row in rows]
    return "prompt,completion\n" + "".join(",".join(row) + "\n" for row in quoted)


def parquet_bytes(rows):
    import io

    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


VARIANTS = {
    "rows.jsonl": lambda: as_lines(ROWS).encode(),
    "bom.jsonl": lambda: b"\xef\xbb\xbf" + as_lines(ROWS).encode(),
    "crlf.jsonl": lambda: as_lines(ROWS).replace("\n", "\r\n").encode(),
    "blank_lines.jsonl": lambda: ("\n" + as_lines(ROWS).replace("\n", "\n\n")).encode(),
    "packed.jsonl.gz": lambda: gzip.compress(as_lines(ROWS).encode()),
    "escaped.jsonl": lambda: "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "array.json": lambda: json.dumps(ROWS, indent=1).encode(),
    "lines.json": lambda: as_lines(ROWS).encode(),
    "object.json": lambda: json.dumps({"version": 1, "data": ROWS}).encode(),
    "rows.csv": lambda: as_csv(ROWS).encode(),
    "bom.csv": lambda: b"\xef\xbb\xbf" + as_csv(ROWS).encode(),
    "rows.csv.gz": lambda: gzip.compress(as_csv(ROWS).encode()),
    "rows.parquet": lambda: parquet_bytes(ROWS),
}


@pytest.fixture
def plain_hash(spec_for, write_rows):
    return prepare_data(spec_for(write_rows(as_lines(ROWS), "plain.jsonl"))).train.content_hash


@pytest.mark.parametrize("name", VARIANTS)
def test_prepare_same_rows_in_every_kind_of_file_give_identical_ids(
    name, plain_hash, spec_for, write_rows, model
):
    path = write_rows(VARIANTS[name](), name)
    assert prepare_data(spec_for(path)).train.content_hash == plain_hash
    assert count_tokens(path, model) == count_tokens(write_rows(as_lines(ROWS), "p.jsonl"), model)


def test_prepare_folder_reads_its_files_in_name_order(plain_hash, spec_for, write_rows, tmp_path):
    (tmp_path / "folder").mkdir()
    write_rows(ROWS[1:], "folder/b.jsonl")
    write_rows(ROWS[:1], "folder/a.jsonl")
    (tmp_path / "folder" / "README.md").write_text("not data")
    assert prepare_data(spec_for(str(tmp_path / "folder"))).train.content_hash == plain_hash


def test_prepare_folder_with_splits_reads_train_and_names_the_rest(
    plain_hash, spec_for, write_rows, tmp_path
):
    (tmp_path / "folder").mkdir()
    write_rows(ROWS, "folder/train-00000.jsonl")
    write_rows(ROWS, "folder/test-00000.jsonl")
    prepared = prepare_data(spec_for(str(tmp_path / "folder")))
    assert prepared.train.content_hash == plain_hash
    assert prepared.audit.notes == ("not read, as they belong to other splits: test-00000.jsonl",)


def test_prepare_saved_dataset_gives_identical_ids(plain_hash, spec_for, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert prepare_data(spec_for(str(tmp_path / "saved"))).train.content_hash == plain_hash


def test_load_hub_local_repository_layout_gives_its_train_rows(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    from trainers.sources import read_hub

    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "train-00000-of-00001.parquet").write_bytes(parquet_bytes(ROWS))
    (tmp_path / "repo" / "test-00000-of-00001.parquet").write_bytes(parquet_bytes(ROWS[:1]))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    assert [record.columns for record in read_hub(str(tmp_path / "repo"))] == ROWS


def cut_row(n):
    return as_lines(ROWS[:1]).encode() + b'{"prompt": "a", "comp' + b"\n" * n


REFUSED = {
    "cut.jsonl": (cut_row(1), "cut.jsonl:2: not valid JSON"),
    "end.jsonl": (cut_row(0), "end.jsonl:2: not valid JSON"),
    "cut.json": (b'[\n{"prompt": "a", "completion": "b"},\n{"prompt": "a', "cut.json:3: not valid"),
    "open.json": (b'[\n{"prompt": "a", "completion": "b"}\n', "open.json:3: not valid JSON"),
    "utf16.jsonl": (as_lines(ROWS).encode("utf-16"), "utf16.jsonl:1: must be UTF-8"),
    "utf16le.jsonl": (as_lines(ROWS).encode("utf-16-le"), "utf16le.jsonl:1: must be UTF-8"),
    "latin1.jsonl": (
        b'{"prompt": "a", "completion": "b"}\n{"prompt": "caf\xe9", "completion": "b"}\n',
        "latin1.jsonl:2: must be UTF-8, has byte 0xE9 at column 16",
    ),
    "latin1.json": (
        b'[\n{"prompt": "caf\xe9", "completion": "b"}]',
        "latin1.json:2: must be UTF-8",
    ),
    "latin1.csv": (b"prompt,completion\na,b\ncaf\xe9,b\n", "latin1.csv:3: must be UTF-8"),
    "empty.jsonl": (b"", "empty.jsonl: must hold rows, is empty (0 bytes)"),
    "empty.json": (b"", "empty.json: must hold rows, is empty (0 bytes)"),
    "empty.csv": (b"", "empty.csv: must hold rows, is empty (0 bytes)"),
    "blank.jsonl": (b"\n\n", "blank.jsonl: must hold rows"),
    "no_rows.json": (b"[]", "no_rows.json: must hold rows"),
    "surrogate.jsonl": (
        b'{"prompt": "a", "completion": "\\ud83d"}\n',
        "surrogate.jsonl:1: has half a character (lone surrogate \\ud83d)",
    ),
    "twice.jsonl": (
        b'{"prompt":"a","completion":"1","completion":"2"}\n',
        'twice.jsonl:1: key "completion" stands twice',
    ),
    "twice.json": (b'[{"prompt":"a",\n"completion":"1","completion":"2"}]', "twice.json:1: key"),
    "scalar.jsonl": (b"17\n", "scalar.jsonl:1: must be a JSON object, is"),
    "nan.jsonl": (b'{"prompt":"a","completion":NaN}\n', "nan.jsonl:1: NaN is not JSON"),
    "fields.csv": (b"prompt,completion\na\n", "fields.csv:2: must have 2 fields"),
    "quote.csv": (b'prompt,completion\n"a,b\n', "quote.csv:2: not valid CSV"),
    "names.csv": (b"prompt,prompt\na,b\n", "names.csv:1: column names must differ"),
    "broken.parquet": (b"PAR1 nothing", "broken.parquet: not a readable parquet file"),
    "cut.jsonl.gz": (
        gzip.compress(as_lines(ROWS).encode())[:-12],
        "cut.jsonl.gz: not a whole gzip",
    ),
    "rows.txt": (b"some text", "rows.txt: data must be jsonl, json, csv"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_prepare_and_count_unusable_file_give_one_line_with_the_place(
    name, spec_for, write_rows, model, cache_folder
):
    content, expected = REFUSED[name]
    path = write_rows(content, name)
    with pytest.raises(DataError) as prepared:
        prepare_data(spec_for(path))
    with pytest.raises(DataError) as counted:
        count_tokens(path, model)
    assert expected in str(prepared.value)
    assert str(prepared.value) == str(counted.value)
    assert "\n" not in str(prepared.value)
    assert not (cache_folder / "sets").exists()


def test_prepare_missing_file_says_what_data_must_be(spec_for, tmp_path):
    with pytest.raises(DataError, match=r"must be a file, a folder or a hub id.*absent\.jsonl"):
        prepare_data(spec_for(str(tmp_path / "absent.jsonl")))


def test_prepare_many_bad_rows_names_five_and_the_total(spec_for, write_rows):
    path = write_rows("{}x\n" * 3 + '{"prompt": "a", "completion": "b"}\n' + "oops\n" * 4)
    with pytest.raises(DataError, match=r"^7 bad rows: .*data\.jsonl:1: .*and 2 more$") as error:
        prepare_data(spec_for(path))
    assert str(error.value).count("data.jsonl:") == 5


def test_prepare_bad_rows_dropped_are_counted_and_named(spec_for, write_rows):
    path = write_rows('{"prompt": "a", "completion": "b"}\noops\n')
    audit = prepare_data(spec_for(path, bad_rows="drop")).audit
    assert (audit.num_train_rows, audit.num_bad_rows) == (1, 1)
    assert audit.bad_rows[0].startswith(path + ":2: not valid JSON")


def test_csv_quoted_field_over_two_lines_is_named_by_its_first_line(spec_for, write_rows):
    path = write_rows('prompt,completion\n"a\nb",c\nonly one\n', "rows.csv")
    with pytest.raises(DataError, match=r"rows\.csv:4: must have 2 fields"):
        prepare_data(spec_for(path))


def test_parquet_column_nobody_uses_is_not_read(spec_for, write_rows, train_all):
    rows = [{**row, "picture": b"\xff\xfe\x00", "when": 3.5} for row in ROWS]
    assert len(train_all(spec_for(write_rows(parquet_bytes(rows), "rows.parquet")))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len .* must be >= 2, got 1"),
        ({"truncation": "wrap"}, "truncation must be one of drop, cut, got 'wrap'"),
        ({"eval": 0.0}, "eval must be a fraction between 0 and 1"),
        ({"eval": 1.5}, "eval must be a fraction between 0 and 1"),
        ({"format": "chatty"}, "format must be one of .*, got 'chatty'"),
        ({"columns": {"promt": "q"}}, "columns must map roles .* got role 'promt'"),
        ({"bad_rows": "skip"}, "bad_rows must be one of error, drop"),
    ],
)
def test_data_spec_value_out_of_range_is_refused(options, message):
    with pytest.raises(DataError, match=message):
        DataSpec(data="x.jsonl", **options)
