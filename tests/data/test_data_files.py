"""Reading files: what is accepted, what is refused, and with which line."""

import errno
import gzip
import json
import os

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


def parquet_bytes(rows, num_rows=None):
    import io

    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows).slice(0, num_rows)
    pyarrow.parquet.write_table(table, buffer)
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


def test_prepare_folder_reads_nested_folders_and_mixed_kinds_by_path(
    plain_hash, spec_for, write_rows, tmp_path
):
    for folder in ("rows/a/deep", "rows/b", "rows/.git", "rows/_cache"):
        (tmp_path / folder).mkdir(parents=True)
    write_rows(as_lines(ROWS[:1]), "rows/a/deep/é 1.jsonl")
    write_rows(json.dumps(ROWS[1:2]), "rows/b/1.json")
    write_rows(parquet_bytes(ROWS[2:]), "rows/b/2.PARQUET")
    for hidden in ("rows/.git/x.jsonl", "rows/_cache/x.jsonl", "rows/b/.x.jsonl", "rows/b/_x.csv"):
        write_rows(as_lines(ROWS), hidden)
    write_rows("{}", "rows/dataset_info.json")
    assert prepare_data(spec_for(str(tmp_path / "rows"))).train.content_hash == plain_hash


def test_prepare_folder_of_mixed_shapes_finds_the_shape_of_each_file(
    spec_for, write_rows, tmp_path
):
    (tmp_path / "rows").mkdir()
    write_rows(as_lines(ROWS), "rows/a.jsonl")
    write_rows([{"text": "one"}, {"text": "two"}], "rows/b.jsonl")
    write_rows("question,answer\nq,a\n", "rows/c.csv")
    audit = prepare_data(spec_for(str(tmp_path / "rows"))).audit
    assert audit.shapes == {
        "completion": 4,
        "text": 2,
        "completion (answer -> completion, question -> prompt)": 1,
    }


def test_prepare_folder_with_a_packed_file_that_is_not_read_refuses(spec_for, write_rows, tmp_path):
    (tmp_path / "rows").mkdir()
    write_rows(as_lines(ROWS), "rows/a.jsonl")
    write_rows(b"x", "rows/b.jsonl.zst")
    with pytest.raises(DataError, match=r"b\.jsonl\.zst: data must be .*; unpack it"):
        prepare_data(spec_for(str(tmp_path / "rows")))


def test_prepare_folder_with_a_link_to_nothing_refuses(spec_for, write_rows, tmp_path):
    (tmp_path / "rows").mkdir()
    write_rows(as_lines(ROWS), "rows/a.jsonl")
    (tmp_path / "rows" / "b.jsonl").symlink_to(tmp_path / "absent")
    with pytest.raises(DataError, match=r"b\.jsonl: must be a file, is a link to nothing$"):
        prepare_data(spec_for(str(tmp_path / "rows")))


@pytest.mark.parametrize(
    ("name", "found"), [("notes.txt", ", only notes.txt$"), (".hidden.jsonl", "rows$")]
)
def test_prepare_folder_without_data_names_what_is_there(
    name, found, spec_for, write_rows, tmp_path
):
    (tmp_path / "rows").mkdir()
    write_rows("x", f"rows/{name}")
    with pytest.raises(
        DataError, match=f"a data folder must hold jsonl, .*found none in .*{found}"
    ):
        prepare_data(spec_for(str(tmp_path / "rows")))


