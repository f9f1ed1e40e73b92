"""Values that nothing can use: harmless in a column that the shape does not use, else a bad row."""

import json

import pytest

from trainers.data import DataError, count_tokens, prepare_data

GOOD = '"prompt": "a", "completion": "b"'
LONG = "1" * 5000
TOO_LONG = "holds an integer of 5000 digits; write it as a string"
# What a column holds, and the reason where it is used.
UNUSABLE = {
    "NaN": ('"x": NaN', "NaN is not JSON; write a number, a string or null"),
    "-Infinity": ('"x": [1, -Infinity]', "-Infinity is not JSON"),
    "long integer": ('"x": ' + LONG, TOO_LONG),
    "key twice": ('"x": 1, "x": 2', 'key "x" stands twice in one object; keep one'),
    "nested key twice": ('"x": {"y": [{"k": 1, "k": 2}]}', 'key "k" stands twice in one object'),
    "half a character": ('"x": ["\\ud83d"]', "has half a character (lone surrogate \\ud83d)"),
    "half a key": ('"x": {"\\uDE00": 1}', "has half a character (lone surrogate \\ude00)"),
}


def as_file(rows, kind):
    """JSON texts of rows as a file of a kind, each on a line of its own, the first on line 2."""
    if kind == "jsonl":
        return "\n" + "".join(f"{row}\n" for row in rows)
    return "[\n" + ",\n".join(rows) + "]"


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("name", UNUSABLE)
def test_unused_column_that_holds_it_changes_nothing(
    name, kind, spec_for, write_rows, train_all, model
):
    held, _ = UNUSABLE[name]
    odd, plain = "{" + GOOD + ", " + held + "}", "{" + GOOD + "}"
    first = write_rows(as_file([odd, plain, odd], kind), f"odd.{kind}")
    expected = train_all(spec_for(write_rows(as_file([plain] * 3, kind), f"plain.{kind}")))
    assert train_all(spec_for(first)) == expected
    assert count_tokens(first, model) == count_tokens(
        str(write_rows("\n".join([plain] * 3))), model
    )


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("name", UNUSABLE)
def test_used_column_that_holds_it_is_a_bad_row_with_line_and_reason(
    name, kind, spec_for, write_rows
):
    held, reason = UNUSABLE[name]
    bad = '{"prompt": "a", ' + held.replace('"x"', '"completion"') + "}"
    reason = reason.replace('"x"', '"completion"')
    path = write_rows(as_file(["{" + GOOD + "}", bad, "{" + GOOD + "}"], kind), f"rows.{kind}")
    with pytest.raises(DataError) as error:
        prepare_data(spec_for(path))
    assert str(error.value).startswith(f"{path}:3: {reason}")
    assert "\n" not in str(error.value)
    audit = prepare_data(spec_for(path, bad_rows="drop")).audit
    assert (audit.num_train_rows, audit.num_bad_rows) == (2, 1)


@pytest.mark.parametrize("name", UNUSABLE)
def test_message_that_holds_it_at_any_depth_is_a_bad_row(name, spec_for, write_rows):
    held, reason = UNUSABLE[name]
    turns = '{"role": "user", "content": "q", EXTRA}, {"role": "assistant", "content": "a"}'
    row = '{"messages": [' + turns.replace("EXTRA", held) + "]}"
    with pytest.raises(DataError) as error:
        prepare_data(spec_for(write_rows(row + "\n")))
    assert f"data.jsonl:1: {reason}" in str(error.value)


def test_first_row_that_is_bad_leaves_the_shape_to_be_found(spec_for, write_rows):
    turns = '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]'
    first = f'{{"conversations": {turns}, "conversations": {turns}}}'
    path = write_rows(f'{first}\n{{"conversations": {turns}}}\n')
    with pytest.raises(DataError, match=r':1: key "conversations" stands twice in one object'):
        prepare_data(spec_for(path))
    audit = prepare_data(spec_for(path, bad_rows="drop")).audit
    assert (audit.num_train_rows, audit.num_bad_rows) == (1, 1)


def test_first_rows_unused_conversations_column_does_not_decide_the_shape(spec_for, write_rows):
    path = write_rows("{" + GOOD + ', "conversations": NaN}\n')
    assert prepare_data(spec_for(path)).audit.num_train_rows == 1


def test_rows_under_a_key_that_stands_twice_are_refused_with_the_reason(spec_for, write_rows):
    row = "{" + GOOD + "}"
    path = write_rows(f'{{"data": [{row}], "data": [{row}]}}', "rows.json")
    with pytest.raises(DataError, match=r'rows\.json:1: .*key "data" stands twice') as error:
        prepare_data(spec_for(path))
    assert "\n" not in str(error.value)


