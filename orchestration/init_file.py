"""`tenfold init`: a sweep.yaml of model and data, with every other key commented out at the value that it would have,
and who says so. Imports neither torch nor ray."""

import json
import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from orchestration.config import SPACE_KEYS, SweepConfig, make_config
from orchestration.key_docs import key_docs
from orchestration.own_folder import require_place
from orchestration.planning import Plan, make_plan
from orchestration.rl_config import RL_KEYS
from orchestration.schema import Schema, sweep_schema
from orchestration.yaml_file import EXPONENT
from search_spaces.domains import LogUniform
from trainers.paths import write_text
from trainers.terminal import printable

SCHEMA_FILE = "sweep.schema.json"
GIVEN = ("model", "data")
LEFT_OUT = (*GIVEN, "dataset_tokens", "method", *RL_KEYS)
"""Keys that are not told of: given, or of another kind of sweep."""
WIDTH = 100
HEAD = """\
# yaml-language-server: $schema={schema}
# Two keys are set. Each line that begins with # and a key shows what the sweep does without it: take the # away and
# change the value to do something else. `tenfold plan {file}` says what comes of it, before anything runs.
"""


def write_init(model: str, data: str, output: Path) -> list[Path]:
    """Writes the file, and its JSON Schema beside it for editors. Returns both.

    Raises:
        ValueError: something is there already, or a model or data that no sweep can use.
    """
    schema_path = output.with_name(SCHEMA_FILE)
    _require_free(output)
    schema = sweep_schema()
    _require_ours(schema_path, schema)
    config = make_config({"model": model, "data": data}, "tenfold init")
    text = init_text(make_plan(config), output.name)
    write_text(schema_path, json.dumps(schema, indent=1) + "\n")
    write_text(output, text)
    return [output, schema_path]


def _require_free(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output}: must be a new file, it is there already; name another (-o)")
    require_place(output)


def _require_ours(path: Path, schema: Schema) -> None:
    """An earlier schema is written anew; whatever else is there stays."""
    if not (path.exists() or path.is_symlink()):
        return
    try:
        title = json.loads(path.read_bytes())["title"]
    except (OSError, ValueError, LookupError, TypeError):
        title = None
    if title != schema["title"]:
        raise ValueError(
            f"{path}: must be free for the schema that editors read, holds something else; write into another folder "
            "(-o FOLDER/sweep.yaml)"
        )


def init_text(plan: Plan, file_name: str) -> str:
    """The YAML of a plan of nothing but a model and data."""
    given = {key: getattr(plan.config, key) for key in GIVEN}
    lines = [f"{key}: {yaml_text(value)}\n" for key, value in given.items()]
    head = HEAD.format(schema=SCHEMA_FILE, file=printable(file_name))
    return "".join([head, *lines, *_commented(plan)])


def _commented(plan: Plan) -> Iterator[str]:
    docs, values = key_docs(SweepConfig), resolved_values(plan)
    keys = [key for key in SweepConfig.model_fields if key not in LEFT_OUT]
    for heading, group in groupby(keys, lambda key: docs[key].heading):
        yield f"\n# ---- {heading} ----\n"
        for key in group:
            for text in (docs[key].meaning, *_sources(plan, key)):
                yield from _prose(text)
            yield f"#{key}: {yaml_text(values[key])}".rstrip() + "\n"


def _prose(text: str) -> Iterator[str]:
    """Lines of comment; a line's end within the text, in whatever script, is none of theirs."""
    for line in textwrap.wrap(printable(" ".join(text.split())), WIDTH, break_on_hyphens=False):
        yield f"# {line}\n"


def _sources(plan: Plan, key: str) -> Iterator[str]:
    notes = plan.space.notes
    yield from (f"= {note.value} (source: {note.source})" for note in notes if note.key == key)


def resolved_values(plan: Plan) -> dict[str, Any]:
    """Key -> the value that says what the plan does without it; None where there is none to say."""
    assert plan.budget is not None
    assert plan.data_spec is not None
    values = {key: field.default for key, field in SweepConfig.model_fields.items()}
    space = {key: _written(getattr(plan.space, key)) for key in SPACE_KEYS}
    return {
        **values,
        **space,
        "name": plan.name,
        "eval_every": plan.budget.eval_every,
        "grace_period": plan.budget.grace_period,
        "seq_len": plan.data_spec.seq_len,
    }


def _written(domain: Any) -> Any:
    """A domain as people write it."""
    if isinstance(domain, LogUniform) and domain.num > 1:
        return vars(domain)
    options = [_plain(option) for option in domain.values()]
    return options[0] if len(options) == 1 else options


def _plain(option: Any) -> Any:
    if isinstance(option, float) and option.is_integer():
        return int(option)
    return list(option) if isinstance(option, tuple) else option


def yaml_text(value: Any) -> str:
    """A value on one line of YAML, as our reader reads it; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, str) and EXPONENT.fullmatch(value):  # text to PyYAML, a number to us
        return json.dumps(value)
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9
    )
    return text.removesuffix("\n").removesuffix("\n...")
