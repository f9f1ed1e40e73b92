"""Chat templates: conversations as text, and where in it the assistant speaks.

The assistant's spans come from the template's {% generation %} tags where it has them; otherwise
from where generation would begin and where the turn ends. Either way the conversation is rendered
once more with its texts marked (chat_marks.py), which shows whose text stands where: a span that
holds another's text, a message that is rendered nowhere, or a turn that is not where it should be
makes the row a bad one. Nothing is trained that was not found.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from itertools import takewhile
from typing import Any

from trainers.data.chat_marks import PLACEMENTS, Located, Marked, free_marks, located, marked
from trainers.data.chat_render import Message, Rendered, Renderer
from trainers.data.chat_spans import OTHER_TEMPLATE, TurnFinder
from trainers.data.chat_tools import (
    Conversation,
    with_calls_as_text,
    with_folded_system,
    with_text_arguments,
    with_tools_in_system,
)
from trainers.data.messages import ChatRow
from trainers.data.records import DataError, RowError

__all__ = ["ChatTemplate", "Rendered"]

USER_PROBE, ASSISTANT_PROBE = "usersaysthis", "assistantsaysthat"
PROBE = ({"role": "user", "content": USER_PROBE}, {"role": "assistant", "content": ASSISTANT_PROBE})
TOOL_PROBE, ARGUMENT_PROBE = "probetool", "probevalue"
PROBE_SCHEMA = {
    "type": "function",
    "function": {
        "name": TOOL_PROBE,
        "description": "probe",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "probe"}},
            "required": ["key"],
        },
    },
}
# Mistral takes call ids of nine letters and digits only.
PROBE_CALL = {
    "id": "a1b2c3d4e",
    "type": "function",
    "function": {"name": TOOL_PROBE, "arguments": {"key": ARGUMENT_PROBE}},
}
FOLD_OFFER = (
    "system_role: fold puts the system message's text before the first user message's instead"
)


class ChatTemplate:
    """A compiled, probed chat template.

    Args:
        source: Jinja.
        special_tokens: name -> text, the variables bos_token and so on.
        markers: texts of the tokenizer's added tokens, among which the end of turn is looked for.
        fold_system: put a leading system (or developer) message, a blank line and the first user
            message's text together, for templates that know no system role (field case A09).
    Attributes:
        end_of_turn: the text that ends the last assistant turn, where generation has to stop.
        has_generation_tags: whether the template says what is the assistant's.
        reads_clock: whether the template writes the date, so that ids differ from day to day.
        wrote_tools_as_text, left_out_reasoning: whether some row so far had its tools written as
            text, or thoughts that the template does not show (Qwen3: those of earlier turns).
    Raises:
        DataError: it does not compile, cannot render a user and an assistant turn, ends an
            assistant turn with nothing, or its generation tags wrap the wrong text.
    """

    def __init__(
        self,
        source: str,
        special_tokens: dict[str, str],
        markers: Sequence[str] = (),
        *,
        fold_system: bool = False,
    ) -> None:
        self._renderer = Renderer(source, special_tokens)
        self._names = {name for name in ("tools", "tool_calls") if name in source}
        self.fold_system = fold_system
        self.reads_clock = self._renderer.reads_clock
        self.wrote_tools_as_text = self.left_out_reasoning = False
        pair = self._probed_pair()
        self.has_generation_tags = bool(pair.spans)
        self._ends = self._probed_ends(pair, markers)
        self.end_of_turn = self._ends[0]
        self._header = self._probed_header()
        self._tags_wrap_header = self.has_generation_tags and self._checked_tags(pair)

    # What the template does, found by rendering small conversations.

    def render(
        self, messages: Sequence[Message], tools: Any = None, *, add_generation_prompt: bool = False
    ) -> Rendered:
        """Text and generation spans; without tags there are none.

        Raises: RowError: the template refuses the conversation, with its reason.
        """
        return self._renderer.render(messages, tools, add_generation_prompt=add_generation_prompt)

    def _probed_pair(self) -> Rendered:
        """A question and its answer, with content as text or, where that prints nothing, as a list
        of parts (templates of vision models)."""
        reason = ""
        for self._renderer.content_in_parts in (False, True):
            try:
                rendered = self.render(PROBE)
            except RowError as error:
                reason = reason or str(error)
                continue
            if USER_PROBE in rendered.text and ASSISTANT_PROBE in rendered.text:
                return rendered
        reason = reason or "it leaves out their text"
        raise DataError(f"chat template must render a user and an assistant turn: {reason}")

    def _probed_ends(self, pair: Rendered, markers: Sequence[str]) -> tuple[str, ...]:
        """The texts that end an assistant turn: the last one, one before others, a tool call."""
        tail = pair.text.rpartition(ASSISTANT_PROBE)[2]
        last = _leading_markers(tail, markers) or [tail.strip()]
        if not last[0]:
            raise DataError(
                "chat template must end an assistant turn with an end token or text, found"
                f" {tail!r}; without it no answer ever learns to stop; use one that writes it"
            )
        tail = self._rendered_or_empty([*PROBE, *PROBE]).partition(ASSISTANT_PROBE)[2]
        inner = _leading_markers(tail, markers)
        # Two tokens may end a turn (Cohere 2); what only the last one has ends the text (Phi 4).
        pairs = zip(last, inner, strict=False)
        same = "".join(one for one, _ in takewhile(lambda both: both[0] == both[1], pairs))
        ends = [same] if same else [*last[:1], *inner[:1]]
        call = {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}
        tail = self._rendered_or_empty([PROBE[0], call]).rpartition(ARGUMENT_PROBE)[2].rstrip()
        closing = max((m for m in markers if m and tail.endswith(m)), key=len, default="")
        if closing and not any(end in tail for end in ends):
            ends.append(closing)
        return tuple(ends)

    def _rendered_or_empty(self, messages: Sequence[Message], tools: Any = None) -> str:
        try:
            return self.render(messages, tools).text
        except RowError:
            return ""

    def _probed_header(self) -> str:
        """The generation prompt, where it is a text of its own."""
        bare = self._rendered_or_empty(PROBE[:1])
        try:
            prompted = self.render(PROBE[:1], add_generation_prompt=True).text
        except RowError:
            return ""
        return prompted.removeprefix(bare) if prompted.startswith(bare) else ""

    def _checked_tags(self, pair: Rendered) -> bool:
        """Whether the tags wrap the header, too (DeepSeek in TRL's training templates).

        Raises: DataError: they wrap the wrong text.
        """
        tagged = "".join(pair.text[start:stop] for start, stop in pair.spans)
        if ASSISTANT_PROBE not in tagged or USER_PROBE in tagged:
            raise DataError(
                "chat template's generation tags must wrap the assistant's text and nothing else,"
                f" wrap {tagged!r}"
            )
        talk = Conversation(messages=PROBE, tools=None, trained=(False, True))
        try:
            start = self._finder(talk, pair.text).start(1, with_thinking=False)
        except RowError:
            return False
        return pair.spans[0][0] < start

    @cached_property
    def _knows_tools(self) -> bool:
        """Whether the template shows function schemas; one that refuses the probe says why itself
        when a row comes."""
        if "tools" not in self._names:
            return False
        try:
            return TOOL_PROBE in self.render(PROBE, [PROBE_SCHEMA]).text
        except RowError:
            return True

    @cached_property
    def _call_form(self) -> str:
        """How the template takes tool calls: "own" (arguments as an object), "text" (arguments as
        JSON text, DeepSeek-V3) or "none" (it does not show them)."""
        if "tool_calls" not in self._names:
            return "none"
        call = {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}
        talk = Conversation(messages=(PROBE[0], call), tools=None, trained=(False, True))
        for form, each in (("own", talk), ("text", with_text_arguments(talk))):
            try:
                text = self.render(each.messages).text
            except RowError:
                continue
            return form if TOOL_PROBE in text and ARGUMENT_PROBE in text else "none"
        return "own"

    # One row.

    def text(self, row: ChatRow) -> str:
        """The conversation's text, for rows of which every token is trained.

        Raises: RowError: the template refuses the row.
        """
        return self._shown(row)[1].text

    def assistant_spans(self, row: ChatRow) -> Rendered:
        """The conversation's text, and the spans of its trained assistant turns, ends of turn
        included; no spans where no message is trained.

        Raises: RowError: the template refuses the row, or spans cannot be verified.
        """
        talk, rendered = self._shown(row)
        if not any(talk.trained):
            return Rendered(text=rendered.text, spans=())
        finder = self._finder(talk, rendered.text)
        if self.has_generation_tags:
            spans = finder.tagged(rendered.spans, tags_wrap_header=self._tags_wrap_header)
        else:
            spans = finder.aligned()
        return Rendered(text=rendered.text, spans=spans)

    def _shown(self, row: ChatRow) -> tuple[Conversation, Rendered]:
        """The row in the form that this template can show, rendered. Nothing is lost silently."""
        talk = self._in_own_form(Conversation.of(row))
        if self.fold_system:
            talk = with_folded_system(talk)
        try:
            return talk, self.render(talk.messages, talk.tools)
        except RowError as error:
            offer = self._fold_offer(talk)
            why = (
                " (it has no place for tools, so their schemas are a system message)"
                if row.tools and not talk.tools
                else ""
            )
            raise RowError(f"{error}{why}; {offer}" if offer else f"{error}{why}") from error

    def _in_own_form(self, talk: Conversation) -> Conversation:
        has_calls = any("tool_calls" in message for message in talk.messages)
        if has_calls and self._call_form == "text":
            talk = with_text_arguments(talk)
        elif has_calls and self._call_form == "none":
            self.wrote_tools_as_text = True
            talk = with_calls_as_text(talk)
        if talk.tools is None or self._knows_tools:
            return talk
        self.wrote_tools_as_text = True
        return with_tools_in_system(talk)

    def _fold_offer(self, talk: Conversation) -> str:
        """The way out for a system message, where it is one."""
        if not talk.has_system():
            return ""
        try:
            folded = with_folded_system(talk)
            self.render(folded.messages, folded.tools)
        except RowError:
            return ""
        return FOLD_OFFER

    def _finder(self, talk: Conversation, text: str) -> TurnFinder:
        conversation, whole = self._traced(talk, text)
        self._check_left_out(talk, whole)
        return TurnFinder(
            whole=whole,
            roles=[message["role"] for message in talk.messages],
            trained=talk.trained,
            ends=self._ends,
            before=partial(self._before, conversation, talk.tools),
            header=self._header,
            number=talk.number,
        )

    def _before(self, conversation: Marked, tools: Any, turn: int) -> Located:
        messages = conversation.messages[:turn]
        text = self.render(messages, tools, add_generation_prompt=True).text
        return located(text, conversation)

    def _traced(self, talk: Conversation, text: str) -> tuple[Marked, Located]:
        """The conversation with marks, and where its texts stand in the real rendering."""
        for placement in PLACEMENTS:
            conversation = marked(talk.messages, placement)
            first = free_marks(text, 2 * len(conversation.pieces))
            if first is None:
                break
            if first != conversation.first:
                conversation = marked(talk.messages, placement, first)
            try:
                found = located(self.render(conversation.messages, talk.tools).text, conversation)
            except RowError:
                continue
            if found.text == text:
                return conversation, found
        raise RowError(
            "where each message's text stands cannot be verified, the chat template renders it"
            f" according to what it says; {OTHER_TEMPLATE}"
        )

    def _check_left_out(self, talk: Conversation, whole: Located) -> None:
        self.left_out_reasoning |= bool(whole.left_out(["reasoning"]))
        lacking = (
            (whole.left_out(["content"]), "text"),
            (whole.left_out(["name"]), "tool call"),
        )
        for indices, what in lacking:
            for index in indices:
                role = talk.messages[index]["role"]
                can_fold = index == 0 and self._fold_offer(talk)
                raise RowError(
                    f"message {talk.number(index)}: the chat template leaves out a {what} of this"
                    f" {role} message; "
                    + (FOLD_OFFER if can_fold else "use a template that shows it, or remove it")
                )


def _leading_markers(tail: str, markers: Sequence[str]) -> list[str]:
    """The added tokens that follow a content directly."""
    found: list[str] = []
    tail = tail.lstrip()
    while marker := max((m for m in markers if m and tail.startswith(m)), key=len, default=""):
        found.append(marker)
        tail = tail[len(marker) :]
    return found
