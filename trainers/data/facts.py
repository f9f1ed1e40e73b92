"""Synthetic facts whose information is known exactly: a distinct key, and a value drawn at random.

A fact is a row {"prompt": key, "completion": value}. A value is `num_symbols` independent uniform
draws from an alphabet of A symbols, so that all values together hold num_facts x num_symbols x
log2(A) bits, whatever the keys are: keys are drawn without looking at values. Every symbol is one
token of the given tokenizer, which is verified on the joint encoding of every row. The end token
behind a value is the same in all rows: it bears loss, and holds no bits.
"""

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.data.records import DataError
from trainers.data.token_rows import token_span
from trainers.paths import write_text

if TYPE_CHECKING:
    from trainers.data.tokenizer import LoadedTokenizer

WORD = re.compile(r"(?:Ġ|▁)([A-Za-z]+)")
"""A vocabulary entry that is a space and a word: byte-level BPE writes the space Ġ, SentencePiece ▁."""
MAX_FACTS = 10_000_000
"""Held in memory: 2 GB of rows."""
END_TOKENS = 1
"""Loss-bearing tokens of a row that are no symbols: the end token that `examples.RowEncoder` puts
behind every completion."""


@dataclass(frozen=True, kw_only=True)
class FactSpec:
    """What decides a set of facts.

    The first facts of a larger set are those of a smaller one, all else equal.

    Args:
        num_facts: rows, from 1 to MAX_FACTS.
        num_symbols: symbols of a value, >= 1.
        alphabet_size: different symbols, >= 2.
        num_key_words: words of a key, >= 1.
        seed: of the choice of words, the keys and the values.
        values_seed: of the values alone, where other values for the same keys are wanted.
    Raises:
        DataError: a value outside these.
    """

    num_facts: int
    num_symbols: int
    alphabet_size: int
    num_key_words: int = 2
    seed: int = 0
    values_seed: int | None = None

    def __post_init__(self) -> None:
        least = {"num_facts": 1, "num_symbols": 1, "alphabet_size": 2, "num_key_words": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise DataError(f"{name} of facts must be >= {low}, got {getattr(self, name)}")
        if self.num_facts > MAX_FACTS:
            raise DataError(
                f"num_facts must be at most {MAX_FACTS:,}, got {self.num_facts:,}; lower the loads or the ranks"
            )

    @property
    def known_bits(self) -> float:
        """Bits that all values hold together; the entropy of the draw, to rounding of log2."""
        return self.num_facts * self.num_symbols * math.log2(self.alphabet_size)

    @property
    def num_loss_tokens(self) -> int:
        """Loss-bearing tokens of all rows: the symbols, and an end token each."""
        return self.num_facts * (self.num_symbols + END_TOKENS)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Rows with the symbols that their values are made of."""

    spec: FactSpec
    alphabet: tuple[str, ...]
    rows: tuple[dict[str, str], ...]

    def write(self, path: Path) -> None:
        """Writes the rows as jsonl; a file that holds them already is left alone."""
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return
        write_text(path, text)


def make_facts(spec: FactSpec, tokenizer: "LoadedTokenizer") -> Facts:
    """The facts of a spec, equal for equal specs and tokenizers.

    Raises:
        DataError: too few one-token words for the alphabet or for that many distinct keys, or a
            symbol that is not one token behind its neighbours.
    """
    words = one_token_words(tokenizer)
    random.Random(f"{spec.seed} words").shuffle(words)
    alphabet, key_words = words[: spec.alphabet_size], words[spec.alphabet_size :]
    num_keys = len(key_words) ** spec.num_key_words
    if len(alphabet) < spec.alphabet_size or num_keys < 2 * spec.num_facts:
        raise DataError(
            f"the tokenizer of {tokenizer.name} must have one-token words for {spec.alphabet_size}"
            f" symbols and for keys of {2 * spec.num_facts} facts, has {len(words)} words; lower"
            " alphabet_size or raise num_key_words"
        )
    keys = _keys(spec, key_words)
    rows = tuple(
        {"prompt": key, "completion": value}
        for key, value in zip(keys, _values(spec, alphabet), strict=True)
    )
    _check_tokens(spec, rows, alphabet, tokenizer)
    return Facts(spec=spec, alphabet=tuple(alphabet), rows=rows)


def one_token_words(tokenizer: "LoadedTokenizer") -> list[str]:
    """Words with their leading space that are one token behind a word, by id."""
    vocabulary = tokenizer.encoder.get_vocab()
    found = {
        token_id: f" {match[1]}"
        for token, token_id in vocabulary.items()
        if (match := WORD.fullmatch(token)) and token_id not in tokenizer.special_ids
    }
    ids = sorted(found)
    texts = [f" a{found[token_id]}" for token_id in ids]
    encodings = tokenizer.encoder.encode_batch(texts, add_special_tokens=False)
    pairs = zip(ids, encodings, strict=True)
    return [found[token_id] for token_id, encoding in pairs if encoding.ids[-1] == token_id]


def _keys(spec: FactSpec, words: Sequence[str]) -> list[str]:
    draw, keys = random.Random(f"{spec.seed} keys"), dict[str, None]()
    while len(keys) < spec.num_facts:  # at most half of all keys are taken: two draws a key
        keys["".join(draw.choices(words, k=spec.num_key_words))] = None
    return list(keys)


def _values(spec: FactSpec, alphabet: Sequence[str]) -> list[str]:
    seed = spec.seed if spec.values_seed is None else spec.values_seed
    draw = random.Random(f"{seed} values")
    return ["".join(draw.choices(alphabet, k=spec.num_symbols)) for _ in range(spec.num_facts)]


def _check_tokens(
    spec: FactSpec,
    rows: Sequence[dict[str, str]],
    alphabet: Sequence[str],
    tokenizer: "LoadedTokenizer",
) -> None:
    """Raises: DataError: a row whose completion is not exactly one token a symbol."""
    texts = [row["prompt"] + row["completion"] for row in rows]
    encodings = tokenizer.encoder.encode_batch(texts, add_special_tokens=False)
    seen: set[int] = set()
    for row, text, encoding in zip(rows, texts, encodings, strict=True):
        start = len(row["prompt"])
        span = token_span(encoding, start, len(text), text, tokenizer.special_ids)
        if span is None or span[1] - span[0] != spec.num_symbols:
            raise DataError(
                f"the value of a fact must be {spec.num_symbols} tokens behind its key, is not in"
                f" {text!r}; this tokenizer has no separate tokens for its words"
            )
        seen.update(encoding.ids[span[0] : span[1]])
    if len(seen) > len(alphabet):
        raise DataError(f"{len(alphabet)} symbols must be as many tokens, are {len(seen)}")
