"""The tables of docs/memory.md are what the code says now."""

import pytest

from benchmarks.common import ROOT, SHARED
from benchmarks.memory_tables import PUBLISHED, measured_lines, parts_lines, published_lines
from trainers.paths import read_json


def between(marker: str) -> list[str]:
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    return (
        text.split(f"<!-- {marker} -->")[1].split(f"<!-- end {marker} -->")[0].strip().split("\n")
    )


def test_docs_hold_the_published_points_as_they_are_predicted_now():
    assert between("published") == published_lines()
    assert [point.published_gb for point in PUBLISHED] == [45.0, 36.6, 48.0]


def test_docs_hold_the_parts_as_they_are_predicted_now():
    if not (SHARED / "models").is_dir():
        pytest.skip(
            f"{SHARED / 'models'} is not here: the published shapes stand beside the checkout"
        )
    assert between("parts") == parts_lines()


def test_docs_hold_the_measured_results_that_are_committed():
    lines = between("measured")
    assert lines == measured_lines(ROOT / "benchmarks" / "results")
    assert any("Llama-3.1-70B" in line for line in lines)


def test_committed_results_are_within_a_tenth_of_what_was_predicted():
    for path in (ROOT / "benchmarks" / "results").glob("memory_step-*.json"):
        result = read_json(path)
        for row in [*result["steps"], *result.get("fake", []), *result.get("loads", [])]:
            assert row["ratio"] == pytest.approx(1.0, abs=0.1)
