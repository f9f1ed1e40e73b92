"""Where Tenfold writes: in a run's folder and nowhere else, whatever a config, a link or an owner says. And what it
prints: text, whatever came from data or names."""

import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from orchestration.cli import main
from orchestration.config import make_config
from orchestration.console import PlainConsole
from orchestration.own_folder import require_no_way_out, require_own
from orchestration.planning import default_name
from orchestration.progress import Progress
from orchestration.run_folder import driving, run_in
from trainers.data.cache import cache_root
from trainers.data.spec import DataSpec
from trainers.paths import RunPaths, write_state
from trainers.terminal import printable

STRANGER = 12_345
"""A user of no name."""


# ---- Names


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "/tmp/x",
        "a/b",
        "a\\b",
        "..",
        ".",
        ".hidden",
        "-x",
        "a\x00b",
        "a\n",
        "",
        " ",
        "~",
        "a b",
        "x/../y",
    ],
)
def test_name_that_is_no_folder_of_its_own_is_refused(write_sweep, workplace, capsys, name):
    before = sorted(workplace.parent.rglob("*"))
    config = write_sweep(name=name)
    assert main(["sweep", str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "name must" in line
    config.unlink()
    assert sorted(workplace.parent.rglob("*")) == [p for p in before if p != config]


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("../../..", ".."),
        ("/", "/"),
        ("模型", "数据.jsonl"),
        ("a/../..", "x;$(y)`z`.jsonl"),
        ("m" * 200, "d" * 200 + ".jsonl"),
    ],
)
def test_name_made_of_any_model_and_data_is_a_folder_of_its_own(model, data):
    name = default_name(make_config({"model": model, "data": data}, "here"))
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", name)
    assert Path("runs") / name != Path("runs")
    other = default_name(make_config({"model": model, "data": f"{data[:-6]}z.jsonl"}, "here"))
    assert name != other


def test_names_of_cached_sets_lie_in_the_cache_whatever_the_data_is_called(
    workplace, base, qa_rows
):
    from trainers.data.prepared import prepare_data

    folder = workplace / "..evil" / "a b"
    folder.mkdir(parents=True)
    data = folder / "..%2f..%2fx;$(id).jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in qa_rows(20)))
    outside = sorted(p for p in workplace.parent.rglob("*") if cache_root() not in (p, *p.parents))
    prepare_data(DataSpec(data=str(data), model=str(base)))
    written = [p for p in workplace.parent.rglob("*") if p not in outside]
    assert any((cache_root() / "sets") in p.parents for p in written)
    for path in written:
        assert cache_root() in (path, *path.parents)


# ---- Links and owners


@pytest.mark.parametrize(
    "link",
    [
        "best",
        "trials",
        "trials/r4-x",
        "trials/r4-y/checkpoint",
        "trials/r4-y/metrics.jsonl",
        "rungs.jsonl",
        ".lock",
        ".workers",
        "tune",
        "wandb",
        "report.html",
    ],
)
def test_run_with_a_link_that_leads_out_is_not_driven_and_nothing_outside_changes(tmp_path, link):
    outside = tmp_path / "outside"
    (outside / "kept").mkdir(parents=True)
    (outside / "file").write_text("kept")
    run = RunPaths(tmp_path / "runs" / "run")
    place = run.root / link
    place.parent.mkdir(parents=True)
    place.symlink_to(outside / "file" if "." in place.name else outside)
    with (
        pytest.raises(ValueError, match=f"{place}: must not lead out of the run's folder"),
        driving(run),
    ):
        raise AssertionError("the run is driven")
    assert place.is_symlink()
    assert sorted(p.name for p in outside.iterdir()) == ["file", "kept"]
    assert (outside / "file").read_text() == "kept"


def test_run_with_links_within_and_those_of_trackers_is_driven(tmp_path):
    run = RunPaths(tmp_path / "elsewhere")
    (run.root / "wandb" / "run-1").mkdir(parents=True)
    (run.root / "wandb" / "latest-run").symlink_to("run-1")
    (run.root / "wandb" / "run-1" / "core.log").symlink_to("/var/log/of-wandb")
    (run.root / "plan-link.json").symlink_to("plan.json")
    (run.root / "loop").symlink_to("loop")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run").symlink_to(run.root)  # the whole run may lie elsewhere
    with driving(run_in(str(tmp_path / "runs"), "run")):
        pass


as_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can give a folder to another user"
)


