"""Every command of README and docs: read by the real argument parser, and run where that takes seconds.

What starts Ray (sweep, study, demo) or asks a cluster is read, with the files that it names; what goes on with a run
(status, trial, resume, export) is run on one by the slow test at the end, and its first command made that run.
"""

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from orchestration import cli
from orchestration.config import load_config
from orchestration.studies.config import load_study
from tests.orchestration.config_cases import fill
from tests.orchestration.sweeps import ROOT

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHELLS = ("", "bash", "sh", "console")
COMMAND = re.compile(r"^(?:\$ )?((?:\.venv/bin/)?tenfold|make|\.venv/bin/python|python)\s+(\S.*)$")
OTHER_FILES = {
    "study.yaml": "model: base\ndata: good.jsonl\nglobal_batch_size: 16\nlora_rank: 4\n",
    "small.yaml": "model: base\ndata: good.jsonl\nscheduler: fifo\n",
    "big.yaml": "model: base\ndata: good.jsonl\n",
}
"""What pages name beside sweep.yaml, which is the README's."""


@dataclass(frozen=True)
class Command:
    """A command of a page: its program and its arguments."""

    page: str
    program: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join([self.program, *self.arguments])}"


def lines_of(text: str) -> Iterator[str]:
    """Those of fenced blocks, and code in the text that begins as a command does."""
    for language, block in FENCE.findall(text):
        yield from block.replace("\\\n", "").splitlines() if language in SHELLS else ()
    yield from re.findall(r"`(\.venv/bin/tenfold [^`\n]+)`", FENCE.sub("", text))


def commands() -> Iterator[Command]:
    """All, without comments."""
    for path in PAGES:
        for line in lines_of(path.read_text(encoding="utf-8")):
            if found := COMMAND.match(line):
                words = shlex.split(found[2], comments=True)
                yield Command(
                    page=str(path.relative_to(ROOT)),
                    program=found[1].removeprefix(".venv/bin/"),
                    arguments=tuple(words),
                )


def of_tenfold(*verbs: str) -> list[Command]:
    """The different ones, of some verbs or of all."""
    found = {each.arguments: each for each in commands() if each.program == "tenfold"}
    return [each for each in found.values() if not verbs or each.arguments[0] in verbs]


def readme_yaml() -> str:
    """The sweep.yaml that the README shows."""
    blocks = FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    return next(block for language, block in blocks if language == "yaml")


@pytest.fixture
def place(workplace: Path) -> Path:
    """A user's folder with what the pages name: the README's sweep.yaml, the shipped base in its model's place."""
    fill(workplace)
    for name, text in {"sweep.yaml": readme_yaml(), **OTHER_FILES}.items():
        (workplace / name).write_text(text)
    return workplace


def test_docs_commands_are_found():
    found = {each.arguments[0] for each in of_tenfold()}
    assert {"check", "plan", "sweep", "export", "cluster", "study"} <= found
    assert {each.program for each in commands()} >= {"make", "tenfold"}


@pytest.mark.parametrize("command", of_tenfold(), ids=str)
def test_docs_command_is_one_that_the_parser_takes_and_names_files_that_are_there(command, place):
    args = cli.build_parser().parse_args(command.arguments)
    config = getattr(args, "config", None)
    if command.arguments[0] == "study":
        load_study(args.kind, args.preset, config)
    elif command.arguments[0] == "sweep":
        load_config(config, name=args.name, address=args.address)
    elif config is not None:
        assert config.is_file()


@pytest.mark.parametrize(
    "command",
    [e for e in of_tenfold("check", "plan", "cluster") if "--address" not in e.arguments],
    ids=str,
)
def test_docs_command_of_a_quick_verb_runs(command, place, capsys):
    assert cli.main(command.arguments) == 0
    written = [after for flag, after in pairwise(command.arguments) if flag == "-o"]
    assert all((place / name).is_file() for name in written)
    assert written or capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [each for each in commands() if each.program == "make"], ids=str
)
def test_docs_command_of_make_names_a_target(command):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(command.arguments) <= set(targets)


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Verb -> its parser."""
    actions = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """A verb's flags, those of verbs below it included."""
    own = {flag for action in parser._actions for flag in action.option_strings}
    return own.union(*(flags_of(verb) for verb in verbs_of(parser).values()))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docs_verbs_and_flags_named_in_a_page_are_there(path):
    verbs = verbs_of(cli.build_parser())
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    named = re.findall(r"`(?:\.venv/bin/)?tenfold ([a-z][\w-]*)([^`\n]*)`", text)
    wrong = [
        f"{verb} {flag}".strip()
        for verb, rest in named
        for flag in ["", *re.findall(r"(?<![\w-])(--[a-z][\w-]*)", rest)]
        if verb not in verbs or (flag and flag not in flags_of(verbs[verb]))
    ]
    assert wrong == []


@pytest.mark.slow
def test_docs_commands_that_go_on_with_a_run_do_as_their_pages_tell(
    whole_folder, monkeypatch, capsys
):
    monkeypatch.chdir(whole_folder)
    monkeypatch.setenv("TENFOLD_CACHE", str(whole_folder / "cache"))
    assert "sweep sweep.yaml" in [" ".join(each.arguments) for each in of_tenfold("sweep")]
    run = whole_folder / "runs" / "whole"  # what that command left
    for name in ("report.html", "best/adapter_config.json"):
        assert (run / name).is_file()
    for command in sorted(of_tenfold("status", "resume", "export"), key=str):
        assert cli.main(_on_run(command, run)) == 0, command
    assert list((run / "export").glob("*/adapter_model.safetensors"))
    assert cli.main(["export", "runs/whole", "--merge"]) == 0  # of a comment in the README
    assert list((run / "export").glob("*/config.json"))
    next(iter(run.glob("trials/*/status.json"))).unlink()  # as where a driver died before its end
    for command in sorted(of_tenfold("trial"), key=str):
        capsys.readouterr()
        assert cli.main(_on_run(command, run)) == 0, command
        assert "`tenfold resume runs/whole` obeys it" in capsys.readouterr().out


def _on_run(command: Command, run: Path) -> list[str]:
    """A command's arguments with a run in the place of NAME, and a trial of it that has no end in that of TRIAL."""
    opened = (each.name for each in run.glob("trials/*") if not (each / "status.json").exists())
    places = {"runs/NAME": f"runs/{run.name}", "TRIAL": next(opened, "TRIAL")}
    return [places.get(word, word) for word in command.arguments]
