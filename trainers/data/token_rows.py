"""A row as tokens: its ids, what of them bears loss, and what is left of it within a length.

A loss span is a half-open range of token positions that are predicted and counted; position 0 never
is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
    if end > stop and text[stop:end].isspace() and encoding.ids[last] in special_ids:
        end = stop
    is_exact = encoding.token_to_chars(first)[0] == start and end == stop
    return (first, last + 1) if is_exact else None


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
