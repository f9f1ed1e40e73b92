"""The first rows of a dataset as they are tokenized: which of their text is trained and which is not."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

from trainers.data.examples import RowEncoder
from trainers.data.parts import parts_of
from trainers.data.records import BadRows
from trainers.data.row_reader import RowReader
from trainers.data.spec import DataSpec
from trainers.data.token_rows import Piece, TokenizedRow, fitted_rows
from trainers.data.tokenizer import LoadedTokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    """One row.

    Args:
        place: file and line.
        parts: (text, whether its tokens are trained), in order; the whole row, nothing truncated.
        num_tokens, num_loss_tokens: of the whole row.
        num_examples: what is kept of it within seq_len: 1, several windows of a text, or 0.
    """

    place: str
    parts: tuple[tuple[str, bool], ...]
    num_tokens: int
    num_loss_tokens: int
    num_examples: int


def shown_rows(spec: DataSpec, count: int) -> list[ShownRow]:
    """The first rows that can be used; no more of the data is read than that.

    Raises: DataError: data that cannot be read as a whole, a model without a tokenizer.
    """
    tokenizer = load_tokenizer(spec.model, revision=spec.revision, chat_template=spec.chat_template)
    return list(islice(_shown(spec, tokenizer, count), count))


def _shown(spec: DataSpec, tokenizer: LoadedTokenizer, count: int) -> Iterator[ShownRow]:
    encoder, bad = RowEncoder.of(spec, tokenizer), BadRows()
    for part in parts_of(spec):
        rows = RowReader(spec, bad).rows(part.source)
        # The encoder reads ahead by whole chunks, which would be most of a small file.
        while head := list(islice(rows, count)):
            for _, origin, tokens in encoder.encode(head, bad):
                fitted = fitted_rows(tokens, spec.seq_len, spec.truncation, frozenset())
                yield ShownRow(
                    place=str(origin),
                    parts=tuple(_parts(tokens, tokenizer)),
                    num_tokens=len(tokens.ids),
                    num_loss_tokens=tokens.num_loss_tokens,
                    num_examples=len(fitted),
                )


def _parts(row: TokenizedRow, tokenizer: LoadedTokenizer) -> Iterator[tuple[str, bool]]:
    cuts = sorted({0, len(row.ids), *(at for span in row.spans for at in span)})
    for start, stop in pairwise(cuts):
        is_trained = any(first <= start and stop <= last for first, last in row.spans)
        yield _text_at(row, tokenizer, start, stop), is_trained


def _text_at(row: TokenizedRow, tokenizer: LoadedTokenizer, start: int, stop: int) -> str:
    """The text of some tokens as the row had it, and of BOS and end tokens their names."""
    texts: list[str] = []
    position = start
    while position < stop:
        piece = _piece_at(row.pieces, position)
        if piece is None:
            texts.append(tokenizer.encoder.id_to_token(row.ids[position]) or "")
            position += 1
            continue
        last = min(stop, piece.first + len(piece.encoding))
        texts.append(_piece_text(piece, position - piece.first, last - piece.first))
        position = last
    return "".join(texts)


def _piece_at(pieces: tuple[Piece, ...], position: int) -> Piece | None:
    return next((p for p in pieces if p.first <= position < p.first + len(p.encoding)), None)


def _piece_text(piece: Piece, start: int, stop: int) -> str:
    first = piece.encoding.token_to_chars(start)[0] if start else 0
    whole = stop == len(piece.encoding)
    return piece.text[first : len(piece.text) if whole else piece.encoding.token_to_chars(stop)[0]]
