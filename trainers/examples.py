"""Rows to token ids with the one mask that both counts and trains.

A loss span is a half-open range of token positions that are predicted and counted; position 0 never
is. Texts are encoded in batches, without special tokens; the tokenizer's prefix (BOS) is put in
front exactly once, whoever writes it, and the end token behind exactly once.

Prompt and completion are encoded together, as they are served, and parted by character offsets;
only where a token straddles the seam are they encoded apart, so that the completion's tokens are
exactly the completion (field case A12). The spans of a chat are treated alike.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from trainers.messages import ChatRow
from trainers.records import BadRows, DataError, Origin, RowError
from trainers.rows import CompletionRow, Row, TextRow
from trainers.tokenizer import LoadedTokenizer

if TYPE_CHECKING:  # jinja2 is loaded only for chat rows
    from trainers.chat_template import ChatTemplate, Rendered

CHUNK_ROWS = 256

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """An encoded text within a row; `first` is the row's position of its token 0."""

    text: str
    encoding: Any
    first: int


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A whole row, before it is fitted to a length.

    Args:
        ids: token ids with BOS and end token.
        spans: loss spans, in order, not overlapping.
        pieces: the encoded texts, from which bytes are counted.
        is_text: plain text, which may be split into windows.
    """

    ids: list[int]
    spans: tuple[Span, ...]
    pieces: tuple[Piece, ...]
    is_text: bool = False

    @property
    def num_loss_tokens(self) -> int:
        return sum(stop - start for start, stop in self.spans)


def loss_bytes(row: TokenizedRow, spans: Iterable[Span], special_ids: frozenset[int]) -> int:
    """UTF-8 bytes of the text under loss spans; end tokens are not text and count nothing."""
    return sum(
        _piece_bytes(piece, start - piece.first, stop - piece.first, special_ids)
        for start, stop in spans
        for piece in row.pieces
    )


def _piece_bytes(piece: Piece, start: int, stop: int, special_ids: frozenset[int]) -> int:
    num_tokens = len(piece.encoding)
    start, stop = max(start, 0), min(stop, num_tokens)
    if start >= stop:
        return 0
    ids = piece.encoding.ids
    while stop > start and ids[stop - 1] in special_ids:
        stop -= 1
    if start == stop:
        return 0
    # Up to the next token's start, so that the windows of a text add up to the text.
    end = piece.encoding.token_to_chars(stop)[0] if stop < num_tokens else len(piece.text)
    return len(piece.text[piece.encoding.token_to_chars(start)[0] : end].encode())


def token_span(encoding: Any, start: int, stop: int) -> Span | None:
    """Token positions that cover exactly the characters start..stop; None where a token straddles
    either end."""
    if start >= stop:
        return (len(encoding), len(encoding))
    first, last = encoding.char_to_token(start), encoding.char_to_token(stop - 1)
    if first is None or last is None:
        return None
    # A character of several bytes may be several tokens: the last one ends the span.
    while last + 1 < len(encoding) and encoding.token_to_chars(last + 1)[0] < stop:
        last += 1
    is_exact = (
        encoding.token_to_chars(first)[0] == start and encoding.token_to_chars(last)[1] == stop
    )
    return (first, last + 1) if is_exact else None


class RowEncoder:
    """Encodes normalised rows.

    Args:
        completion_only: train only completions and assistant turns; else every token.
    """

    def __init__(self, tokenizer: LoadedTokenizer, *, completion_only: bool = True) -> None:
        self.tokenizer, self.completion_only = tokenizer, completion_only
        self._template: ChatTemplate | None = None

    def encode(
        self, rows: Iterable[tuple[Row, Origin]], bad: BadRows
    ) -> Iterator[tuple[Row, TokenizedRow]]:
        """Rows with their tokens, in order; a row that the chat template refuses goes to `bad`."""
        stream = iter(rows)
        while chunk := list(islice(stream, CHUNK_ROWS)):
            encoded = self._encode_chunk(chunk, bad)
            pairs = zip((row for row, _ in chunk), encoded, strict=True)
            yield from ((row, tokens) for row, tokens in pairs if tokens is not None)

    def _encode_chunk(
        self, chunk: list[tuple[Row, Origin]], bad: BadRows
    ) -> list[TokenizedRow | None]:
        """One entry a row, None for those that went to `bad`; each kind of row is one batch."""
        texts = [r for r, _ in chunk if isinstance(r, TextRow)]
        pairs = [r for r, _ in chunk if isinstance(r, CompletionRow)]
        chats = [(r, origin) for r, origin in chunk if isinstance(r, ChatRow)]
        queues: dict[type, Iterator[TokenizedRow | None]] = {
            TextRow: self._encode_texts(texts),
            CompletionRow: self._encode_pairs(pairs),
            ChatRow: self._encode_chats(chats, bad),
        }
        return [next(queues[type(row)]) for row, _ in chunk]

    def _batch(self, texts: Sequence[str]) -> list[Any]:
        return (
            self.tokenizer.encoder.encode_batch(list(texts), add_special_tokens=False)
            if texts
            else []
        )

    def _prefix(self, ids: Sequence[int]) -> list[int]:
        """What still has to stand before ids, so that the tokenizer's prefix stands there once."""
        prefix = self.tokenizer.prefix_ids
        return [] if tuple(ids[: len(prefix)]) == prefix else list(prefix)

    def _end(self, ids: Sequence[int]) -> list[int]:
        return [] if ids and ids[-1] == self.tokenizer.eos_id else [self.tokenizer.eos_id]

    def _encode_texts(self, rows: list[TextRow]) -> Iterator[TokenizedRow]:
        for row, encoding in zip(rows, self._batch([r.text for r in rows]), strict=True):
            body = encoding.ids
            prefix = self._prefix(body)
            ids = [*prefix, *body, *self._end(body)]
            yield TokenizedRow(
                ids, ((1, len(ids)),), (Piece(row.text, encoding, len(prefix)),), is_text=True
            )

    def _encode_pairs(self, rows: list[CompletionRow]) -> Iterator[TokenizedRow]:
        joint = self._batch([r.prompt + r.completion for r in rows])
        seams = [len(r.prompt) for r in rows]
        ends = [len(r.prompt) + len(r.completion) for r in rows]
        spans = [token_span(*each) for each in zip(joint, seams, ends, strict=True)]
        apart = [r for r, span in zip(rows, spans, strict=True) if span is None]
        parts = iter(self._batch([text for r in apart for text in (r.prompt, r.completion)]))
        for row, encoding, span in zip(rows, joint, spans, strict=True):
            if span is None:
                yield self._completion(
                    [(row.prompt, next(parts)), (row.completion, next(parts))], None
                )
            else:
                yield self._completion([(row.prompt + row.completion, encoding)], span[0])

    def _completion(self, parts: list[tuple[str, Any]], first: int | None) -> TokenizedRow:
        """A prompt/completion row from one joint encoding, or from two; `first` is the completion's
        first token in the joint one."""
        ids, pieces = self._joined(parts)
        start = pieces[0].first + first if first is not None else pieces[-1].first
        ids += self._end(ids[start:])
        spans = ((max(1, start if self.completion_only else 1), len(ids)),)
        return TokenizedRow(ids, spans, pieces)

    def _joined(self, parts: list[tuple[str, Any]]) -> tuple[list[int], tuple[Piece, ...]]:
        body = [i for _, encoding in parts for i in encoding.ids]
        ids = self._prefix(body)
        pieces = []
        for text, encoding in parts:
            pieces.append(Piece(text, encoding, len(ids)))
            ids += encoding.ids
        return ids, tuple(pieces)

    @property
    def template(self) -> "ChatTemplate":
        """The compiled chat template.

        Raises: DataError: the tokenizer has none, or it cannot be used.
        """
        if self._template is None:
            from trainers.chat_template import ChatTemplate

            if self.tokenizer.chat_template is None:
                raise DataError(
                    f"{self.tokenizer.name} has no chat template, and the data are conversations;"
                    " give one"
                    " (chat_template: FILE.jinja) or write the data as prompt and completion"
                )
            added = self.tokenizer.encoder.get_added_tokens_decoder().values()
            markers = [token.content for token in added]
            self._template = ChatTemplate(
                self.tokenizer.chat_template, self.tokenizer.special_tokens, markers
            )
        return self._template

    def notes(self) -> list[str]:
        """What a person should know of how the rows were rendered."""
        lines = []
        if not self.tokenizer.pad_source.startswith("pad token"):
            lines.append(f"batches are padded with the {self.tokenizer.pad_source}")
        if self._template is not None and self._template.wrote_tools_as_text:
            lines.append(
                "the chat template has no place for tools: schemas are written into the system"
                " message,"
                " calls as <tool_call>{json}</tool_call>"
            )
        return lines

    def _encode_chats(
        self, rows: list[tuple[ChatRow, Origin]], bad: BadRows
    ) -> Iterator[TokenizedRow | None]:
        rendered = [self._rendered(row, origin, bad) for row, origin in rows]
        encodings = iter(self._batch([r.text for r in rendered if r is not None]))
        for each in rendered:
            yield None if each is None else self._chat(each, next(encodings))

    def _rendered(self, row: ChatRow, origin: Origin, bad: BadRows) -> "Rendered | None":
        try:
            rendered = self.template.assistant_spans(row)
            if self.completion_only and not rendered.spans:
                raise RowError("must have an assistant message to train on, has none")
        except RowError as error:
            bad.add(origin, str(error))
            return None
        return rendered

    def _chat(self, rendered: "Rendered", encoding: Any) -> TokenizedRow:
        found = [token_span(encoding, *span) for span in rendered.spans]
        exact = [span for span in found if span is not None]
        if len(exact) == len(found):
            ids, pieces = self._joined([(rendered.text, encoding)])
            spans = [(start + pieces[0].first, stop + pieces[0].first) for start, stop in exact]
        else:
            ids, pieces, spans = self._chat_apart(rendered)
        if not self.completion_only:
            spans = [(1, len(ids))]
        clipped = tuple((max(1, start), stop) for start, stop in spans if stop > max(1, start))
        return TokenizedRow(ids, clipped, pieces)

    def _chat_apart(self, rendered: "Rendered") -> tuple[list[int], tuple[Piece, ...], list[Span]]:
        """The text cut at its spans' ends and encoded piece by piece."""
        cuts = sorted({0, len(rendered.text), *(at for span in rendered.spans for at in span)})
        ranges = list(pairwise(cuts))
        texts = [rendered.text[start:stop] for start, stop in ranges]
        ids, pieces = self._joined(list(zip(texts, self._batch(texts), strict=True)))
        spans = [
            (piece.first, piece.first + len(piece.encoding))
            for piece, bounds in zip(pieces, ranges, strict=True)
            if any(start <= bounds[0] and bounds[1] <= stop for start, stop in rendered.spans)
        ]
        return ids, pieces, spans


