"""Data files as people have them, and as nobody should: bytes of every kind that is read, for the fuzz tests."""

import gzip
import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st

from tests.fuzzing import BASE, PIECES, Ending, ended, mutated_bytes, rarely

COMMANDS = (
    ("check", "DATA"), ("check", "sweep.yaml"), ("plan", "sweep.yaml"), ("check", "DATA", "--show", "3"),
    ("check", "sweep.yaml", "--json"),
)  # fmt: skip
OPTIONS = (
    "", "eval: 0.3\n", "eval: 0.3\n", "bad_rows: drop\neval: 0.3\n",
    "bad_rows: drop\npacking: true\nseq_len: 64\n", "truncation: cut\nseq_len: 8\n",
    "chat_template: plain.jinja\nbad_rows: drop\n", "chat_template: tools.jinja\nbad_rows: drop\nsystem_role: fold\n",
    "columns: {prompt: question, completion: answer}\n", "format: text\n", "format: messages\nbad_rows: drop\n",
    "eval: DATA\n", "retention: DATA\n", "seq_len: 2\nbad_rows: drop\n",
)  # fmt: skip
TEMPLATES = {
    "plain.jinja": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "tools.jinja": "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}<|{{ m.role }}|>{{ m.content | trim }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
}


@dataclass(frozen=True)
class DataCase:
    """A command, some lines of sweep.yaml, and the data: one file, or those of a folder."""

    command: tuple[str, ...]
    options: str
    files: tuple[tuple[str, bytes], ...]

    def run(self, folder: Path) -> Ending:
        """Runs it in a folder that `fill` filled."""
        data = self.files[0][0].split("/")[0]
        try:
            for name, content in self.files:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
            config = f"model: base\ndata: {data}\n{self.options.replace('DATA', data)}"
            (folder / "sweep.yaml").write_text(config)
            return ended(folder, [data if word == "DATA" else word for word in self.command])
        finally:
            shutil.rmtree(folder / data) if (folder / data).is_dir() else (folder / data).unlink()


def fill(folder: Path) -> None:
    """Puts there what the cases name beside their data."""
    (folder / "base").symlink_to(BASE)
    (folder / "sweep.yaml").touch()
    for name, text in TEMPLATES.items():
        (folder / name).write_text(text)


# Values and rows.

TEXT = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", " ", "hello there", "\0", "\x1b[2J\x1b[31m", "a\nb\r\nc", "\u2028", "\u202eevil", "\ufeff", "🦊é",
            "</s>", "<s>",
         "<script>alert(1)</script>", "{{ x }}", "{% raw %}", "\ud800", "\udfff\ud800", "e\u0301", "\x85",
         "x" * 5000, "</think>",
         "<think>", "[1, 2]", '{"a": 1}', '[{"role": "user", "content": "x"}]', "=cmd()",
         "\U000f0000\U00100001", "<tool_call>"]
    ),
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(), st.integers(-(10**40), 10**40), st.floats(),
    st.sampled_from([0, 1, -0.0, 1e308, 5e-324, 2**63, 10**4000])
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(TEXT, NUMBERS, st.none(), st.booleans()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=10,
)
DEEP = st.sampled_from([50, 500, 5000]).map(lambda n: f"<deep {n}>")
"""Stands for a list so deep that json cannot write it."""
CALL = st.fixed_dictionaries(
    {"name": TEXT, "arguments": st.one_of(st.dictionaries(TEXT, VALUES, max_size=3), TEXT)}
)
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}),
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer", "function_call",
            "\x1b[2J", "x" * 3000])},
        optional={
            "content": VALUES, "name": TEXT, "weight": VALUES, "train": st.sampled_from([0, 1, True, None, 2]),
            "reasoning_content": VALUES, "tool_calls": st.one_of(VALUES, st.lists(CALL, max_size=2)),
            "function_call": CALL,
            "\x1b[1m": VALUES,
        },
    ),
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", "observation", "function_call",
        "me"]), "value": VALUES}),
)  # fmt: skip
TALK = st.lists(MESSAGE, min_size=1, max_size=5)
SHAPES: dict[str, Callable[[int], dict[str, Any]]] = {
    "text": lambda n: {"text": f"The {n}th text says little, as texts do."},
    "completion": lambda n: {"prompt": f"{n} plus one?", "completion": f" It is {n + 1}."},
    "question": lambda n: {"question": f"What is {n}?", "answer": f"{n}", "id": n},
    "messages": lambda n: {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"{n}?"},
            {"role": "assistant", "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": n}}}]},
            {"role": "tool", "name": "f", "content": f"{n}"},
            {"role": "assistant", "content": f"It is {n}."},
        ],
        "tools": [{"type": "function",
            "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}],
    },
    "talk": lambda n: {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]},
    "sharegpt": lambda n: {"conversations": [{"from": "human", "value": f"{n}?"},
        {"from": "gpt", "value": f"{n}!"}], "system": "s"},
    "alpaca": lambda n: {"instruction": f"Add one to {n}.", "input": "", "output": f"{n + 1}"},
    "pairs": lambda n: {"prompt": [{"role": "user", "content": f"{n}?"}],
        "completion": [{"role": "assistant", "content": "x"}]},
}  # fmt: skip
NUM_ROWS = 40