def test_prepare_named_pipe_says_what_is_wrong(spec_for, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl: must be a file, is a pipe or device"):
        prepare_data(spec_for(str(tmp_path / "pipe.jsonl")))


def test_prepare_folder_that_may_not_be_listed_is_one_line(spec_for, tmp_path, monkeypatch):
    (tmp_path / "rows" / "locked").mkdir(parents=True)
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("locked"):  # root, whom tests may run as, may list everything
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", locked)
    with pytest.raises(DataError, match=r"data cannot be read: .*locked: Permission denied$"):
        prepare_data(spec_for(str(tmp_path / "rows")))


def test_prepare_name_too_long_for_a_file_is_one_line(spec_for):
    with pytest.raises(DataError, match=r"data cannot be read: x+: File name too long$"):
        prepare_data(spec_for("x" * 300))


def test_prepare_saved_dataset_without_train_names_its_splits(spec_for, tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {"test": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="must have a train split, has test; give the"):
        prepare_data(spec_for(str(tmp_path / "saved")))


def test_prepare_saved_dataset_gives_identical_ids(plain_hash, spec_for, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert prepare_data(spec_for(str(tmp_path / "saved"))).train.content_hash == plain_hash


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
    "not_gzip.jsonl.gz": (
        as_lines(ROWS).encode(),
        "not_gzip.jsonl.gz: not a whole gzip file: Not a",
    ),
    "cut.json.gz": (
        gzip.compress(json.dumps(ROWS).encode())[:-12],
        "cut.json.gz: not a whole gzip",
    ),
    "cut.csv.gz": (gzip.compress(as_csv(ROWS).encode())[:-4], "cut.csv.gz: not a whole gzip"),
    "damaged.jsonl.gz": (
        gzip.compress(as_lines(ROWS).encode())[:12] + b"\xff" * 40,
        "damaged.jsonl.gz: not a whole gzip file",
    ),
    "cut.csv": (b'prompt,completion\na,b\n"c,d\n', "cut.csv:3: not valid CSV"),
    "cut.tsv": (b"prompt\tcompletion\na\tb\nc", "cut.tsv:3: must have 2 fields"),
    "utf16.csv": (as_csv(ROWS).encode("utf-16"), "utf16.csv:1: must be UTF-8"),
    "utf16le.csv": (as_csv(ROWS).encode("utf-16-le"), "utf16le.csv:1: must be UTF-8"),
    "utf16.json": (json.dumps(ROWS).encode("utf-16"), "utf16.json:1: must be UTF-8"),
    "utf16be.json": (json.dumps(ROWS).encode("utf-16-be"), "utf16be.json:1: must be UTF-8"),
    "utf16.csv.gz": (gzip.compress(as_csv(ROWS).encode("utf-16")), "utf16.csv.gz:1: must be UTF-8"),
    "latin1.tsv": (b"prompt\tcompletion\ncaf\xe9\tb\n", "latin1.tsv:2: must be UTF-8"),
    "latin1.csv.gz": (
        gzip.compress(b"prompt,completion\n\xe9,b\n"),
        "latin1.csv.gz:2: must be UTF",
    ),
    "empty.tsv": (b"", "empty.tsv: must hold rows, is empty (0 bytes)"),
    "empty.parquet": (b"", "empty.parquet: must hold rows, is empty (0 bytes)"),
    "empty.jsonl.gz": (b"", "empty.jsonl.gz: must hold rows, is empty (0 bytes)"),
    "packed_nothing.jsonl.gz": (gzip.compress(b""), "packed_nothing.jsonl.gz: must hold rows"),
    "packed_nothing.json.gz": (gzip.compress(b""), "packed_nothing.json.gz: must hold rows"),
    "blank.json": (b" \r\n\n", "blank.json: must hold rows, is blank"),
    "blank.csv": (b"\n\n", "blank.csv:1: must begin with a header line"),
    "commas.csv": (b",,\n", "commas.csv:1: must begin with a header line"),
    "header.csv": (b"prompt,completion\n", "header.csv: must hold rows"),
    "header.tsv": (b"prompt\tcompletion", "header.tsv: must hold rows"),
    "no_rows.parquet": (parquet_bytes([{"prompt": "a"}], 0), "no_rows.parquet: must hold rows"),
    "surrogate.json": (
        b'[\n{"prompt": "a", "completion": "\\udc00"}]',
        "surrogate.json:2: has half a character (lone surrogate \\udc00)",
    ),
    "surrogate.jsonl.gz": (
        gzip.compress(b'{"prompt": "\\ud83d", "completion": "b"}'),
        "surrogate.jsonl.gz:1: has half a character",
    ),
    "quoted.csv": (b'prompt,completion\n"a"b,c\n', "quoted.csv:2: not valid CSV"),
    "old_mac.csv": (b"prompt,completion\ra,b\r", "old_mac.csv:1: not valid CSV"),
    "damaged.parquet": (
        parquet_bytes(ROWS)[:40] + b"\0" * 40 + parquet_bytes(ROWS)[80:],
        "damaged.parquet: not a readable parquet file",
    ),
    # Under a wrong name
    "gzip.jsonl": (gzip.compress(as_lines(ROWS).encode()), "gzip.jsonl: is gzip; let its name end"),
    "parquet.json": (parquet_bytes(ROWS), "parquet.json: is parquet; let its name end in"),
    "zip.csv": (b"PK\x03\x04" + b"x" * 40, "zip.csv: is a zip archive (or Excel)"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha", "git lfs pull"),
    "text.parquet": (as_lines(ROWS).encode(), "text.parquet: not a readable parquet file"),
    # Kinds that are not read
    "rows.txt": (b"some text", "rows.txt: data must be jsonl, json, csv, tsv (each also .gz) or"),
    "note.txt": (b"some text", 'write it as jsonl, {"text": ...} a line'),
    "rows.jsonl.zst": (b"x", "unpack it, or pack it with gzip"),
    "rows.jsonl.xz": (b"x", "unpack it, or pack it with gzip"),
    "rows.zip": (b"x", "unpack it and give the folder"),
    "rows.arrow": (b"x", "give the folder that save_to_disk wrote, or write it as parquet"),
    "rows.parquet.gz": (b"x", "parquet is packed within; unpack the gzip"),
    "rows": (b"x", "rename or convert it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_prepare_and_count_unusable_file_give_one_line_with_the_place(
    name, spec_for, write_rows, model
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
