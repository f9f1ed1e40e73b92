"""What shells and programs see: JSON of a report, and colours where they are wanted and nowhere else."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.cli import main
from orchestration.console import PlainConsole
from orchestration.progress import Progress
from tests.fuzzing import ROOT
from tests.orchestration.sweeps import candidate_dict
from tests.orchestration.test_orch_report import run  # noqa: F401  (a fixture)
from trainers.paths import read_json_lines, read_state
from trainers.terminal import is_coloured

# ---- tenfold report --json


@pytest.fixture
def reported(run, capsys) -> dict:  # noqa: F811
    assert main(["report", str(run.root), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def test_report_json_has_every_trial_best_first_with_its_end_and_numbers(reported, run):  # noqa: F811
    trials = {trial["name"]: trial for trial in reported["trials"]}
    assert list(trials) == ["good", "worse", "wild", "dead"]
    assert [trials[name]["status"] for name in trials] == [
        "finished",
        "stopped",
        "diverged",
        "failed",
    ]
    assert trials["wild"]["reason"] == "train_loss nan at step 3"
    assert trials["dead"]["reason"] == "ValueError: <script>alert(1)</script>"  # text, in JSON
    good = trials["good"]
    rows = read_json_lines(run.trial("good").metrics)
    assert (good["score"], good["best_row"], good["last_row"]) == (2.25, rows[-1], rows[-1])
    expected = candidate_dict(learning_rate=1e-3, lora_rank=4, target=["attn", "mlp"])
    assert good["candidate"] == expected
    assert good["scale"] == expected["lora_alpha"] / 4
    assert good["scaled_learning_rate"] == pytest.approx(1e-3 * good["scale"])
    assert good["folder"] == str(run.trial("good").root)
    assert (trials["dead"]["score"], trials["dead"]["last_row"]) == (None, None)


def test_report_json_names_the_best_what_was_discarded_and_the_page(reported, run):  # noqa: F811
    assert (reported["kind"], reported["best"]) == ("sweep", "good")
    assert reported["best_adapter"] == str(run.best)
    assert reported["score"] == {"key": "eval_loss", "unit": "nats/token", "lower_is_better": True}
    assert reported["base"] == {"score": 3.0, "retention_loss": None}
    assert reported["report"] == str(run.report)
    assert "<h1>" in run.report.read_text()
    plan = read_state(run.plan)
    for key in ("discarded", "cut_ranks", "pitfalls", "dataset_bits", "defaults"):
        assert reported[key] == plan[key]
    assert reported["versions"] == {"torch": "2.13.0"}


def test_report_json_of_no_run_is_one_line_and_no_json(workplace, capsys):
    assert main(["report", "runs/none", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1


# ---- Colours

COLOURED = {"TERM": "xterm-256color", "NO_COLOR": ""}


def on_terminal(folder: Path, *arguments: str, **variables: str) -> str:
    """What `tenfold` shows on a terminal of its own."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | variables
    command = [sys.executable, "-m", "orchestration.cli", *arguments]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=theirs) as process:
        os.close(theirs)
        shown = bytearray()
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # Linux's end of a terminal that nobody writes to any more
            pass
    os.close(ours)
    assert process.returncode == 0
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("variables", "is_painted"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=str,
)
def test_check_show_on_a_terminal_marks_what_is_trained(
    write_rows, qa_rows, workplace, variables, is_painted
):
    write_rows("rows.jsonl", qa_rows(40))
    shown = on_terminal(workplace, "check", "rows.jsonl", "--show", "1", **COLOURED | variables)
    marked = "<s>0 plus one?⟦ It is 1.</s>⟧"
    painted = "\x1b[2m<s>0 plus one?\x1b[0m\x1b[32m It is 1.</s>\x1b[0m"
    assert (painted if is_painted else marked) in shown
    assert ("\x1b" in shown) == is_painted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "variables", "expected"),
    [
        (Terminal(), {}, True),
        (io.StringIO(), {}, False),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": "0"}, False),  # any value: no-color.org
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {"TERM": "UNKNOWN"}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, stream, variables, expected):
    for name, value in (COLOURED | variables).items():
        monkeypatch.setenv(name, value)
    assert is_coloured(stream) is expected


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_live_table_and_lines_of_a_sweep_have_no_colour_where_none_is_wanted(
    monkeypatch, variables
):
    for name, value in (COLOURED | variables).items():
        monkeypatch.setenv(name, value)
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    console = PlainConsole()
    with Progress(["a", "b"], 3, 64, console) as progress:
        console.print("a line", style="bold red")
        progress.console.print(progress.view())
    assert "a line" in stream.getvalue()
    assert not re.search(r"\x1b\[(\d;)*(3\d|4\d|9\d|10\d)", stream.getvalue())
    assert variables != {"TERM": "dumb"} or "\x1b" not in stream.getvalue()
