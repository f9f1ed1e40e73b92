"""What docs/update_readme.py takes of the demo's output into the README."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OUTPUT = """demo: 12 candidates planned, 8 discarded, 4 to train; 68,087 dataset bits
  packs: 2 group(s)
  discarded: UNDERCAPACITY: rank 1
  warning: 20 steps
[    0 s] starting 2 worker group(s), loading the base
[    6 s] r8: starting
demo: 4 trials, 8 candidates discarded before any trial
  rank  eval_loss
     8     3.0078  <- best
best adapter: runs/demo/best
"""


@pytest.fixture
def update_readme(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.delitem(sys.modules, "update_readme", raising=False)
    import update_readme  # pyright: ignore[reportMissingImports]

    return update_readme


def test_essential_keeps_plan_discarded_and_results(update_readme):
    assert update_readme.essential(OUTPUT).splitlines() == [
        "demo: 12 candidates planned, 8 discarded, 4 to train; 68,087 dataset bits",
        "...",
        "  discarded: UNDERCAPACITY: rank 1",
        "...",
        "demo: 4 trials, 8 candidates discarded before any trial",
        "  rank  eval_loss",
        "     8     3.0078  <- best",
        "best adapter: runs/demo/best",
    ]


@pytest.mark.parametrize("output", ["", OUTPUT.split("demo: 4")[0], "nothing\n" + OUTPUT[5:]])
def test_essential_of_an_output_without_plan_or_results_is_refused(update_readme, output):
    with pytest.raises(ValueError, match="must print its plan and its results"):
        update_readme.essential(output)


def test_readme_fits_two_screens_and_shows_the_demo_as_the_script_would(update_readme):
    assert len(README.splitlines()) <= 130
    (block,) = re.findall(r"<!-- demo output -->.*?<!-- end -->", README, re.DOTALL)
    output = block.split("$ make demo\n")[1].split("\n```")[0]
    assert update_readme.block_of(output) == block
    assert "<- best" in output
