"""Rendering chat templates as transformers does, noting what {% generation %} tags wrap."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainers.data.messages import REASONING_KEYS
from trainers.data.records import DataError, RowError

CLOCK = re.compile(r"\bstrftime_now\b")
# What foreign code can raise about a conversation that it does not expect.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)

Span = tuple[int, int]
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as text, and the character spans that are the assistant's."""

    text: str
    spans: tuple[Span, ...]


class GenerationSpans(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}: notes where in the output it stands and its text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(generation_spans=self)
        self.blocks: list[str] = []
        self.notes: list[tuple[int, str]] = []

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = caller()
        self.notes.append((sum(map(len, self.blocks)), text))
        return text

    @contextmanager
    def noting(self) -> Iterator[tuple[list[str], list[tuple[int, str]]]]:
        """Blocks to fill with the output so far, and what was tagged in it."""
        self.blocks, self.notes = [], []
        yield self.blocks, self.notes
        self.blocks, self.notes = [], []


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Transformers' `tojson`; Jinja's own escapes HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def plain_values(value: Any) -> Any:
    """Exact JSON types only: the template is foreign code, and a number prints as a number."""
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, float) else value


def _with_reasoning_names(message: Message) -> Message:
    """Reasoning under the names that templates read, as transformers does."""
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
    return (
        message
        if reasoning is None
        else {"thinking": reasoning, **message, "reasoning_content": reasoning}
    )


def _in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


class Renderer:
    """A compiled template.

    `strftime_now` reads the clock once, when the template is compiled: the renderings of one row
    are compared with each other, and all rows of a set get one date.

    Args:
        source: Jinja.
        special_tokens: name -> text, the variables bos_token and so on.
    Raises:
        DataError: it does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        # The settings of transformers' `_cached_compile_jinja_template` (5.24).
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationSpans, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = datetime.now().strftime
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"chat template does not compile: {error.message} (line {error.lineno})"
            ) from error
        self._noter: GenerationSpans = environment.generation_spans  # type: ignore[attr-defined]
        self.special_tokens = dict(special_tokens)
        self.reads_clock = bool(CLOCK.search(source))
        self.content_in_parts = False

    def render(
        self, messages: Sequence[Message], tools: Any = None, *, add_generation_prompt: bool = False
    ) -> Rendered:
        """Text and generation spans; without tags there are none.

        Raises: RowError: the template refuses the conversation, with its reason.
        """
        given = [_with_reasoning_names(plain_values(message)) for message in messages]
        values = {
            **self.special_tokens,
            "messages": [_in_parts(m) for m in given] if self.content_in_parts else given,
            "tools": plain_values(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        with self._noter.noting() as (blocks, notes):
            try:
                for block in self._template.generate(values):
                    blocks.append(block)
            except TEMPLATE_ERRORS as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise RowError(f"the chat template refuses the conversation: {reason}") from error
            text = "".join(blocks)
        if any(not text.startswith(tagged, start) for start, tagged in notes):
            raise RowError(
                "the chat template's generation tags must stand in its main text, stand in a macro"
                " or a set block, where their place in the output cannot be known"
            )
        spans = ((start, start + len(tagged)) for start, tagged in notes)
        return Rendered(text=text, spans=tuple(span for span in spans if span[1] > span[0]))
