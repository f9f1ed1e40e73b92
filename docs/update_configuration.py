"""Writes docs/configuration.md from the JSON Schemas, the command line and a plan.

Run: PYTHONPATH=. .venv/bin/python docs/update_configuration.py
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from orchestration.cli import EXIT_CODES, build_parser
from orchestration.config import SweepConfig, make_config
from orchestration.key_docs import key_docs
from orchestration.planning import make_plan
from orchestration.schema import Schema, study_schema, sweep_schema
from orchestration.studies.config import DECIDED, StudyConfig
from search_spaces.values import MAX_NUMBER, MIN_NUMBER

PAGE = Path(__file__).resolve().parent / "configuration.md"
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
TOKENS = 10_000_000
REFERRED = {
    "Text": "text",
    "LogRange": "`{low, high, num}`",
    "CountRange": "`{low, high, num}`",
    "CarriedFrom": "`{from: RUN}`",
}
VARIABLES = {
    "TENFOLD_CACHE": "folder of tokenized data and measurements (default: `~/.cache/tenfold`)",
    "TENFOLD_GROUP_WAIT_S": "seconds after which a worker group that got no workers is given up (default: 600)",
    "TENFOLD_HANG_S": "seconds of silence after which a worker group is ended and started again (default: 1,800)",
    "TENFOLD_VERBOSE": "`1`: as `--verbose`, Ray's own output",
    "HF_TOKEN": "for gated models and data of the Hugging Face hub (or `hf auth login`)",
    "HF_ENDPOINT, HF_HUB_OFFLINE": "another hub, or none; they reach the workers",
    "WANDB_API_KEY, WANDB_MODE, WANDB_PROJECT": "of `tracking: wandb`; without a key runs are written offline",
    "AWS_*, GOOGLE_APPLICATION_CREDENTIALS, AZURE_*": "of the client of a storage at a URL; credentials never travel",
    "GOMP_SPINCOUNT": "how long the threads of a worker on CPUs spin while they wait for each other. A sweep sets "
    "1000, so that they give way to other programs; 300000, libgomp's own, is up to a tenth faster where a worker "
    "has its CPUs to itself, and 2 to 6 times slower where not (benchmarks/README.md)",
    "CUDA_VISIBLE_DEVICES": "the GPUs of this machine that may be used; empty: none",
    "RAY_AUTH_TOKEN": "of a guarded cluster that is joined by `--address`",
    "NO_COLOR": "set to anything: no colours; trained tokens of `check --show` then stand in ⟦ ⟧. So do they where "
    "`TERM` is `dumb` and where stdout is no terminal",
}
HEAD = """\
# Configuration

Written by `docs/update_configuration.py` from the JSON Schema (`tenfold schema`), the command line and a plan: it says
what the code does.

A sweep.yaml needs `model` and `data`. Everything else has a default, and `tenfold plan sweep.yaml` prints it with its
source.

- `tenfold init MODEL DATA` writes a sweep.yaml in which every other key stands as a comment, at the value that it would
  have.