@st.composite
def rows(draw: st.DrawFn) -> list[Any]:
    """Good rows of a shape, of which some hold what they must not."""
    make = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    found: list[Any] = [
        make(n) for n in range(draw(st.sampled_from((NUM_ROWS, NUM_ROWS, 1, 2, 0))))
    ]
    for _ in range(draw(st.integers(0, 3)) if found else 0):
        at = draw(st.integers(0, len(found) - 1))
        found[at] = draw(
            st.one_of(_changed(found[at]), _changed(found[at]), VALUES, _other_shape())
        )
    return found


@st.composite
def _changed(draw: st.DrawFn, row: Any) -> Any:
    if not isinstance(row, dict) or not row:
        return row
    key = draw(st.sampled_from(sorted(row)))
    new = draw(st.one_of(VALUES, TALK, DEEP, st.lists(CALL, max_size=2)))
    kept = {k: v for k, v in row.items() if k != key or draw(st.booleans())}
    return kept | {draw(st.one_of(st.just(key), st.just(key), TEXT)): new}


@st.composite
def _other_shape(draw: st.DrawFn) -> dict[str, Any]:
    return SHAPES[draw(st.sampled_from(sorted(SHAPES)))](0)


# Files.


def _json(value: Any, *, ascii_only: bool = True) -> str:
    text = json.dumps(value, ensure_ascii=ascii_only)
    for depth in (50, 500, 5000):
        text = text.replace(f'"<deep {depth}>"', "[" * depth + "]" * depth)
    return text


def _encoded(text: str, encoding: str = "utf-8") -> bytes:
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


def _lines(values: list[Any], **how: Any) -> str:
    return "".join(_json(value, **how) + "\n" for value in values)


def _table(values: list[Any], delimiter: str = ",") -> str:
    import csv

    names = list(
        dict.fromkeys(key for value in values if isinstance(value, dict) for key in value)
    ) or ["text"]
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerow(names)
    for value in values:
        held = value if isinstance(value, dict) else {names[0]: value}
        cells = (held.get(name, "") for name in names)
        writer.writerow([c if isinstance(c, str) else _json(c) for c in cells])
    return stream.getvalue()


TEXT_FILES: dict[str, Callable[[list[Any]], bytes]] = {
    "data.jsonl": lambda v: _encoded(_lines(v)),
    "raw.jsonl": lambda v: _encoded(_lines(v, ascii_only=False)),
    "data.ndjson": lambda v: _encoded(_lines(v)),
    "list.json": lambda v: _encoded(_json(v)),
    "object.json": lambda v: _encoded(_json({"version": 1, "data": v})),
    "lines.json": lambda v: _encoded(_lines(v)),
    "data.csv": lambda v: _encoded(_table(v)),
    "data.tsv": lambda v: _encoded(_table(v, "\t")),
    "data.jsonl.gz": lambda v: gzip.compress(_encoded(_lines(v)), mtime=0),
    "bom.jsonl": lambda v: b"\xef\xbb\xbf" + _encoded(_lines(v)),
    "crlf.csv": lambda v: _encoded(_table(v).replace("\n", "\r\n")),
    "latin.jsonl": lambda v: _encoded(_lines(v, ascii_only=False), "latin-1"),
    "utf16.json": lambda v: _encoded(_json(v), "utf-16"),
    "cr.jsonl": lambda v: _encoded(_lines(v).replace("\n", "\r")),
    "odd name é.jsonl": lambda v: _encoded(_lines(v)),
}
ODD_FILES = (
    b"", b"\n", b"\0", b"{", b"[", b"[]", b"{}", b"null", b"5", b'"', b"[1,", b"[[", b'{"data": [',
    b'{"data": {}}', b"\xef\xbb\xbf",
    b"\x1f\x8b", b"\x1f\x8b\x08\x00", b"PAR1", b"PAR1PAR1", b"PK\x03\x04", b"{}\n" * 30, b"[" * 100_000,
    b'{"a":' * 5000,
    b'{"text": ' + b"9" * 5000 + b"}\n", b'{"text": 1e999999}\n', b'{"text": NaN}\n', b'{"text": "\\ud800"}\n',
    b"prompt,completion\n",
    b'prompt,completion\n"a\n', b"a,a\n1,2\n", b",\n,\n", b'{"text": "a", "text": "b"}\n',
    b"text\n" + b"x" * 300_000 + b"\n",
    b'{"prompt": "a", "completion": "b"}\n' * 3 + b"\xff\n",
)  # fmt: skip


