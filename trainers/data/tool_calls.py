"""Tool calls, tool results and function schemas, brought to one form."""

import json
from typing import Any

from trainers.data.json_rows import SourceFloat, SourceInt, strict_json
from trainers.data.records import RowError

# Parts of a content list that are no text; in a tool's result they are no JSON to be shown.
MEDIA_TYPES = frozenset(
    ("image", "image_url", "audio", "audio_url", "input_audio", "input_image", "video", "video_url")
)


def json_value(text: str, name: str) -> Any:
    """A value that stands as JSON text in a text column, under the rules of files: an object with
    a key twice, and NaN, are refused.

    Raises: RowError: it is not JSON.
    """
    try:
        return strict_json(text)
    except RowError as error:
        raise RowError(f"{name} {error}") from error


def json_text(value: Any) -> str:
    """JSON as `json.dumps(value, ensure_ascii=False)` writes it, but numbers as the file has them
    (1.50 stays 1.50)."""
    if isinstance(value, dict):
        pairs = (f"{json_text(str(key))}: {json_text(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(json_text(item) for item in value) + "]"
    if isinstance(value, SourceInt | SourceFloat):
        return value.source
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:  # a timestamp of parquet
        raise RowError(
            f"must hold JSON values, holds {type(value).__name__}; convert it to a string"
        ) from error


def is_tool_data(content: Any) -> bool:
    """Whether a tool's content is a JSON value, to be shown as its JSON text, and not a text or
    a list of content parts."""
    if isinstance(content, list):
        return not content or not all(_is_part(part) for part in content)
    return isinstance(content, dict)


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    is_media = isinstance(kind, str) and kind in MEDIA_TYPES
    return is_media or (kind == "text" and isinstance(part.get("text"), str))


def message_calls(raw: dict[str, Any], role: str, number: int) -> list[dict[str, Any]]:
    """The calls of a message: `tool_calls`, or OpenAI's older `function_call`.

    Raises: RowError: they are not calls, or not the assistant's.
    """
    calls = raw.get("tool_calls") or []
    if isinstance(calls, str):  # a csv column can hold a list only as its JSON text
        calls = json_value(calls, f"message {number}: tool_calls")
    if not isinstance(calls, list):
        raise RowError(f"message {number}: tool_calls must be a list, is {type(calls).__name__}")
    if raw.get("function_call"):
        calls = [*calls, raw["function_call"]]
    if calls and role != "assistant":
        raise RowError(f"message {number}: only assistant messages can call tools, is {role}")
    return [_tool_call(call, number) for call in calls]


def calls_from_text(text: str, number: int) -> list[dict[str, Any]]:
    """ShareGPT's function_call turn: one call, or a list of calls, as JSON text.

    Raises: RowError: it is not.
    """
    value = json_value(text, f"message {number}: function_call")
    return [_tool_call(call, number) for call in (value if isinstance(value, list) else [value])]


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    """One form for a bare call and OpenAI's, arguments as dict and as JSON text (field case
    A16)."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"message {number}: a tool call must have a name and arguments")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json_value(arguments, f"message {number}: tool call arguments")
    if not isinstance(arguments, dict):
        raise RowError(
            f"message {number}: tool call arguments must be an object, is"
            f" {type(arguments).__name__}"
        )
    kept = {key: call[key] for key in ("id",) if call.get(key) is not None}
    return {
        **kept,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def function_schemas(value: Any) -> tuple[dict[str, Any], ...] | None:
    """Function schemas from a list or its JSON text; bare schemas are wrapped as OpenAI does.

    Raises: RowError: it is no such list.
    """
    if isinstance(value, str) and value.strip():
        value = json_value(value, "tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("tools must be a list of function schemas")
    return tuple(
        tool if "function" in tool else {"type": "function", "function": tool} for tool in value
    )
