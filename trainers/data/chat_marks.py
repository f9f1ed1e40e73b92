"""Whose text stands where in a rendered conversation, found by rendering it once more with marks.

Every text of the conversation is put between two private-use characters, which templates pass on
like any others. Where the marked rendering without its marks is the real one, the marks show where
each text went: verbatim, trimmed, escaped as JSON, moved, or left out.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainers.data.chat_render import Message, Span
from trainers.data.messages import REASONING_KEYS
from trainers.data.records import RowError

PRIVATE_PLANES = (0xF0000, 0x100000)
MARKS_PER_PLANE = 0xFFFE
END_OF_THINKING = "</think>"
THINKING_TAGS = re.compile(r"(<think>|</think>)")

Kind = Literal["content", "reasoning", "name", "argument"]
# Around every text, blank ones too; not around blank ones, where the template asks whether there is
# text; in the middle of texts, where it looks at how they begin or end (Qwen3: <tool_response>).
Placement = Literal["everywhere", "around", "middle"]
PLACEMENTS: tuple[Placement, ...] = ("everywhere", "around", "middle")


@dataclass(frozen=True, slots=True)
class Piece:
    """One marked text of a conversation: of which message, what it is, and its two halves."""

    message: int
    kind: Kind
    left: str
    right: str


@dataclass(frozen=True)
class Marked:
    """Messages with marks in their texts."""

    messages: tuple[Message, ...]
    pieces: tuple[Piece, ...]
    first: int


@dataclass(frozen=True)
class Located:
    """A rendered text, and where in it each piece stands (several times, or never)."""

    text: str
    pieces: tuple[Piece, ...]
    places: tuple[tuple[Span, ...], ...]

    def of(self, message: int) -> list[int]:
        """Numbers of a message's pieces that stand in the text."""
        return [i for i, p in enumerate(self.pieces) if p.message == message and self.places[i]]

    def first(self, message: int) -> list[Span]:
        """Where a message's texts stand; a tool's name may stand again in the tool's answer."""
        return [self.places[i][0] for i in self.of(message)]

    def said(self, messages: Sequence[int], kinds: Sequence[Kind] = ("content",)) -> list[Span]:
        """Every place where something of these kinds stands that one of these messages says."""
        pairs = zip(self.pieces, self.places, strict=True)
        found = (places for p, places in pairs if p.kind in kinds and p.message in messages)
        return [span for places in found for span in places]

    def left_out(self, kinds: Sequence[Kind]) -> list[int]:
        """Messages with a text of these kinds that does not stand in the rendered text."""
        pairs = zip(self.pieces, self.places, strict=True)
        lost = (p for p, places in pairs if not places and p.left + p.right)
        return sorted({p.message for p in lost if p.kind in kinds})


def free_marks(text: str, number: int) -> int | None:
    """The first of so many private-use characters in a row that the text has none of."""
    used = {ord(char) for char in text if ord(char) >= PRIVATE_PLANES[0]}
    for plane in PRIVATE_PLANES:
        for first in range(plane, plane + MARKS_PER_PLANE - number + 1, max(1, number)):
            if used.isdisjoint(range(first, first + number)):
                return first
    return None


def marked(
    messages: Sequence[Message], placement: Placement, first: int = PRIVATE_PLANES[0]
) -> Marked:
    """Messages with their texts marked, in order of messages.

    Args: first: the first of the private-use characters that are the marks.
    Raises: RowError: more texts than there are marks for.
    """
    pieces: list[Piece] = []

    def mark(text: str, message: int, kind: Kind) -> str:
        core = text.strip()
        if not core and placement != "everywhere":
            return text
        if 2 * len(pieces) >= MARKS_PER_PLANE:
            raise RowError(f"must have at most {MARKS_PER_PLANE // 2} texts in one conversation")
        start = text.index(core)
        half = len(core) // 2
        number = first + 2 * len(pieces)
        pieces.append(Piece(message, kind, core[:half], core[half:]))
        opening, closing = chr(number), chr(number + 1)
        inner = (
            f"{opening}{core}{closing}"
            if placement != "middle"
            else f"{core[:half]}{opening}{closing}{core[half:]}"
        )
        return text[:start] + inner + text[start + len(core) :]

    changed = [_marked_message(message, index, mark) for index, message in enumerate(messages)]
    return Marked(tuple(changed), tuple(pieces), first)


Mark = Callable[[str, int, Kind], str]


def _marked_message(message: Message, index: int, mark: Mark) -> Message:
    changed = dict(message)
    for key in REASONING_KEYS:
        if isinstance(message.get(key), str):
            changed[key] = mark(message[key], index, "reasoning")
    changed["content"] = _marked_content(message, index, mark)
    if message.get("tool_calls"):
        changed["tool_calls"] = [_marked_call(call, index, mark) for call in message["tool_calls"]]
    return changed


def _marked_content(message: Message, index: int, mark: Mark) -> str:
    content = message["content"]
    if message["role"] != "assistant":
        return mark(content, index, "content")
    if message.get("tool_calls") and not content.strip():
        return content  # it says nothing, and Gemma 4 puts it behind the tool's answer
    if END_OF_THINKING not in content:
        return mark(content, index, "content")
    # Templates part an answer from the thoughts before it, and may leave those out.
    *thoughts, answer = THINKING_TAGS.split(content)
    marked_thoughts = (
        text if THINKING_TAGS.fullmatch(text) else mark(text, index, "reasoning")
        for text in thoughts
    )
    return "".join(marked_thoughts) + mark(answer, index, "content")


def _marked_call(call: dict[str, Any], index: int, mark: Mark) -> dict[str, Any]:
    function = call["function"]
    name = mark(function["name"], index, "name")
    arguments = _marked_strings(function["arguments"], index, mark)
    return {**call, "function": {**function, "name": name, "arguments": arguments}}


def _marked_strings(value: Any, index: int, mark: Mark) -> Any:
    if isinstance(value, dict):
        return {key: _marked_strings(item, index, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [_marked_strings(item, index, mark) for item in value]
    return mark(value, index, "argument") if isinstance(value, str) else value


def located(text: str, conversation: Marked) -> Located:
    """The rendered text without marks, and where they stood in it."""
    first, pieces = conversation.first, conversation.pieces
    blocks: list[str] = []
    offset = 0
    opened: dict[int, int] = {}
    found: list[list[Span]] = [[] for _ in pieces]
    # Odd parts are the marks.
    last = first + max(1, 2 * len(pieces)) - 1
    parts = re.split(f"([{chr(first)}-{chr(last)}])", text)
    for number, part in enumerate(parts):
        if number % 2 == 0:
            blocks.append(part)
            offset += len(part)
            continue
        piece, is_close = divmod(ord(part) - first, 2)
        if is_close:
            found[piece].append((opened.pop(piece, offset), offset))
        else:
            opened[piece] = offset
    for piece, start in opened.items():
        found[piece].append((start, start))
    plain = "".join(blocks)
    places = (
        tuple(_widened(plain, piece, span) for span in spans)
        for piece, spans in zip(pieces, found, strict=True)
    )
    return Located(plain, pieces, tuple(places))


def _widened(text: str, piece: Piece, span: Span) -> Span:
    """A mark in the middle of a text stands for the whole, where that is written verbatim."""
    start, stop = span[0] - len(piece.left), span[0] + len(piece.right)
    is_middle = span[0] == span[1] and start >= 0
    return (start, stop) if is_middle and text[start:stop] == piece.left + piece.right else span