def test_emoji_escaped_as_a_pair_is_the_character(spec_for, write_rows, train_all):
    row = {"prompt": "fox 🦊", "completion": "🦊"}
    escaped = train_all(spec_for(write_rows(json.dumps(row) + "\n", "escaped.jsonl")))
    plain = json.dumps(row, ensure_ascii=False)
    assert escaped == train_all(spec_for(write_rows(plain + "\n", "plain.jsonl")))


def test_escaped_backslash_before_u_is_text(spec_for, write_rows, train_all):
    row = {"prompt": "a", "completion": "\\ud83d"}
    path = write_rows([row])
    assert len(train_all(spec_for(path))) == 1


def test_column_names_of_any_kind_are_named_on_one_line(spec_for, write_rows):
    path = write_rows('{"a\\nb": 1, "\\ud83d": 2, "é": 3}\n')
    with pytest.raises(DataError, match=r"columns a\\nb, \\ud83d, é;") as error:
        prepare_data(spec_for(path))
    assert "\n" not in str(error.value)


def test_many_columns_are_named_up_to_a_number(spec_for, write_rows):
    path = write_rows([{f"c{i}": i for i in range(1000)}])
    with pytest.raises(DataError, match=r"c0, c1, .*, c19 and 980 more;"):
        prepare_data(spec_for(path))


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_csv_unused_columns_may_share_a_name_and_hold_anything(
    suffix, spec_for, write_rows, train_all
):
    mark = "," if suffix == "csv" else "\t"
    lines = [
        ["prompt", "completion", "", "x", "", "x"],
        ["a", "b", "NaN", '"two\nlines ""q"""', "\\ud83d", LONG],
    ]
    path = write_rows("\r\n".join(mark.join(line) for line in lines) + "\r\n", f"rows.{suffix}")
    plain = write_rows([{"prompt": "a", "completion": "b"}])
    assert train_all(spec_for(path)) == train_all(spec_for(plain))


def parquet_file(path, columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_parquet_unused_column_may_hold_anything(spec_for, tmp_path, train_all, write_rows):
    columns = {"prompt": ["a"], "completion": ["b"], "x": [float("nan")], "y": [b"\xff"]}
    path = parquet_file(tmp_path / "rows.parquet", columns)
    plain = write_rows([{"prompt": "a", "completion": "b"}])
    assert train_all(spec_for(path)) == train_all(spec_for(plain))


def test_parquet_nan_in_a_used_column_is_a_bad_row_and_never_the_text_nan(spec_for, tmp_path):
    columns = {"prompt": ["a", "a"], "completion": [1.5, float("nan")]}
    path = parquet_file(tmp_path / "rows.parquet", columns)
    with pytest.raises(DataError, match=r"rows\.parquet, row 2: is NaN \(a missing value"):
        prepare_data(spec_for(path))


def test_parquet_that_datasets_wrote_with_mixed_types_gives_the_ids_of_jsonl(
    spec_for, tmp_path, train_all, write_rows
):
    datasets = pytest.importorskip("datasets")
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "What is 1?"}]},
        {"role": "assistant", "content": "A number."},
    ]
    rows = [{"messages": turns}]
    path = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(path)
    assert train_all(spec_for(path)) == train_all(spec_for(write_rows(rows)))


def test_parquet_used_column_that_stands_twice_is_refused_and_an_unused_one_not(spec_for, tmp_path):
    import pyarrow
    import pyarrow.parquet

    def write(names):
        table = pyarrow.Table.from_arrays([pyarrow.array([name]) for name in names], names=names)
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        return str(tmp_path / "rows.parquet")

    path = write(["prompt", "completion", "x", "x"])
    assert prepare_data(spec_for(path)).audit.num_train_rows == 1
    with pytest.raises(DataError, match='column names must differ, "prompt" stands twice'):
        prepare_data(spec_for(write(["prompt", "completion", "prompt"])))


@pytest.mark.parametrize("name", UNUSABLE)
def test_json_text_in_a_csv_column_that_holds_it_is_a_bad_row(name, spec_for, write_rows):
    held, reason = UNUSABLE[name]
    turns = '[{"role": "user", "content": "q", EXTRA}, {"role": "assistant", "content": "a"}]'
    quoted = turns.replace("EXTRA", held).replace('"', '""')
    path = write_rows(f'messages\n"{quoted}"\n', "rows.csv")
    with pytest.raises(DataError) as error:
        prepare_data(spec_for(path))
    assert str(error.value).startswith(f"{path}:2: messages ")
    assert reason in str(error.value)
