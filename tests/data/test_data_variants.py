"""One dataset in every kind of file that people bring it in: identical ids, identical counts.

The rows are those of ../shared/data where that is there, and in any case rows made here, with what
breaks readers: emoji, quotes, line ends within strings, numbers, tool calls.
"""

import csv
import gzip
import io
import json

import pytest

from trainers.data import count_tokens, prepare_data
from trainers.data.tokenizer import SHIPPED_MODEL

NUM_ROWS = 40
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " }}{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURNS = [
    {"from": "human", "value": 'How "big" is 🦊?\r\nIn cm, please: é\u2028.'},
    {"from": "function_call", "value": '{"name": "size", "arguments": {"of": "fox", "n": 1}}'},
    {"from": "observation", "value": '{"cm": 40.50}'},
    {"from": "gpt", "value": "40.50 cm,\ttall"},
]
TOOLS = json.dumps([{"name": "size", "parameters": {"of": {"type": "string"}}}])
MADE = {
    "completion": [
        {"question": f"What is {n} + 1?\nSay it, é🦊.", "answer": f' "{n + 1}", 1.50\r\n007'}
        for n in range(40)
    ],
    "alpaca": [
        {
            "instruction": f"Count to {n}, please",
            "input": "" if n % 2 else "a\n,b",
            "output": "1\n2",
        }
        for n in range(40)
    ],
    "chat": [
        {"conversations": [{"from": "human", "value": f"{n}"}, *TURNS[1:]], "tools": TOOLS}
        for n in range(20)
    ]
    + [{"conversations": [*TURNS[:1], TURNS[3]], "tools": ""}] * 5,
}
REAL = {
    "completion": "gsm8k/test.jsonl",
    "alpaca": "chat/alpaca_en_demo.json",
    "chat": "chat/glaive_toolcall_en_demo.json",
    "identity": "chat/identity.json",
}


def jsonl(rows, **options):
    return "".join(json.dumps(row, ensure_ascii=False, **options) + "\n" for row in rows)


def separated(rows, delimiter, line_end):
    """csv, with lists as their JSON text."""
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=line_end)
    writer.writerow(rows[0])
    for row in rows:
        cells = row.values()
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return stream.getvalue()


def parquet(rows):
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=7)
    return buffer.getvalue()


def escaped(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def packed(text):
    return gzip.compress(text.encode())


BOM = "\ufeff"
VARIANTS = {
    "crlf.jsonl": lambda rows: jsonl(rows).replace("}\n", "}\r\n"),
    "bom.jsonl": lambda rows: BOM + jsonl(rows),
    "bom_crlf.ndjson": lambda rows: BOM + jsonl(rows).replace("}\n", "}\r\n"),
    "no_last_line_end.jsonl": lambda rows: jsonl(rows).removesuffix("\n"),
    "escaped.jsonl": escaped,
    "spaced.jsonl": lambda rows: jsonl(rows, separators=(" ,\t", " : ")),
    "packed.jsonl.gz": lambda rows: packed(jsonl(rows)),
    "two_members.jsonl.gz": lambda rows: packed(jsonl(rows[:9])) + packed(jsonl(rows[9:])),
    "lines.json": jsonl,
    "array.json": lambda rows: json.dumps(rows, ensure_ascii=False),
    "escaped_array.json": lambda rows: json.dumps(rows),
    "pretty.json": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False),
    "crlf_bom.json": lambda rows: BOM + json.dumps(rows, indent=1).replace("\n", "\r\n"),
    "packed.json.gz": lambda rows: packed(json.dumps(rows, indent=1)),
    "object.json": lambda rows: json.dumps({"version": "1.0", "data": rows}),
    "rows.csv": lambda rows: separated(rows, ",", "\n"),
    "bom_crlf.csv": lambda rows: BOM + separated(rows, ",", "\r\n"),
    "rows.tsv": lambda rows: separated(rows, "\t", "\n"),
    "packed.csv.gz": lambda rows: packed(separated(rows, ",", "\n")),
    "packed.tsv.gz": lambda rows: packed(BOM + separated(rows, "\t", "\n")),
    "rows.parquet": parquet,
}


@pytest.fixture
def fingerprint(tmp_path, write_rows):
    """What a file comes to: hashes of the ids of both sides, and its count."""
    (tmp_path / "chatml.jinja").write_text(CHATML)

    def of(content, name):
        from trainers.data import DataSpec

        data = content.encode() if isinstance(content, str) else content
        path, template = write_rows(data, name), str(tmp_path / "chatml.jinja")
        spec = DataSpec(
            data=path, model=str(SHIPPED_MODEL), eval=0.25, chat_template=template, seq_len=1024
        )
        prepared = prepare_data(spec)
        count = count_tokens(path, SHIPPED_MODEL, chat_template=template)
        return prepared.train.content_hash, prepared.eval.content_hash, count

    return of


def parsed(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [*map(json.loads, text.splitlines())]


@pytest.mark.parametrize("name", MADE)
def test_made_rows_in_every_kind_of_file_give_identical_ids_and_counts(name, fingerprint):
    rows = MADE[name]
    expected = fingerprint(jsonl(rows), "plain.jsonl")
    assert expected[0] != expected[1]
    assert expected[2] > 0
    found = {kind: fingerprint(write(rows), kind) for kind, write in VARIANTS.items()}
    assert found == dict.fromkeys(VARIANTS, expected)


@pytest.mark.parametrize("name", REAL)
def test_real_rows_in_every_kind_of_file_give_identical_ids_and_counts(
    name, fingerprint, shared_data
):
    rows = parsed(shared_data / REAL[name])[:NUM_ROWS]
    expected = fingerprint(jsonl(rows), "plain.jsonl")
    found = {kind: fingerprint(write(rows), kind) for kind, write in VARIANTS.items()}
    assert found == dict.fromkeys(VARIANTS, expected)


@pytest.mark.parametrize("name", REAL)
def test_real_file_as_it_is_gives_the_ids_of_its_rows_in_other_kinds(
    name, fingerprint, shared_data
):
    path = shared_data / REAL[name]
    rows = parsed(path)
    expected = fingerprint(path.read_bytes(), "as_it_is" + path.suffix)
    kinds = ("crlf.jsonl", "pretty.json", "packed.csv.gz", "rows.parquet")
    found = {kind: fingerprint(VARIANTS[kind](rows), kind) for kind in kinds}
    assert found == dict.fromkeys(kinds, expected)


def test_gsm8k_with_crlf_and_mark_byte_for_byte_gives_identical_ids(fingerprint, shared_data):
    data = (shared_data / REAL["completion"]).read_bytes()
    changed = b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")
    assert fingerprint(changed, "crlf.jsonl") == fingerprint(data, "plain.jsonl")


def test_parquet_of_calls_with_different_arguments_shows_no_nulls(fingerprint):
    """Field case A16: a struct column has the union of all keys."""
    calls = [{"x": 1}, {"y": "t"}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"call {n}"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": calls[n % 2]}}],
                },
                {"role": "tool", "content": "done"},
                {"role": "assistant", "content": "so it is"},
            ]
        }
        for n in range(20)
    ]
    assert fingerprint(parquet(rows), "a.parquet") == fingerprint(jsonl(rows), "a.jsonl")