@as_root
def test_resume_of_a_run_of_another_user_is_refused_in_one_line(workplace, capsys):
    run = RunPaths(workplace / "runs" / "run")
    write_state(run.plan, {})
    write_state(run.resolved, {"config": {}})
    os.chown(run.root, STRANGER, STRANGER)
    before = sorted(run.root.iterdir())
    assert main(["resume", "runs/run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "tenfold: runs/run: must belong to whoever goes on with it, belongs to uid 12345"
    )
    assert (
        "would be of root (uid 0); go on as uid 12345, or take the folder over (chown -R)" in line
    )
    assert sorted(run.root.iterdir()) == before


LOOK_AS_STRANGER = """
import os, sys
from pathlib import Path
from orchestration.own_folder import require_own
os.setuid(int(sys.argv[2]))
require_own(Path(sys.argv[1]))
"""


@as_root
def test_run_of_another_user_who_lets_all_write_is_not_this_ones(tmp_path):
    """As that user, whom the kernel lets write."""
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o777)
    above = Path(tempfile.gettempdir()).resolve()
    for parent in (tmp_path, *tmp_path.parents):
        if parent != above and parent.is_relative_to(above):
            parent.chmod(0o755)
    looks = [sys.executable, "-c", LOOK_AS_STRANGER, str(folder), str(STRANGER)]
    done = subprocess.run(looks, capture_output=True, text=True)
    assert done.returncode == 1
    assert "belongs to root (uid 0)" in done.stderr.splitlines()[-1]


def test_run_of_ones_own_is_driven_and_holds_no_trace_of_the_look(tmp_path):
    require_own(tmp_path)
    require_no_way_out(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- What is given away


def test_manifest_is_written_over_an_earlier_one_alone(write_sweep, workplace, capsys):
    config = str(write_sweep(gpus_per_worker=0))
    flags = ["cluster", "slurm", config, "-o"]
    assert main([*flags, "job.sh"]) == 0
    first = Path("job.sh").read_text()
    Path("job.sh").write_text(first.replace("tenfold-", "changed-"))
    assert main([*flags, "job.sh"]) == 0
    assert Path("job.sh").read_text() == first
    Path("link.sh").symlink_to("job.sh")
    Path("mine.txt").write_text("mine")
    Path("folder").mkdir()
    (workplace / "dangling").symlink_to("absent")
    capsys.readouterr()
    for name in ("mine.txt", "folder", "dangling", config, "/dev/null"):
        assert main([*flags, name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"tenfold: {name}: must be new or an earlier manifest")
    assert main([*flags, "mine.txt/deep/job.sh"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "tenfold: mine.txt/deep/job.sh: must lie in a folder where you can write"
    )
    assert Path("mine.txt").read_text() == "mine"
    assert not Path("absent").exists()


# ---- The terminal

STEERING = "\x1b]0;title\x07\x1b[2J\x9b31m\x08\r\u202egpj.exe [red]x[/red] [/x]"
SHOWN = "\\x1b]0;title\\x07\\x1b[2J\\x9b31m\\x08\\x0d\\u202egpj.exe [red]x[/red] [/x]"


def is_plain(text: str) -> bool:
    return not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def test_printable_text_holds_no_control_characters_and_loses_nothing():
    assert printable(STEERING) == SHOWN
    assert (
        printable("two\nlines\tand a tab: déjà vu 数据 🙂")
        == "two\nlines\tand a tab: déjà vu 数据 🙂"
    )


def test_plain_console_shows_markup_and_escapes_to_the_letter(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    PlainConsole().print(STEERING, soft_wrap=True)
    assert sys.stdout.getvalue() == f"{SHOWN}\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_shows_a_reason_to_the_letter(is_terminal):
    stream = io.StringIO()
    console = Console(file=stream, width=250, force_terminal=is_terminal, color_system=None)
    with Progress(["trial"], 0, 64, console) as progress:
        progress.started("trial")
        progress.ended("trial", "failed", STEERING)
        progress.say(STEERING)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())  # those of rich's table
    assert SHOWN in text
    assert is_plain(text.replace("\r", ""))


def test_check_and_plan_show_rows_and_names_to_the_letter(write_sweep, write_rows, capsys, qa_rows):
    name = "rows/\x1b[31m[red]\u202edata.jsonl"
    Path("rows").mkdir()
    steering = {"prompt": f"{STEERING}?", "completion": STEERING}
    write_rows(
        name, [steering, steering, *qa_rows(40), {"prompt": f"{STEERING}x", "completion": 5}]
    )
    write_rows("rows/other.jsonl", [steering])  # where it is found again, the file's name is shown
    config = str(write_sweep(data="rows", bad_rows="drop"))
    assert main(["check", config, "--show", "2"]) == 0
    checked = capsys.readouterr().out
    assert SHOWN in checked
    assert main(["plan", config]) == 0
    for shown in (checked, capsys.readouterr().out):
        assert is_plain(shown)
        assert "\\x1b[31m[red]\\u202edata.jsonl" in shown
    assert main(["plan", config, "--json"]) == 0
    assert is_plain(capsys.readouterr().out)
