"""Chat rows: the dialects of message lists, brought to role/content with structured tool calls."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainers.json_rows import SourceFloat, SourceInt
from trainers.records import RowError

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
        messages = _json_value(messages, "messages")
    if not isinstance(messages, list):
        raise RowError(f"messages must be a list, is {type(messages).__name__}")
    if not messages:
        raise RowError("messages must hold at least one message, is empty")
    read = [_message(message, index) for index, message in enumerate(messages, start=1)]
    trained = [
        index >= num_context and message["role"] == "assistant" and _has_loss(raw, index)
        for index, (message, raw) in enumerate(zip(read, messages, strict=True))
    ]
    system_text = plain_text(system, "system")
    if system_text:
        if read[0]["role"] == "system":
            raise RowError("has a system column and a system message; keep one")
        read, trained = [{"role": "system", "content": system_text}, *read], [False, *trained]
    return ChatRow(tuple(read), _tools(tools), tuple(trained))


def _has_loss(raw: Mapping[str, Any], index: int) -> bool:
    value = next((raw[key] for key in LOSS_KEYS if raw.get(key) is not None), True)
    if value not in (0, 1):
        raise RowError(f"message {index + 1}: weight must be 0 or 1, is {value!r}")
    return bool(value)


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
    if not raw.keys() & {"content", "value", "tool_calls"}:
        raise RowError(f"message {number} must have content, found {', '.join(raw)}")
    content = _content(raw.get("content", raw.get("value")), number)
    if role == "function_call":
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [_call_from_text(content, number)],
        }
    handled = {"role", "from", "content", "value", "tool_calls", *LOSS_KEYS}
    others = {key: value for key, value in raw.items() if key not in handled and value is not None}
    message = {"role": role, "content": content, **others}
    if raw.get("tool_calls"):
        message["tool_calls"] = [_tool_call(call, number) for call in raw["tool_calls"]]
    return message


def _content(value: Any, number: int) -> str:
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


def _call_from_text(text: str, number: int) -> dict[str, Any]:
    """ShareGPT's function_call turn: the call as JSON text."""
    return _tool_call(_json_value(text, f"message {number}: function_call"), number)


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    """One form for a bare call and OpenAI's, arguments as dict and as JSON text (field case
    A16)."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"message {number}: a tool call must have a name and arguments")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _json_value(arguments, f"message {number}: tool call arguments")
    if not isinstance(arguments, dict):
        raise RowError(f"message {number}: tool call arguments must be an object")
    kept = {key: call[key] for key in ("id",) if call.get(key) is not None}
    return {
        **kept,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _json_value(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"{name} must be JSON: {error.msg} (column {error.colno})") from error


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """Function schemas from a list or its JSON text; bare schemas are wrapped as OpenAI does."""
    if isinstance(value, str) and value.strip():
        value = _json_value(value, "tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("tools must be a list of function schemas")
    return tuple(
        tool if "function" in tool else {"type": "function", "function": tool} for tool in value
    )
