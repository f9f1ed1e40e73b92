"""docs/reliability.md names a test for each promise: every one of them must be there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_reliability_doc_names_tests_that_exist():
    files = set(re.findall(r"tests/\w+/\w+\.py", TEXT))
    names = set(re.findall(r"\btest_\w+\b(?!\.py)", TEXT))
    assert len(files) > 15
    assert len(names) > 40
    missing = [file for file in sorted(files) if not (ROOT / file).is_file()]
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    missing += [name for name in sorted(names) if f"def {name}(" not in written]
    assert missing == []


def test_reliability_doc_names_each_test_with_its_own_file():
    for file, name in re.findall(r"(tests/\w+/\w+\.py)::(test_\w+)", TEXT):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"
