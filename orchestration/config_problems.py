"""What is wrong with a config, one line for each problem."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from orchestration.yaml_file import shortened, texts_in
from trainers.credentials import credential_in


def credential_lines(values: dict[str, Any]) -> Iterator[str]:
    """A line for each value with a credential in it. Whatever else is wrong with it would show it."""
    for key, value in values.items():
        if why := next(filter(None, map(credential_in, texts_in(value))), None):
            yield f"{key}: {why}"


def unknown_key(key: object, where: str, known: Sequence[str]) -> str:
    """The line for a key that no config has, with the nearest one that it has."""
    close = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
    return f"{where}: unknown key {shortened(repr(key))}; {hint}"


def problem_lines(error: ValidationError, where: str) -> list[str]:
    """One line per key: a union reports one problem per alternative, of which a person can use one."""
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        key = str(item["loc"][0]) if item["loc"] else ""
        if item["type"] == "value_error":
            text = item["msg"].removeprefix("Value error, ")  # ours, complete
        else:
            text = f"{key}: {item['msg']}" + (
                "" if item["type"] == "missing" else f", got {item['input']!r}"
            )
        lines.setdefault(key, f"{where}: {shortened(text)}")
    return list(lines.values())
