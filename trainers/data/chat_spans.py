"""The assistant's spans in a rendered conversation, from its texts' places in it.

A turn begins where generation would begin: where rendering the messages before it, with the
generation prompt, ends. Only what stands behind the last text before the turn is compared, so that
turns further up may be rendered differently later (thinking left out, tools moved). A turn ends
with the first end of turn behind its own last text. What cannot be found so is refused.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from trainers.data.chat_marks import Kind, Located
from trainers.data.chat_render import Span
from trainers.data.records import RowError

# Generation prompts that begin the thinking: an answer without thoughts is rendered without it.
THINKING_OPENER = re.compile(r"<[^<>]*(?:think|thought|channel)[^<>]*>", re.IGNORECASE)
OTHER_TEMPLATE = (
    "use a template with {% generation %} tags (chat_template: FILE.jinja), or"
    " completion_only: false to train every token"
)

# What nobody else's turn may hold; a tool's name may stand in its answer's header.
TEXTS: tuple[Kind, ...] = ("content", "reasoning")
Before = Callable[[int], Located]


@dataclass(frozen=True, kw_only=True)
class TurnFinder:
    """Finds the spans of one conversation.

    Args:
        whole: the conversation, and where its texts stand in it.
        roles, trained: of each message.
        ends: the texts that end an assistant turn.
        before: the messages before a turn with the generation prompt.
        header: what begins an assistant's turn, where the template has such a text.
        number: a message's number in the row, for people.
    """

    whole: Located
    roles: Sequence[str]
    trained: Sequence[bool]
    ends: Sequence[str]
    before: Before
    header: str
    number: Callable[[int], int]

    def aligned(self) -> tuple[Span, ...]:
        """The trained turns' spans, for a template without generation tags."""
        spans = tuple(self._turn(i) for i, trained in enumerate(self.trained) if trained)
        return self.verified(spans)

    def _turn(self, turn: int) -> Span:
        start = self.start(turn)
        own = self.whole.first(turn)
        spoken = max((stop for _, stop in own), default=start)
        others = self.whole.said([i for i in range(len(self.roles)) if i != turn], TEXTS)
        limit = min((a for a, _ in others if a >= start), default=len(self.whole.text))
        stop = self._end_after(max(spoken, start), limit)
        if stop is None or any(a < start for a, _ in own):
            raise RowError(
                f"message {self.number(turn)}: the assistant's text and its end {self.ends[0]!r} are not"
                f" where the chat template should put them; {OTHER_TEMPLATE}"
            )
        return start, stop

    def _end_after(self, position: int, limit: int) -> int | None:
        """Where the first end of turn behind a position stops; None where there is none."""
        text = self.whole.text
        found = ((text.find(end, position, limit), end) for end in self.ends)
        first = min(((at, -len(end)) for at, end in found if at >= 0), default=None)
        return None if first is None else first[0] - first[1]

    def start(self, turn: int, *, with_thinking: bool = True) -> int:
        """Where the assistant begins to speak.

        Args: with_thinking: an opening of thoughts in the generation prompt is not the assistant's.
        Raises: RowError: the template puts the turn elsewhere.
        """
        for position, prompt in self._prompts(turn):
            for text in _openings(prompt, with_thinking=with_thinking):
                if text and self.whole.text.startswith(text, position):
                    return self._behind_header(turn, position + len(text))
        raise RowError(
            f"message {self.number(turn)}: where the assistant speaks cannot be verified, the template"
            f" renders {'the turns before it' if turn else 'it'} differently later;"
            f" {OTHER_TEMPLATE}"
        )

    def _prompts(self, turn: int) -> list[tuple[int, str]]:
        """Places where the text before a turn may end, and what has to stand there."""
        if not turn:  # nothing stands before it but what the template itself writes
            return self._first_prompts()
        before = self.before(turn)
        for message in reversed(range(turn)):
            anchors = before.of(message)
            if anchors:
                piece = max(anchors, key=lambda each: before.places[each][-1][1])
                prompt = before.text[before.places[piece][-1][1] :]
                return [(stop, prompt) for _, stop in self.whole.places[piece]]
        return [(0, before.text)]

    def _first_prompts(self) -> list[tuple[int, str]]:
        try:
            prompts = [(0, self.before(0).text)]
        except RowError:  # templates that look at the first of no messages
            prompts = []
        plain = _openings(self.header, with_thinking=False)[0]
        at = self.whole.text.find(plain)
        return [*prompts, (at, self.header)] if plain and at >= 0 else prompts

    def _behind_header(self, turn: int, start: int) -> int:
        """The start, moved behind a header that the generation prompt leaves out (Gemma 4, behind
        a tool's result)."""
        stop = start + len(self.header)
        own = min((a for a, _ in self.whole.first(turn)), default=len(self.whole.text))
        has_header = self.header and self.whole.text.startswith(self.header, start)
        return stop if has_header and stop <= own else start

    def tagged(self, tags: Sequence[Span], *, tags_wrap_header: bool) -> tuple[Span, ...]:
        """The trained turns' spans from what the template tags.

        A tagged stretch ends with its end of turn: one that the tags leave out is added, white
        space behind one that they wrap is not trained. A header in the tags is not either.
        """
        turns = [i for i, role in enumerate(self.roles) if role == "assistant"]
        owners = self._owners(tags, turns)
        kept = [(tag, owner) for tag, owner in zip(tags, owners, strict=True) if owner is not None]
        spans = (self._tag(tag, owner, tags_wrap_header) for tag, owner in kept)
        return self.verified(_merged(span for span in spans if span[1] > span[0]))

    def _owners(self, tags: Sequence[Span], turns: list[int]) -> list[int | None]:
        """The trained turn that each tagged stretch belongs to, None where that is not trained."""
        if len(tags) == len(turns):
            named: list[int | None] = [turn if self.trained[turn] else None for turn in turns]
            return named
        owners: list[int | None] = []
        last = turns[0]
        for start, stop in tags:
            inside = [
                t for t in turns if any(_holds((start, stop), s) for s in self.whole.first(t))
            ]
            if not inside and not all(self.trained[t] for t in turns):
                inside = [last]
            last = inside[-1] if inside else last
            states = {self.trained[t] for t in inside or [last]}
            if len(states) > 1:
                raise RowError(
                    f"message {self.number(last)}: has a weight, but the chat template tags it together"
                    " with another message; give both one weight"
                )
            owners.append(last if states == {True} else None)
        return owners

    def _tag(self, tag: Span, turn: int, tags_wrap_header: bool) -> Span:
        start, stop = tag
        if tags_wrap_header:
            start = max(start, self.start(turn, with_thinking=False))
        own = [s for s in self.whole.first(turn) if _holds(tag, s)]
        spoken = max((s for _, s in own), default=start)
        within = self._end_after(max(spoken, start), stop)
        if within is not None:
            return start, within
        after = (end for end in self.ends if self.whole.text.startswith(end, stop))
        return start, stop + len(max(after, key=len, default=""))

    def verified(self, spans: tuple[Span, ...]) -> tuple[Span, ...]:
        """The spans, which hold all that is trained and no text of anybody else.

        Raises: RowError: they do not.
        """
        untrained = [i for i, trained in enumerate(self.trained) if not trained]
        others = self.whole.said(untrained, TEXTS)
        is_mixed = any(stop > start for (_, stop), (start, _) in pairwise(spans))
        if is_mixed or any(_overlap(span, other) for span in spans for other in others):
            raise RowError(
                "the chat template's assistant turns must hold only the assistant's text, hold"
                f" another message's; {OTHER_TEMPLATE}"
            )
        own = self.whole.said([i for i, trained in enumerate(self.trained) if trained])
        if any(not any(_holds(span, said) for span in spans) for said in own):
            raise RowError(
                "the chat template's generation tags must wrap every assistant message, leave one"
                " out; mend the template's tags"
            )
        return spans


def _openings(prompt: str, *, with_thinking: bool) -> list[str]:
    """What may stand where a turn begins: the whole generation prompt, or what comes before its
    opening of thoughts."""
    opener = THINKING_OPENER.search(prompt)
    if opener is None:
        return [prompt]
    unopened = prompt[: opener.start()]
    return [*([prompt] if with_thinking else []), unopened, unopened.rstrip()]


def _merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Spans in order, those that touch as one: an end of turn may be tagged on its own."""
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            start, last = merged.pop()
            stop = max(stop, last)
        merged.append((start, stop))
    return tuple(merged)


def _holds(span: Span, other: Span) -> bool:
    return span[0] <= other[0] and other[1] <= span[1]


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]
