"""Row shapes: from whatever columns a file has to one of three rows.

| shape      | columns                                                    | row           |
|------------|------------------------------------------------------------|---------------|
| messages   | messages or conversations: role/content                    | ChatRow       |
| sharegpt   | conversations or messages: from/value                      | ChatRow       |
| alpaca     | instruction, output, perhaps input                         | CompletionRow |
| completion | prompt, completion                                         | CompletionRow |
| completion | the same, both as lists of messages                        | ChatRow       |
| text       | text                                                       | TextRow       |

The shape is that of a source's first row; `format` overrides it. A row that differs is a bad row.
Prompt and completion are joined as they are, nothing is put between them. A JSON number or boolean
in a text column is text exactly as the file writes it; null is the empty text in a completion, an
output, an input or a content, and an error in a prompt or a text. What cannot be used (NaN, a key
that stands twice, half a character) is an error only in a column that the shape uses.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trainers.data.messages import ChatRow, chat_row, plain_text
from trainers.data.records import (
    MAX_NAME,
    DataError,
    Origin,
    RowError,
    SuspectColumns,
    Unusable,
    fault_in,
    printable,
)

FORMATS = ("messages", "sharegpt", "alpaca", "completion", "text")
KNOWN_PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "response"),
    ("input", "output"),
)
ROLES = (
    "prompt",
    "completion",
    "text",
    "messages",
    "instruction",
    "input",
    "output",
    "tools",
    "system",
)
CHAT_COLUMNS = ("messages", "conversations")
KNOWN_COLUMNS = frozenset(
    (*ROLES, *CHAT_COLUMNS, "history", *(name for pair in KNOWN_PAIRS for name in pair))
)
NUM_NAMED = 20
SHAPES_HELP = (
    "text; prompt + completion (or question + answer, query + response, prompt + response,"
    " input + output); messages; conversations; instruction + output"
)
# The two prompts of Stanford Alpaca (tatsu-lab/stanford_alpaca, train.py), which its data is made
# for.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True, slots=True)
class TextRow:
    """Plain text: every token is trained."""

    text: str


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """A prompt that is given and a completion that is trained, joined without anything between."""

    prompt: str
    completion: str


Row = TextRow | CompletionRow | ChatRow


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """How a source's rows are read.

    Args:
        format: one of FORMATS.
        columns: (role, column) pairs, e.g. ("prompt", "question").
        recognised: whether the columns were found by their names, not given by a map.
    """

    format: str
    columns: tuple[tuple[str, str], ...]
    recognised: bool

    def describe(self) -> str:
        """For people: "completion (question -> prompt, answer -> completion)"."""
        renamed = [
            f"{printable(column)} -> {role}" for role, column in self.columns if column != role
        ]
        return f"{self.format} ({', '.join(renamed)})" if renamed else self.format


def wanted_columns(column_map: Mapping[str, str]) -> frozenset[str]:
    """Columns that some shape could use."""
    return KNOWN_COLUMNS | frozenset(column_map.values())


def check_columns(column_map: Mapping[str, str], format_name: str | None) -> None:
    """Raises: DataError: a role or a format that does not exist."""
    for role in column_map:
        if role not in ROLES:
            raise DataError(
                f"columns must map roles ({', '.join(ROLES)}) to columns, got role {role!r}"
            )
    if format_name is not None and format_name not in FORMATS:
        raise DataError(f"format must be one of {', '.join(FORMATS)}, got {format_name!r}")


def detect_shape(
    columns: Mapping[str, Any],
    origin: Origin,
    *,
    column_map: Mapping[str, str],
    format_name: str | None = None,
) -> RowShape:
    """The shape of a source from its first row.

    Raises: DataError: no known shape, or a mapped column that is not there; names the columns
        found.
    """
    check_columns(column_map, format_name)
    missing = [column for column in column_map.values() if column not in columns]
    if missing:
        raise DataError(
            f"{origin}: columns names {printable(repr(missing[0]))}, found {_names(columns)}"
        )
    roles = _roles(columns, column_map)
    found = format_name or _format_of(columns, roles)
    if found is None and "conversations" in columns:
        # Not a list in this row alone, perhaps: then this row is bad, and not the whole source.
        roles["messages"], found = "conversations", "sharegpt"
    if found is None or not _needed(found) <= roles.keys():
        asked = (
            f"format {found} needs {' + '.join(sorted(_needed(found)))}"
            if found
            else "no known row shape"
        )
        raise DataError(
            f"{origin}: {asked}, found columns {_names(columns)}{_first_fault(columns)};"
            f" known are {SHAPES_HELP}; or map them, e.g. columns:"
            f" {{prompt: question, completion: answer}}"
        )
    used = (*sorted(_needed(found)), *_optional(found))
    pairs = tuple((role, roles[role]) for role in used if role in roles)
    return RowShape(format=found, columns=pairs, recognised=not column_map)


def _names(columns: Iterable[str]) -> str:
    names = [printable(name, MAX_NAME) for name in columns]
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return (", ".join(names[:NUM_NAMED]) or "none") + more


def _first_fault(columns: Mapping[str, Any]) -> str:
    reasons = (value.reason for value in columns.values() if isinstance(value, Unusable))
    return next((f" ({reason})" for reason in reasons), "")


def _needed(format_name: str) -> set[str]:
    return {
        "messages": {"messages"},
        "sharegpt": {"messages"},
        "alpaca": {"instruction", "output"},
        "completion": {"prompt", "completion"},
        "text": {"text"},
    }[format_name]


def _optional(format_name: str) -> tuple[str, ...]:
    chat = ("system", "tools")
    return {"alpaca": ("input", "system", "history"), "completion": ("tools",), "text": ()}.get(
        format_name, chat
    )


def _roles(columns: Mapping[str, Any], column_map: Mapping[str, str]) -> dict[str, str]:
    """Role -> column: the map's, then columns that carry a role's own name, then known pairs."""
    roles = {name: name for name in (*ROLES, "history") if name in columns}
    chat = next((name for name in CHAT_COLUMNS if _is_list(columns.get(name))), None)
    if chat:
        roles["messages"] = chat
    pair = next((pair for pair in KNOWN_PAIRS if set(pair) <= columns.keys()), None)
    if pair:
        roles |= dict(zip(("prompt", "completion"), pair, strict=True))
    return roles | dict(column_map)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def _format_of(columns: Mapping[str, Any], roles: Mapping[str, str]) -> str | None:
    for name in FORMATS:
        if _needed(name) <= roles.keys():
            return _chat_dialect(columns[roles["messages"]]) if name == "messages" else name
    return None


def _chat_dialect(messages: Any) -> str:
    first = messages[0] if isinstance(messages, list) and messages else {}
    return "sharegpt" if isinstance(first, dict) and "from" in first else "messages"


def normalised_row(columns: Mapping[str, Any], shape: RowShape) -> Row:
    """The row in one of three forms.

    Raises: RowError: it does not have its source's shape, or a value that cannot be trained.
    """
    values = {role: columns.get(column) for role, column in shape.columns}
    if isinstance(columns, SuspectColumns):
        reason = next(filter(None, map(fault_in, values.values())), None)
        if reason:
            raise RowError(reason)
    absent = [
        column
        for role, column in shape.columns
        if role in _needed(shape.format) and column not in columns
    ]
    if absent:
        raise RowError(
            f"must have column {absent[0]!r} as the first row has, found {_names(columns)}"
        )
    if shape.format == "text":
        return TextRow(_required_text(values["text"], "text"))
    if shape.format == "alpaca":
        return _alpaca_row(values)
    if shape.format == "completion":
        return _completion_row(values)
    return chat_row(values["messages"], system=values.get("system"), tools=values.get("tools"))


def _required_text(value: Any, name: str) -> str:
    if value is None:
        raise RowError(f"{name} must be text, is null")
    return plain_text(value, name)


def _completion_row(values: Mapping[str, Any]) -> Row:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return chat_row(prompt + completion, tools=values.get("tools"), num_context=len(prompt))
    return CompletionRow(_required_text(prompt, "prompt"), plain_text(completion, "completion"))


def _alpaca_row(values: Mapping[str, Any]) -> CompletionRow:
    if values.get("history"):
        raise RowError("alpaca rows with history are not read; write them as messages")
    instruction = _required_text(values["instruction"], "instruction")
    given = plain_text(values.get("input"), "input")
    # str.replace and not str.format: braces in the user's text are text.
    form = ALPACA_WITH_INPUT if given else ALPACA_WITHOUT_INPUT
    before, _, after = form.partition("{instruction}")
    prompt = before + instruction + after.replace("{input}", given)
    system = plain_text(values.get("system"), "system")
    return CompletionRow(
        f"{system}\n\n{prompt}" if system else prompt, plain_text(values["output"], "output")
    )


def row_digest(row: Row) -> bytes:
    """16 bytes that stand for a row's content, whatever the tokenizer: splits and duplicates."""
    if isinstance(row, ChatRow):
        parts: tuple[Any, ...] = ("chat", row.messages, row.tools, row.trained)
    elif isinstance(row, CompletionRow):
        parts = ("completion", row.prompt, row.completion)
    else:
        parts = ("text", row.text)
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
