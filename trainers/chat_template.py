"""Chat templates: rendering as transformers does it, and where in the text the assistant speaks.

The assistant's spans come from the template's {% generation %} tags where it has them; otherwise by
rendering prefixes of the conversation: what follows the generation prompt, up to and with the end
of turn. Either way they are verified, and a row whose spans cannot be is refused: nothing is
trained that was not found. Rendering reads the clock where a template does (`strftime_now`), as in
transformers.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainers.messages import ChatRow
from trainers.records import DataError, RowError

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
USER_PROBE, ASSISTANT_PROBE = "usersaysthis", "assistantsaysthat"
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
TOOLS_INTRODUCTION = (
    "You may call these functions. To call one, answer with its name and arguments as JSON"
    " within <tool_call></tool_call>."
)

Span = tuple[int, int]


class GenerationSpans(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}: notes which characters of the output it wraps."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(generation_spans=self)
        self.blocks: list[str] = []
        self.spans: list[Span] = []

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = caller()
        start = sum(map(len, self.blocks))
        self.spans.append((start, start + len(text)))
        return text

    @contextmanager
    def noting(self) -> Iterator[tuple[list[str], list[Span]]]:
        """Blocks to fill with the output so far, and the spans found in it."""
        self.blocks, self.spans = [], []
        yield self.blocks, self.spans
        self.blocks, self.spans = [], []


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    """The settings of transformers' `_cached_compile_jinja_template` (5.24)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationSpans, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _plain(value: Any) -> Any:
    """Exact JSON types only: the template is foreign code, and a number prints as a number."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, float) else value


def _with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under the names that templates read, as transformers does."""
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
    return (
        message
        if reasoning is None
        else {"thinking": reasoning, **message, "reasoning_content": reasoning}
    )


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as text, and the character spans that are the assistant's."""

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """A compiled, probed chat template.

    Args:
        source: Jinja.
        special_tokens: name -> text, the variables bos_token and so on.
        markers: texts of the tokenizer's added tokens, among which the end of turn is looked for.
    Raises:
        DataError: it does not compile, cannot render a user and an assistant turn, ends an
            assistant turn with nothing, or its generation tags wrap the wrong text.
    """

    def __init__(
        self, source: str, special_tokens: dict[str, str], markers: Sequence[str] = ()
    ) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"chat template does not compile: {error.message} (line {error.lineno})"
            ) from error
        self._noter: GenerationSpans = environment.generation_spans  # type: ignore[attr-defined]
        self.special_tokens = special_tokens
        self.has_generation_tags = bool(GENERATION_TAG.search(source))
        self.knows_tools = "tools" in source
        self.knows_tool_calls = "tool_calls" in source
        self.wrote_tools_as_text = False
        self.end_of_turn = self._probed_end(markers)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Any = None,
        *,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """Text and generation spans; without tags there are none.

        Raises: RowError: the template refuses the conversation, with its reason.
        """
        values = {
            **self.special_tokens,
            "messages": [_with_reasoning_names(_plain(message)) for message in messages],
            "tools": _plain(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        with self._noter.noting() as (blocks, spans):
            try:
                blocks.extend(self._template.generate(values))
            except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
                raise RowError(f"the chat template refuses the conversation: {error}") from error
            return Rendered(text="".join(blocks), spans=tuple(spans))

    def _probed_end(self, markers: Sequence[str]) -> str:
        """The text that ends an assistant turn, found by rendering one."""
        pair = [
            {"role": "user", "content": USER_PROBE},
            {"role": "assistant", "content": ASSISTANT_PROBE},
        ]
        try:
            rendered = self.render(pair)
        except RowError as error:
            raise DataError(
                f"chat template must render a user and an assistant turn: {error}"
            ) from error
        _, found, tail = rendered.text.rpartition(ASSISTANT_PROBE)
        end = _first_marker(tail, markers)
        if not found or not end:
            raise DataError(
                "chat template must end an assistant turn with an end token or text, found"
                f" {tail!r}; without it no answer ever learns to stop"
            )
        if self.has_generation_tags:
            _check_tagged(rendered)
        return end

    def assistant_spans(self, row: ChatRow) -> Rendered:
        """The conversation's text, and the spans of its trained assistant turns, ends of turn
        included.

        Raises: RowError: the template refuses the row, or spans cannot be verified.
        """
        messages, tools = self.with_tools_as_text(row)
        offset = len(messages) - len(row.messages)
        trained = (*(False for _ in range(offset)), *row.trained)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        rendered = self.render(messages, tools)
        if self.has_generation_tags:
            spans = self._tagged_spans(rendered, [trained[i] for i in turns])
        else:
            found = (
                self._prefix_span(rendered.text, messages, tools, i) for i in turns if trained[i]
            )
            spans = tuple(found)
        return Rendered(text=rendered.text, spans=spans)

    def _tagged_spans(self, rendered: Rendered, trained: list[bool]) -> tuple[Span, ...]:
        """Each tagged span, extended by the end of turn where the tags leave it out."""
        spans = [span for span in rendered.spans if span[1] > span[0]]
        if not all(trained):
            if len(spans) != len(trained):
                raise RowError(
                    f"has per-message weights, but the chat template tags {len(spans)} spans for"
                    f" {len(trained)} assistant messages"
                )
            spans = [span for span, keep in zip(spans, trained, strict=True) if keep]
        ends = (end + len(self._end_at(rendered.text, start, end)) for start, end in spans)
        return tuple(zip((start for start, _ in spans), ends, strict=True))

    def _end_at(self, text: str, start: int, end: int) -> str:
        has_end = text[start:end].rstrip().endswith(self.end_of_turn)
        return self.end_of_turn if not has_end and text.startswith(self.end_of_turn, end) else ""

    def _prefix_span(
        self, text: str, messages: list[dict[str, Any]], tools: Any, turn: int
    ) -> Span:
        before = self.render(messages[:turn], tools, add_generation_prompt=True).text
        if not before or not text.startswith(before):
            raise RowError(
                f"message {turn + 1}: where the assistant speaks cannot be verified, the template"
                " renders"
                " the turns before it differently later; use a template with {% generation %} tags"
            )
        content = messages[turn]["content"].strip()
        limit = self._turn_limit(text, messages, tools, turn, len(before))
        end = text.rfind(self.end_of_turn, len(before), limit)
        if end < 0 or content not in text[len(before) : end]:
            raise RowError(
                f"message {turn + 1}: the assistant's text and its end {self.end_of_turn!r} are"
                " not where"
                " the chat template should put them; use a template with {% generation %} tags"
            )
        return len(before), end + len(self.end_of_turn)

    def _turn_limit(
        self, text: str, messages: list[dict[str, Any]], tools: Any, turn: int, start: int
    ) -> int:
        """Where the turn is over: at the end of the conversation rendered up to it; or, for
        templates that render a turn differently once it is not the last (thinking), at the first
        end of turn behind its content."""
        upto = self.render(messages[: turn + 1], tools).text
        if text.startswith(upto):
            return len(upto)
        content = messages[turn]["content"].strip()
        found = text.find(content, start)
        end = text.find(self.end_of_turn, found + len(content))
        # An end of turn in between means that the content was found in a later turn.
        is_own = content and 0 <= found < end and self.end_of_turn not in text[start:found]
        return end + len(self.end_of_turn) if is_own else start

    def with_tools_as_text(self, row: ChatRow) -> tuple[list[dict[str, Any]], Any]:
        """Messages and tools in the form that this template can show: calls become
        <tool_call>{json}</tool_call> in the content (the form of Hermes and Qwen), and schemas a
        system message, where the template does not know of them. Nothing is lost silently."""
        has_calls = any("tool_calls" in message for message in row.messages)
        self.wrote_tools_as_text |= has_calls and not self.knows_tool_calls
        messages = [m if self.knows_tool_calls else _call_as_content(m) for m in row.messages]
        if row.tools is None or self.knows_tools:
            return messages, row.tools
        self.wrote_tools_as_text = True
        listed = "\n".join(_to_json(_plain(tool)) for tool in row.tools)
        text = f"{TOOLS_INTRODUCTION}\n<tools>\n{listed}\n</tools>"
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": text}, *messages], None
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]], None


def _call_as_content(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = (
        f"<tool_call>\n{_to_json(_plain(call['function']))}\n</tool_call>"
        for call in message["tool_calls"]
    )
    parts = [message["content"], *calls] if message["content"] else list(calls)
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(parts)}


def _first_marker(tail: str, markers: Sequence[str]) -> str:
    """The added token that follows the content, or else the text that does."""
    stripped = tail.lstrip()
    found = [marker for marker in markers if marker and stripped.startswith(marker)]
    return max(found, key=len, default=stripped.rstrip())


def _check_tagged(rendered: Rendered) -> None:
    tagged = "".join(rendered.text[start:end] for start, end in rendered.spans)
    if ASSISTANT_PROBE not in tagged or USER_PROBE in tagged:
        raise DataError(
            "chat template's generation tags must wrap the assistant's text and nothing else,"
            f" wrap {tagged!r}"
        )