@dataclass(frozen=True, slots=True)
class FittedRow:
    """What is trained of a row: at most seq_len ids, its loss spans, and the bytes under them."""

    ids: list[int]
    spans: tuple[Span, ...]
    num_loss_bytes: int


def fitted_rows(
    row: TokenizedRow, seq_len: int | None, truncation: str, special_ids: frozenset[int]
) -> list[FittedRow]:
    """A row within seq_len tokens: itself; for plain text its windows; else, when too long, nothing
    (`drop`) or its beginning (`cut`). Rows that are left without a loss-bearing token are not
    returned.

    The windows of a text overlap by one token, which is context only: every token of the text is
    predicted exactly once, so that counts do not depend on seq_len.
    """
    if seq_len is None or len(row.ids) <= seq_len:
        bounds = [(0, len(row.ids))]
    elif row.is_text:
        starts = range(0, len(row.ids) - 1, seq_len - 1)
        bounds = [(start, min(start + seq_len, len(row.ids))) for start in starts]
    else:
        bounds = [(0, seq_len)] if truncation == "cut" else []
    fitted = (_window(row, start, stop, special_ids) for start, stop in bounds)
    return [window for window in fitted if window.spans]


def _window(row: TokenizedRow, start: int, stop: int, special_ids: frozenset[int]) -> FittedRow:
    inside = [(max(a, start + 1), min(b, stop)) for a, b in row.spans]
    spans = tuple((a, b) for a, b in inside if a < b)
    shifted = tuple((a - start, b - start) for a, b in spans)
    return FittedRow(row.ids[start:stop], shifted, loss_bytes(row, spans, special_ids))