- `tenfold schema > sweep.schema.json` is for editors: with `# yaml-language-server: $schema=sweep.schema.json` as the
  first line of a YAML, an editor with that server (VS Code's YAML extension, Neovim, Helix, ...) completes keys, shows
  what they mean and marks what is wrong. `tenfold init` writes both. `tenfold schema study` is that of study.yaml.
- `1e-4` is a number, a key stands once, tags and merges are not read, a credential in the file is refused.
- [examples](../examples/README.md) has whole files.

"Given" below is what may be written; a list is tried value by value, and `{low, high, num}` are `num` log-spaced
values, both ends included.
"""


def page() -> str:
    """The whole page."""
    sweep, study = sweep_schema(), study_schema()
    return "\n".join(
        [
            HEAD,
            "## Keys of sweep.yaml\n",
            *_groups(sweep, key_docs(SweepConfig)),
            *_sources(),
            *_study(sweep, study),
            "## Commands\n",
            f"{_sentence(EXIT_CODES)}. Bad input is one line for each problem on stderr.\n",
            *_commands(build_parser(), "tenfold"),
            "## Environment\n",
            table(("variable", "meaning"), [(f"`{k}`", v) for k, v in VARIABLES.items()]),
        ]
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    lines = [list(headers), ["---" for _ in headers], *map(list, rows)]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _groups(schema: Schema, docs: Mapping[str, Any]) -> Iterator[str]:
    for heading, keys in groupby(schema["properties"], lambda key: docs[key].heading):
        yield f"### {heading}\n\n{_key_table(schema, keys)}"


def _key_table(schema: Schema, keys: Iterable[str]) -> str:
    forms = schema["properties"]
    rows = [
        (f"`{key}`", given(forms[key]), _default(schema, key), forms[key]["description"])
        for key in keys
    ]
    return table(("key", "given", "default", "meaning"), rows)


def _default(schema: Schema, key: str) -> str:
    if key in schema.get("required", ()):
        return "required"
    value = schema["properties"][key].get("default")
    return "" if value is None else f"`{json.dumps(value)}`".replace('"', "")


def given(form: Schema) -> str:
    """What a user may write, in words."""
    if "anyOf" in form:
        return " or ".join(dict.fromkeys(_alternatives(form["anyOf"])))
    if "const" in form:
        return f"`{form['const']}`"
    if "$ref" in form:
        return REFERRED[form["$ref"].rpartition("/")[2]]
    if "enum" in form:
        return ", ".join(f"`{value}`" for value in form["enum"])
    if form["type"] in ("integer", "number"):
        return f"{'whole number' if form['type'] == 'integer' else 'number'}{_bounds(form)}"
    if form["type"] == "array":
        return f"list of {given(form['items'])}"
    if form["type"] == "object":
        weighted = "number" in given(form["additionalProperties"])
        return "`{NAME: WEIGHT}`" if weighted else "`{NAME: COLUMN}`"
    words = {"boolean": "`true`, `false`", "string": "text", "null": ""}
    examples = [f"`{example}`" for example in form.get("examples", ())]
    return words[form["type"]] + (f" such as {', '.join(examples)}" if examples else "")


def _alternatives(forms: list[Schema]) -> Iterator[str]:
    """Each in words; a list of what was named is a list of such."""
    named: list[str] = []
    for form in forms:
        if form.get("type") != "array":
            named.append(given(form))
            if named[-1]:
                yield named[-1]
        elif form["items"].get("type") == "array":
            yield "a list of such lists"
        elif given(form["items"]) in (*named, " or ".join(named)):
            yield "a list of such"
        else:
            yield given(form)


def _bounds(form: Schema) -> str:
    found = []
    for name, sign in (("minimum", ">="), ("exclusiveMinimum", ">")):
        value = form.get(name)
        if value is not None and value not in (MIN_NUMBER, -MAX_NUMBER):
            found.append(f"{sign} {value:g}")
    for name, sign in (("maximum", "<="), ("exclusiveMaximum", "<")):
        value = form.get(name)
        if value is not None and value != MAX_NUMBER:
            found.append(f"{sign} {value:g}" if value < 10_000 else f"{sign} {value:,}")
    return "".join(f" {' and '.join(found)}" if found else "")


def _sources() -> Iterator[str]:
    yield (
        "## What is left out, and who says so\n\n"
        f"The settings of a plan of Llama-3.1-8B's shape and {TOKENS:,} loss-bearing tokens; `tenfold plan` prints "
        "those of yours. [doctrine.md](doctrine.md) has the evidence.\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(LLAMA_8B))
        config = make_config({"model": str(path), "dataset_tokens": TOKENS}, "docs")
        notes = make_plan(config).space.notes
    yield table(("key", "value", "source"), [(f"`{n.key}`", n.value, n.source) for n in notes])


def _study(sweep: Schema, study: Schema) -> Iterator[str]:
    docs = key_docs(StudyConfig)
    own = [key for key in study["properties"] if key not in sweep["properties"]]
    other = [
        key
        for key in study["properties"].keys() - set(own)
        if docs[key].owner == StudyConfig.__name__
    ]
    decided = ", ".join(f"`{key}`" for key in DECIDED)
    yield (
        "## Keys of study.yaml\n\n"
        f"Those of a sweep.yaml, but for {decided}, which a study decides itself; `model` and `data` may come from a "
        f"preset. Of its own:\n\n{_key_table(study, own)}\n"
        f"With another default than a sweep's:\n\n{_key_table(study, sorted(other))}"
    )


def _commands(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    """A section for each verb, however deep."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for verb, inner in action.choices.items():
                yield f"### {name} {verb}\n\n{_sentence(helps[verb] or '')}.\n\n{_flags(inner)}"
                yield from _commands(inner, f"{name} {verb}")


def _flags(verb: argparse.ArgumentParser) -> str:
    plain = (argparse._HelpAction, argparse._SubParsersAction)
    shown = [action for action in verb._actions if not isinstance(action, plain)]
    rows = [(_flag(action), (action.help or "").replace("%%", "%")) for action in shown]
    return table(("argument", "meaning"), rows) if rows else ""


def _flag(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    if not action.option_strings:
        return f"`[{value}]`" if action.nargs == "?" else f"`{value}`"
    return f"`{' '.join(filter(None, [', '.join(action.option_strings), str(value)]))}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
