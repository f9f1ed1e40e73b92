"""Rows to token ids with the one mask that both counts and trains.

A loss span is a half-open range of token positions that are predicted and counted; position 0 never
is. Texts are encoded in batches, without special tokens; the tokenizer's prefix (BOS) is put in
front exactly once, whoever writes it, and the end token behind exactly once.

Prompt and completion are encoded together, as they are served, and parted by character offsets;
only where a token straddles the seam are they encoded apart, so that the completion's tokens are
exactly the completion (field case A12). The spans of a chat are treated alike.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from trainers.data.chat_notes import ToolSamples, template_notes
from trainers.data.messages import ChatRow
from trainers.data.records import BadRows, DataError, Origin, RowError
from trainers.data.rows import CompletionRow, Row, TextRow
from trainers.data.spec import DataSpec
from trainers.data.tokenizer import LoadedTokenizer

if TYPE_CHECKING:  # jinja2 is loaded only for chat rows
    from trainers.data.chat_template import ChatTemplate, Rendered

CHUNK_ROWS = 256
CHUNK_CHARS = 1 << 20
"""A chunk ends at either: encodings are large (some 100 bytes a token)."""

Span = tuple[int, int]
Seam = int | tuple[Any, Any]


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


def token_span(
    encoding: Any, start: int, stop: int, text: str, special_ids: frozenset[int]
) -> Span | None:
    """Token positions that cover exactly the characters start..stop; None where a token straddles
    either end. An end token that swallows the space behind it (Phi 3) straddles nothing: what it
    swallows is no token of its own, here or when it is served."""
    if start >= stop:
        return (len(encoding), len(encoding))
    first, last = encoding.char_to_token(start), encoding.char_to_token(stop - 1)
    if first is None or last is None:
        return None
    # A character of several bytes may be several tokens: the last one ends the span.
    while last + 1 < len(encoding) and encoding.token_to_chars(last + 1)[0] < stop:
        last += 1
    end = encoding.token_to_chars(last)[1]
    swallows = encoding.ids[last] in special_ids and text[stop:end].isspace()
    is_exact = encoding.token_to_chars(first)[0] == start and (end == stop or swallows)
    return (first, last + 1) if is_exact else None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows whose texts are being encoded; `rendered` is None for rows that are no chats."""

    rows: list[tuple[Row, Origin]]
    rendered: "list[Rendered | None]"
    encodings: "Future[list[Any]]"


def _chunks(rows: Iterable[tuple[Row, Origin]]) -> Iterator[list[tuple[Row, Origin]]]:
    """Rows in parts that stay small, whatever the length of a row."""
    chunk: list[tuple[Row, Origin]] = []
    num_chars = 0
    for row, origin in rows:
        chunk.append((row, origin))
        num_chars += _num_chars(row)
        if len(chunk) == CHUNK_ROWS or num_chars >= CHUNK_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk


def _num_chars(row: Row) -> int:
    if isinstance(row, ChatRow):
        return sum(len(message["content"]) for message in row.messages)
    return len(_text_of(row, None))


def _text_of(row: Row, rendered: "Rendered | None") -> str:
    if rendered is not None:
        return rendered.text
    if isinstance(row, CompletionRow):
        return row.prompt + row.completion
    assert isinstance(row, TextRow)
    return row.text


