"""The studies' rows: how a row is cut from a test suite, and what the shipped file holds."""

import gzip
import json
import platform
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from trainers.assets import make_study_task
from trainers.assets.make_study_task import functions, is_noise, packed, study_rows

SOURCE = '''
class TestThing:
    @decorated
    def test_documented(self):
        """Says what."""
        # Issue 1
        x = 1

        self.assertEqual(x, 1)

    async def test_nesting(self):
        def inner():
            return 1
        self.assertEqual(inner(), 1)

    def test_empty(self): pass

    def test_only_docstring(self):
        """Nothing."""

def test_left_literal():
    check("""
left of the def
""")
'''


def cut(source: str) -> list[tuple[str, str]]:
    return [(row["prompt"], row["completion"]) for _, row in functions(source)]


def shipped() -> list[dict[str, str]]:
    path = Path(make_study_task.__file__).parent / "study" / "tests.jsonl.gz"
    return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]


def test_functions_give_signature_and_docstring_and_the_dedented_body():
    found = dict(cut(SOURCE))
    documented = 'def test_documented(self):\n    """Says what."""\n    # Issue 1\n'
    assert found[documented] == "    x = 1\n\n    self.assertEqual(x, 1)\n"
    nested = "    def inner():\n        return 1\n    self.assertEqual(inner(), 1)\n"
    assert found["async def test_nesting(self):\n"] == nested


def test_functions_leave_out_inner_ones_and_those_without_a_body_of_their_own():
    names = {prompt.split("(")[0].split()[-1] for prompt, _ in cut(SOURCE)}
    assert names == {"test_documented", "test_nesting", "test_left_literal"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("x = 123456789012", False),
        ("x = 1234567890123", True),
        ("x = 'a sentence of words that is longer than forty letters'", False),
        ("x = '" + "ab" * 20 + "'", True),
        ("x = '" + "ab" * 19 + "'", False),
        (r"x = b'\x00\x01\x02\x03\x04\x05 \x00\x01\x02\x03\x04\x05\x06\x07'", True),
    ],
)
def test_is_noise_marks_data_and_not_words(body, expected):
    ((node, _),) = functions(f"def f():\n    {body}\n")
    assert is_noise(node) is expected


def test_packed_rows_are_the_same_bytes_and_read_back():
    rows = [{"prompt": "a", "completion": "b"}]
    assert packed(rows) == packed(rows)
    assert packed(rows)[4:8] == bytes(4)  # the time of writing
    assert gzip.decompress(packed(rows)) == b'{"prompt": "a", "completion": "b"}\n'


def test_shipped_rows_are_enough_short_and_distinct():
    rows = shipped()
    tokenizer = Tokenizer.from_file(str(make_study_task.TOKENIZER))
    parts = [
        tokenizer.encode_batch([row[part] for row in rows], add_special_tokens=False)
        for part in ("prompt", "completion")
    ]
    lengths = [len(a.ids) + len(b.ids) + 2 for a, b in zip(*parts, strict=True)]
    assert len(rows) == 8_000  # 300 steps of 16, and 400 held out, with room
    assert len({row["prompt"] + row["completion"] for row in rows}) == 8_000
    assert (min(lengths), max(lengths)) == (24, 128)
    assert all(row["prompt"].endswith("\n") and row["completion"].strip() for row in rows)
    readme = (Path(make_study_task.__file__).parent / "study" / "README.md").read_text()
    assert f"{sum(len(b.ids) + 1 for b in parts[1]):,} loss-bearing tokens" in readme


@pytest.mark.slow
@pytest.mark.skipif(platform.python_version() != "3.11.7", reason="another Python, another suite")
def test_study_rows_made_again_are_the_shipped_ones():
    assert study_rows() == shipped()