@st.composite
def structured(draw: st.DrawFn) -> DataCase:
    """Rows with odd values, in a text file of any kind, or several in a folder."""
    command, options = draw(st.sampled_from(COMMANDS)), draw(st.sampled_from(OPTIONS))
    names = draw(st.lists(st.sampled_from(sorted(TEXT_FILES)), min_size=1, max_size=3, unique=True))
    if draw(rarely(5)):
        files = [(f"folder/{name}", TEXT_FILES[name](draw(rows()))) for name in names]
    elif draw(rarely(12)):
        files = [(names[0], draw(st.sampled_from(ODD_FILES)))]
    else:
        files = [(names[0], TEXT_FILES[names[0]](draw(rows())))]
    return DataCase(command, options, tuple(files))


@st.composite
def mutated(draw: st.DrawFn) -> DataCase:
    """A good file, damaged."""
    shape, name = draw(st.sampled_from(sorted(SHAPES))), draw(st.sampled_from(sorted(TEXT_FILES)))
    content = TEXT_FILES[name]([SHAPES[shape](n) for n in range(NUM_ROWS)])
    pieces = (
        *PIECES,
        b"\\ud800",
        b"\\u0000",
        b"NaN",
        b"1e999",
        b'"',
        b'""',
        b"}\n{",
        b"null",
        b"[[[[",
        b"9" * 5000,
    )
    return DataCase(
        draw(st.sampled_from(COMMANDS)),
        draw(st.sampled_from(OPTIONS)),
        ((name, draw(mutated_bytes(content, pieces))),),
    )


# Parquet.


def _arrow_columns() -> st.SearchStrategy[Any]:
    import pyarrow as pa

    n = NUM_ROWS
    text = [f"text {i}" for i in range(n)]
    odd = [
        pa.array([None] * n), pa.array([True, None] * (n // 2)), pa.array(range(n), pa.int8()),
        pa.array(range(n), pa.uint64()),
        pa.array([math.nan] * n), pa.array([math.inf, 1.0] * (n // 2), pa.float32()),
        pa.array([1.0] * n, pa.float16()),
        pa.array([b"\xff\xfe"] * n), pa.array([b"abcd"] * n, pa.binary(4)), pa.array(text).dictionary_encode(),
        pa.array([10**13] * n, pa.timestamp("s")), pa.array([2**62] * n, pa.timestamp("us")),
        pa.array([-(2**62)] * n, pa.timestamp("ns")),
        pa.array([1] * n, pa.date32()), pa.array([86_400_000 * 10**7] * n, pa.date64()),
        pa.array([5] * n, pa.time64("ns")), pa.array([2**62] * n, pa.duration("us")),
        pa.array([1] * n, pa.decimal128(5, 2)), pa.array([[1, None], None] * (n // 2)),
        pa.array([[("k", 1)], []] * (n // 2), pa.map_(pa.string(), pa.int64())),
        pa.array([{"a": 1, "b": None}] * n),
        pa.array([[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]] * n),
        pa.array([[{"role": "user", "content": None}, None]] * n), pa.array([[[["x"]]]] * n),
        pa.array(text, pa.large_string()),
        pa.array([[1.0, 2.0]] * n, pa.list_(pa.float32(), 2)), pa.array(["a\0b", "\x1b[2J"] * (n // 2)),
        _bad_strings(n),
        pa.array(["x" * 5000, ""] * (n // 2)), pa.array([None, "x"] * (n // 2)),
        pa.array([10**3] * n, pa.timestamp("us", tz="Mars/Phobos")),
        pa.array([[{"from": "human", "value": {"x": 1}}]] * n),
    ]  # fmt: skip
    return st.one_of(st.just(pa.array(text)), st.sampled_from(odd))


def _bad_strings(n: int) -> Any:
    """A column of text whose bytes are no UTF-8."""
    import pyarrow as pa

    binary = pa.array([b"\xff\xfe"] * n)
    return pa.Array.from_buffers(pa.string(), n, binary.buffers())


@st.composite
def parquet(draw: st.DrawFn) -> DataCase:
    """A parquet file of columns of any type; or a damaged one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = draw(st.sampled_from([
        ["text"], ["prompt", "completion"], ["messages"], ["messages", "tools"], ["conversations", "system"],
        ["instruction", "input", "output"], ["question", "answer"], ["text", "text"],
        ["prompt", "completion", "\x1b[2J", ""], ["other"],
    ]))  # fmt: skip
    columns = [draw(_arrow_columns()) for _ in names]
    if draw(rarely(3)):
        make = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
        made = pa.Table.from_pylist([make(i) for i in range(NUM_ROWS)])
    else:
        made = pa.Table.from_arrays(columns, names=names)
    stream = io.BytesIO()
    pq.write_table(
        made,
        stream,
        row_group_size=draw(st.sampled_from([5, 100])),
        compression=draw(st.sampled_from(["snappy", "none", "zstd"])),
    )
    content = stream.getvalue()
    if draw(st.booleans()):
        content = draw(
            mutated_bytes(
                content, (b"\0", b"\xff", b"PAR1", b"\x15\x04", b"\xff" * 8, b"\x00" * 16)
            )
        )
    return DataCase(
        draw(st.sampled_from(COMMANDS)),
        draw(st.sampled_from(OPTIONS)),
        (("data.parquet", content),),
    )