class RowEncoder:
    """Encodes normalised rows.

    Args:
        completion_only: train only completions and assistant turns; else every token.
        fold_system: a leading system message goes into the first user turn.
    """

    def __init__(
        self,
        tokenizer: LoadedTokenizer,
        *,
        completion_only: bool = True,
        fold_system: bool = False,
    ) -> None:
        self.tokenizer, self.completion_only = tokenizer, completion_only
        self.fold_system = fold_system
        self._samples = ToolSamples()
        self._template: ChatTemplate | None = None

    @classmethod
    def of(cls, spec: DataSpec, tokenizer: LoadedTokenizer) -> "RowEncoder":
        """The encoder that a spec asks for."""
        fold_system = spec.system_role == "fold"
        return cls(tokenizer, completion_only=spec.completion_only, fold_system=fold_system)

    def encode(
        self, rows: Iterable[tuple[Row, Origin]], bad: BadRows
    ) -> Iterator[tuple[Row, Origin, TokenizedRow]]:
        """Rows with their places and tokens, in order; a row that the chat template refuses goes to
        `bad`. The next chunk is read and rendered while the tokenizer, which needs no Python, works
        on this one with all cores."""
        with ThreadPoolExecutor(max_workers=1) as thread:
            waiting: Chunk | None = None
            for kept in _chunks(rows):
                chunk = self._started(kept, bad, thread)
                if waiting is not None:
                    yield from self._finished(waiting)
                waiting = chunk
            if waiting is not None:
                yield from self._finished(waiting)

    def _started(
        self, rows: list[tuple[Row, Origin]], bad: BadRows, thread: ThreadPoolExecutor
    ) -> Chunk:
        """Renders what needs rendering, and lets the texts be encoded."""
        kept: list[tuple[Row, Origin]] = []
        rendered: list[Rendered | None] = []
        for row, origin in rows:
            shown = self._rendered(row, origin, bad) if isinstance(row, ChatRow) else None
            if shown is not None or not isinstance(row, ChatRow):
                kept.append((row, origin))
                rendered.append(shown)
        texts = [_text_of(row, shown) for (row, _), shown in zip(kept, rendered, strict=True)]
        return Chunk(kept, rendered, thread.submit(self._batch, texts))

    def _finished(self, chunk: Chunk) -> Iterator[tuple[Row, Origin, TokenizedRow]]:
        encodings = chunk.encodings.result()
        seams = self._seams(chunk, encodings)
        for (row, origin), shown, encoding, seam in zip(
            chunk.rows, chunk.rendered, encodings, seams, strict=True
        ):
            if shown is not None:
                yield row, origin, self._chat(shown, encoding)
            elif isinstance(row, CompletionRow):
                yield row, origin, self._pair(row, encoding, seam)
            elif isinstance(row, TextRow):
                yield row, origin, self._text(row, encoding)

    def _batch(self, texts: Sequence[str]) -> list[Any]:
        if not texts:
            return []
        return self.tokenizer.encoder.encode_batch(list(texts), add_special_tokens=False)

    def _prefix(self, ids: Sequence[int]) -> list[int]:
        """What still has to stand before ids, so that the tokenizer's prefix stands there once."""
        prefix = self.tokenizer.prefix_ids
        return [] if tuple(ids[: len(prefix)]) == prefix else list(prefix)

    def _end(self, ids: Sequence[int]) -> list[int]:
        return [] if ids and ids[-1] == self.tokenizer.eos_id else [self.tokenizer.eos_id]

    def _text(self, row: TextRow, encoding: Any) -> TokenizedRow:
        body = encoding.ids
        prefix = self._prefix(body)
        ids = [*prefix, *body, *self._end(body)]
        piece = Piece(row.text, encoding, len(prefix))
        return TokenizedRow(ids, ((1, len(ids)),), (piece,), is_text=True)

    def _seams(self, chunk: Chunk, encodings: list[Any]) -> list[Seam | None]:
        """Of each pair the first token of its completion, or, where a token straddles the seam, the
        encodings of both parts; None for other rows. The parts of a chunk are one more batch."""
        seams: list[Seam | None] = [None] * len(encodings)
        apart: list[int] = []
        for at, ((row, _), encoding) in enumerate(zip(chunk.rows, encodings, strict=True)):
            if isinstance(row, CompletionRow):
                text, start = row.prompt + row.completion, len(row.prompt)
                span = token_span(encoding, start, len(text), text, self.tokenizer.special_ids)
                seams[at] = span[0] if span else None
                apart += [] if span else [at]
        pairs = [row for at in apart if isinstance(row := chunk.rows[at][0], CompletionRow)]
        parts = self._batch([text for row in pairs for text in (row.prompt, row.completion)])
        for at, seam in zip(apart, zip(parts[::2], parts[1::2], strict=True), strict=True):
            seams[at] = seam
        return seams

    def _pair(self, row: CompletionRow, encoding: Any, seam: Seam | None) -> TokenizedRow:
        if isinstance(seam, tuple):
            texts = (row.prompt, row.completion)
            return self._completion(list(zip(texts, seam, strict=True)), None)
        return self._completion([(row.prompt + row.completion, encoding)], seam)

    def _completion(self, parts: list[tuple[str, Any]], first: int | None) -> TokenizedRow:
        """A prompt/completion row from one joint encoding, or from two; `first` is the completion's
        first token in the joint one."""
        ids, pieces = self._joined(parts)
        start = pieces[0].first + first if first is not None else pieces[-1].first
        ids += self._end(ids[start:])
        spans = ((max(1, start if self.completion_only else 1), len(ids)),)
        return TokenizedRow(ids, spans, pieces)

    def _joined(self, parts: list[tuple[str, Any]]) -> tuple[list[int], tuple[Piece, ...]]:
        bodies = [encoding.ids for _, encoding in parts]
        ids = self._prefix(next(filter(None, bodies), []))
        pieces = []
        for (text, encoding), body in zip(parts, bodies, strict=True):
            pieces.append(Piece(text, encoding, len(ids)))
            ids += body
        return ids, tuple(pieces)

    @property
    def template(self) -> "ChatTemplate":
        """The compiled chat template.

        Raises: DataError: the tokenizer has none, or it cannot be used.
        """
        if self._template is None:
            from trainers.data.chat_template import ChatTemplate

            if self.tokenizer.chat_template is None:
                raise DataError(
                    f"{self.tokenizer.name} has no chat template, and the data are conversations;"
                    " give one"
                    " (chat_template: FILE.jinja) or write the data as prompt and completion"
                )
            added = self.tokenizer.encoder.get_added_tokens_decoder().values()
            markers = [token.content for token in added]
            self._template = ChatTemplate(
                self.tokenizer.chat_template,
                self.tokenizer.special_tokens,
                markers,
                fold_system=self.fold_system,
            )
        return self._template

    def notes(self) -> list[str]:
        """What a person should know of how the rows were rendered."""
        lines = []
        if not self.tokenizer.pad_source.startswith("pad token"):
            lines.append(f"batches are padded with the {self.tokenizer.pad_source}")
        if self._template is not None:
            lines += template_notes(self._template, self.tokenizer)
        return lines + self._samples.lines()

    def _rendered(self, row: ChatRow, origin: Origin, bad: BadRows) -> "Rendered | None":
        try:
            if self.completion_only:
                rendered = self.template.assistant_spans(row)
            else:
                from trainers.data.chat_template import Rendered

                rendered = Rendered(text=self.template.text(row), spans=())
            if self.completion_only and not rendered.spans:
                raise RowError("must have an assistant message to train on, has none")
        except RowError as error:
            bad.add(origin, str(error))
            return None
        self._samples.look(row, rendered)
        return rendered

    def _chat(self, rendered: "Rendered", encoding: Any) -> TokenizedRow:
        text, special_ids = rendered.text, self.tokenizer.special_ids
        found = [token_span(encoding, *span, text, special_ids) for span in rendered.spans]
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

    @property
    def num_loss_tokens(self) -> int:
        return sum(stop - start for start, stop in self.spans)


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
