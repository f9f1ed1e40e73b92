"""Chat rows: the dialects of message lists, brought to role/content with structured tool calls.

Content is text: null is empty, a list of text parts is joined. A tool's result may also be a JSON
object or list, which becomes its JSON text, as `json.dumps(..., ensure_ascii=False)` writes it but
with numbers as the file has them; a JSON string is text and is not read again.

A message's `weight` (or `train`, or `loss`; 0, 1, false, true) chooses whether an assistant message
is trained. On other messages it may say 0, which holds anyway; anything else is refused, because
only assistant messages are trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainers.data.json_rows import SourceFloat, SourceInt
from trainers.data.records import RowError
from trainers.data.tool_calls import (
    calls_from_text,
    function_schemas,
    is_tool_data,
    json_text,
    json_value,
    message_calls,
)

ROLE_NAMES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "function_call": "function_call",
}
LOSS_KEYS = ("weight", "train", "loss")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
CONTENT_KEYS = ("content", "value", "tool_calls", "function_call")


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation.

    Args:
        messages: dicts with role, content (always text) and what else the row gave.
        tools: function schemas as {"type": "function", "function": {...}}, or None.
        trained: for each message whether it is trained; only assistant messages can be.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None
    trained: tuple[bool, ...]


def plain_text(value: Any, name: str) -> str:
    """A value of a text column as text: null is empty, a JSON number or boolean is as it is
    written.

    Raises: RowError: a list, an object, a timestamp or another value that has no text of its own.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, SourceInt | SourceFloat):
        return value.source
    if isinstance(value, int | float):  # typed columns of parquet
        return str(value)
    raise RowError(f"{name} must be text, is {type(value).__name__}; convert it to a string")


def chat_row(
    messages: Any, *, system: Any = None, tools: Any = None, num_context: int = 0
) -> ChatRow:
    """A conversation in any dialect as a ChatRow.

    Args: num_context: so many leading messages are given, not trained, assistant or not.
    Raises: RowError: empty, an unknown role, content that is not text, nothing to train.
    """
    if isinstance(messages, str):  # a csv column can hold a list only as its JSON text
        messages = json_value(messages, "messages")
    if not isinstance(messages, list):
        raise RowError(f"messages must be a list, is {type(messages).__name__}")
    if not messages:
        raise RowError("messages must hold at least one message, is empty")
    read = [_message(message, index) for index, message in enumerate(messages, start=1)]
    trained = [
        _has_loss(raw, message["role"], number) and number > num_context
        for number, (message, raw) in enumerate(zip(read, messages, strict=True), start=1)
    ]
    system_text = plain_text(system, "system")
    if system_text:
        if read[0]["role"] == "system":
            raise RowError("has a system column and a system message; keep one")
        read, trained = [{"role": "system", "content": system_text}, *read], [False, *trained]
    return ChatRow(tuple(read), function_schemas(tools), tuple(trained))


def _has_loss(raw: Mapping[str, Any], role: str, number: int) -> bool:
    """Whether a message's weights and role make it trained."""
    given = [(key, raw[key]) for key in LOSS_KEYS if raw.get(key) is not None]
    for key, value in given:
        if value not in (0, 1):
            raise RowError(f"message {number}: {key} must be 0 or 1, is {value!r}")
        if value and role != "assistant":
            raise RowError(
                f"message {number}: only assistant messages are trained, {key} is {value!r} on a"
                f" {role} message; remove it or set it to 0"
            )
    if len({bool(value) for _, value in given}) > 1:
        names = " and ".join(key for key, _ in given)
        raise RowError(f"message {number}: {names} must say the same; keep one")
    return role == "assistant" and all(value for _, value in given)


def _message(raw: Any, number: int) -> dict[str, Any]:
    """role/content or from/value -> role/content; keys that are null are left out, as transformers
    does."""
    if not isinstance(raw, dict):
        raise RowError(f"message {number} must be an object, is {type(raw).__name__}")
    name = raw.get("role", raw.get("from"))
    role = ROLE_NAMES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError(
            f"message {number}: unknown role {name!r}; known are {', '.join(ROLE_NAMES)}"
        )
    if not raw.keys() & set(CONTENT_KEYS):
        raise RowError(f"message {number} must have content, found {', '.join(raw)}")
    content = _content(raw.get("content", raw.get("value")), role, number)
    if role == "function_call":
        calls = calls_from_text(content, number)
        return {"role": "assistant", "content": "", "tool_calls": calls}
    handled = {"role", "from", *CONTENT_KEYS, *LOSS_KEYS}
    others = {key: value for key, value in raw.items() if key not in handled and value is not None}
    for key in others.keys() & set(REASONING_KEYS):
        others[key] = plain_text(others[key], f"message {number}: {key}")
    message = {"role": role, "content": content, **others}
    calls = message_calls(raw, role, number)
    return {**message, "tool_calls": calls} if calls else message


def _content(value: Any, role: str, number: int) -> str:
    if role == "tool" and is_tool_data(value):
        return json_text(value)
    if isinstance(value, list):
        return "".join(_part_text(part, number) for part in value)
    return plain_text(value, f"message {number}: content")


def _part_text(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    if (
        isinstance(part, dict)
        and part.get("type", "text") == "text"
        and isinstance(part.get("text"), str)
    ):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise RowError(f"message {number}: content parts must be text, one is {kind}")
