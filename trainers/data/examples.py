"""Rows to token ids with the one mask that both counts and trains.

A loss span is a half-open range of token positions that are predicted and counted; position 0 never
is. Texts are encoded in batches, without special tokens; the tokenizer's prefix (BOS) is put in
front exactly once, whoever writes it, and the end token behind exactly once.

Prompt and completion are encoded together, as they are served, and parted by character offsets;
only where a token straddles the seam are they encoded apart, so that the completion's tokens are
exactly the completion (field case A12). The spans of a chat are treated alike.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from trainers.data.chat_notes import ToolSamples, template_notes
from trainers.data.messages import ChatRow
from trainers.data.records import BadRows, DataError, Origin, RowError
from trainers.data.rows import CompletionRow, Row, TextRow
from trainers.data.spec import DataSpec
from trainers.data.token_rows import Piece, Span, TokenizedRow, token_span
from trainers.data.tokenizer import LoadedTokenizer

if TYPE_CHECKING:  # jinja2 is loaded only for chat rows
    from trainers.data.chat_template import ChatTemplate, Rendered

CHUNK_ROWS = 256
CHUNK_CHARS = 1 << 18
"""A chunk ends at either: encodings are large (some 100 bytes a token)."""
MAX_THREADS = 16
"""What makes rows of encodings is one thread, and keeps no more busy."""

Seam = int | tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows whose texts are being encoded; `rendered` is None for rows that are no chats."""

    rows: list[tuple[Row, Origin]]
    rendered: "list[Rendered | None]"
    encodings: "Future[list[Any]]"


@contextmanager
def _one_thread_a_call() -> Iterator[None]:
    """Keeps the tokenizer from parting a chunk among threads of its own: a chunk a thread takes a fifth
    less time (tokenizers 0.23, 2 cores), as nobody waits for the slowest part of each."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


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
        `bad`. Chunks are read and rendered here while threads, which need no Python meanwhile, encode
        those before them."""
        num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        waiting: deque[Chunk] = deque()
        with _one_thread_a_call(), ThreadPoolExecutor(num_threads) as threads:
            for kept in _chunks(rows):
                waiting.append(self._started(kept, bad, threads))
                if len(waiting) > num_threads:
                    yield from self._finished(waiting.popleft())
            while waiting:
                yield from self._finished(waiting.popleft())

    def _started(
        self, rows: list[tuple[Row, Origin]], bad: BadRows, threads: ThreadPoolExecutor
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
        return Chunk(kept, rendered, threads.submit(self._batch, texts))

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
        ids += self._end(ids[-1:] if len(ids) > start else ())
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
                if not rendered.spans:
                    raise RowError("must have an assistant message to train on, has none")
            else:
                from trainers.data.chat_template import Rendered

                rendered = Rendered(text=self.template.text(row), spans=())
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
