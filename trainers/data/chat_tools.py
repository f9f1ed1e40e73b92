"""A conversation in the form that a template can show: tools as text, a folded system message."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainers.data.chat_render import Message, plain_values, to_json
from trainers.data.messages import ChatRow
from trainers.data.records import RowError

SYSTEM_ROLES = ("system", "developer")
TOOLS_INTRODUCTION = (
    "You may call these functions. To call one, answer with its name and arguments as JSON"
    " within <tool_call></tool_call>."
)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What is rendered of a row.

    Args:
        messages, tools: as in ChatRow, in the template's form.
        trained: for each message whether it is trained.
        num_added: so many messages stand before the row's own; below 0, so many were folded.
    """

    messages: tuple[Message, ...]
    tools: Any
    trained: tuple[bool, ...]
    num_added: int = 0

    @classmethod
    def of(cls, row: ChatRow) -> "Conversation":
        """A row as it is."""
        return cls(messages=row.messages, tools=row.tools, trained=row.trained)

    def number(self, index: int) -> int:
        """The row's own number of a message, from 1; 0 for one that was added."""
        return index + 1 - self.num_added

    def has_system(self) -> bool:
        return self.messages[0]["role"] in SYSTEM_ROLES


def with_calls_as_text(conversation: Conversation) -> Conversation:
    """Tool calls as <tool_call>{json}</tool_call> in the content, the form of Hermes and Qwen."""
    return replace(conversation, messages=tuple(_call_as_content(m) for m in conversation.messages))


def _call_as_content(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = (
        f"<tool_call>\n{to_json(plain_values(call['function']))}\n</tool_call>"
        for call in message["tool_calls"]
    )
    parts = [message["content"], *calls] if message["content"] else list(calls)
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(parts)}


def with_text_arguments(conversation: Conversation) -> Conversation:
    """Tool call arguments as their JSON text, for templates that put them in as they are."""
    return replace(
        conversation, messages=tuple(_with_text_arguments(m) for m in conversation.messages)
    )


def _with_text_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls: list[dict[str, Any]] = []
    for call in message["tool_calls"]:
        arguments = to_json(plain_values(call["function"]["arguments"]))
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def with_tools_in_system(conversation: Conversation) -> Conversation:
    """Function schemas written into the system message, or into one of their own."""
    listed = "\n".join(to_json(plain_values(tool)) for tool in conversation.tools)
    text = f"{TOOLS_INTRODUCTION}\n<tools>\n{listed}\n</tools>"
    first, *others = conversation.messages
    if conversation.has_system():
        joined = {**first, "content": _joined([first["content"], text])}
        return replace(conversation, messages=(joined, *others), tools=None)
    return Conversation(
        messages=({"role": "system", "content": text}, *conversation.messages),
        tools=None,
        trained=(False, *conversation.trained),
        num_added=conversation.num_added + 1,
    )


def with_folded_system(conversation: Conversation) -> Conversation:
    """Leading system messages put before the text of the user's first: field case A09.

    Raises: RowError: no user message follows at once.
    """
    count = _num_leading_system(conversation.messages)
    if not count:
        return conversation
    leading, others = conversation.messages[:count], conversation.messages[count:]
    if not others or others[0]["role"] != "user":
        found = others[0]["role"] if others else "nothing"
        raise RowError(
            "system_role: fold needs a user message right after the system message, found"
            f" {found}; remove the system message or put a user message there"
        )
    content = _joined([*(message["content"] for message in leading), others[0]["content"]])
    return replace(
        conversation,
        messages=({**others[0], "content": content}, *others[1:]),
        trained=conversation.trained[count:],
        num_added=conversation.num_added - count,
    )


def _num_leading_system(messages: Sequence[Message]) -> int:
    roles = (message["role"] for message in messages)
    return next(
        (count for count, role in enumerate(roles) if role not in SYSTEM_ROLES), len(messages)
    )


def _joined(texts: Iterable[str]) -> str:
    return "\n\n".join(text for text in texts if text)
