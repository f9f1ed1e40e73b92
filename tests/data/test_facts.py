"""Facts of known bits: what they hold, and what the data half makes of them."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from trainers.data import DataError, DataSpec, load_tokenizer, prepare_data, prepare_whole
from trainers.data.facts import FactSpec, make_facts, one_token_words

SPEC = FactSpec(num_facts=60, num_symbols=5, alphabet_size=64)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_facts_known_bits_are_those_of_the_draw():
    assert FactSpec(num_facts=3, num_symbols=2, alphabet_size=8).known_bits == 18
    assert FactSpec(num_facts=422, num_symbols=8, alphabet_size=32).known_bits == 16_880
    # One of 10 symbols is 3.3219 bits.
    odd = FactSpec(num_facts=1, num_symbols=1, alphabet_size=10)
    assert odd.known_bits == pytest.approx(3.321928094887362)


@pytest.mark.parametrize(
    "change", [{"num_facts": 0}, {"num_symbols": 0}, {"alphabet_size": 1}, {"num_key_words": 0}]
)
def test_facts_of_nothing_are_refused(change):
    with pytest.raises(DataError, match=next(iter(change))):
        replace(SPEC, **change)


def test_facts_file_as_data_and_eval_trains_and_evaluates_every_symbol_once(tokenizer, tmp_path):
    facts, path = make_facts(SPEC, tokenizer), tmp_path / "facts.jsonl"
    facts.write(path)
    data = prepare_data(DataSpec(data=str(path), eval=str(path), seq_len=32))
    assert data.audit.num_eval_loss_tokens == data.audit.num_train_loss_tokens == 60 * (5 + 1)
    assert SPEC.num_loss_tokens == 60 * (5 + 1)
    symbols = {tokenizer.encoder.token_to_id("Ġ" + text[1:]): text for text in facts.alphabet}
    assert len(symbols) == 64
    for side in (data.train, data.eval):
        rows = [side.example(i) for i in range(len(side))]
        trained = [row.input_ids[row.loss_mask].tolist() for row in rows]
        assert [ids[-1] for ids in trained] == [tokenizer.eos_id] * 60
        values = ["".join(symbols[token] for token in ids[:-1]) for ids in trained]
        assert values == [row["completion"] for row in facts.rows]


def test_facts_keys_are_distinct_and_made_of_other_words_than_values(tokenizer):
    facts = make_facts(SPEC, tokenizer)
    keys = [row["prompt"] for row in facts.rows]
    assert len(set(keys)) == 60
    words = {word for key in keys for word in key.split()}
    assert words.isdisjoint(text.strip() for text in facts.alphabet)
    assert {len(key.split()) for key in keys} == {2}


def test_facts_of_one_spec_are_equal_and_begin_a_larger_set(tokenizer):
    facts = make_facts(SPEC, tokenizer)
    assert make_facts(SPEC, tokenizer) == facts
    larger = make_facts(replace(SPEC, num_facts=90), tokenizer)
    assert larger.rows[:60] == facts.rows
    assert make_facts(replace(SPEC, seed=1), tokenizer).rows != facts.rows


def test_facts_with_another_values_seed_have_the_same_keys_and_independent_values(tokenizer):
    facts = make_facts(SPEC, tokenizer)
    other = make_facts(replace(SPEC, values_seed=1), tokenizer)
    assert [row["prompt"] for row in other.rows] == [row["prompt"] for row in facts.rows]
    pairs = zip(facts.rows, other.rows, strict=True)
    symbols = [
        (a, b)
        for one, two in pairs
        for a, b in zip(one["completion"].split(), two["completion"].split(), strict=True)
    ]
    # 300 symbols, each equal with a chance of 1/64: 4.7 +- 2.2.
    assert sum(a == b for a, b in symbols) < 14


def test_facts_symbols_are_uniform(tokenizer):
    facts = make_facts(replace(SPEC, num_facts=2000), tokenizer)
    counts = Counter(symbol for row in facts.rows for symbol in row["completion"].split())
    expected = 10_000 / 64
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == 64
    assert 30 < chi_square < 103  # 63 degrees of freedom: the 0.01% and the 99.9% quantile


def test_facts_written_are_left_alone_where_the_file_holds_them(tokenizer, tmp_path):
    facts, path = make_facts(SPEC, tokenizer), tmp_path / "new" / "facts.jsonl"
    facts.write(path)
    before = path.stat()
    facts.write(path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [json.loads(line) for line in path.read_text().splitlines()] == list(facts.rows)
    make_facts(replace(SPEC, seed=1), tokenizer).write(path)
    assert path.stat().st_ino != before.st_ino


def test_facts_as_retention_rows_are_all_read(tokenizer, tmp_path):
    path = tmp_path / "facts.jsonl"
    make_facts(SPEC, tokenizer).write(path)
    rows, audit = prepare_whole(DataSpec(data=str(path), seq_len=32), str(path))
    assert (len(rows), rows.num_loss_tokens, audit.num_duplicates) == (60, 360, 0)


@pytest.mark.parametrize(
    "change", [{"alphabet_size": 1024}, {"num_key_words": 1, "num_facts": 600}]
)
def test_facts_that_the_vocabulary_has_no_words_for_are_refused(tokenizer, change):
    assert 600 < len(one_token_words(tokenizer)) < 1024
    with pytest.raises(DataError, match="must have one-token words"):
        make_facts(replace(SPEC, **change), tokenizer)


def test_facts_whose_neighbouring_symbols_are_one_token_are_refused(train_tokenizer, make_model):
    # Without a pre-tokenizer that parts words, "Ġbb" twice in a row is a token of its own.
    corpus = ["x bb bb bb bb cc cc dd dd ee ff gg hh bb bb"] * 50
    backend = train_tokenizer(corpus=corpus, use_regex=False)
    tokenizer = load_tokenizer(make_model("merging", tokenizer=backend))
    words = one_token_words(tokenizer)
    assert " bb" in words
    spec = FactSpec(num_facts=8, num_symbols=12, alphabet_size=len(words) - 2, num_key_words=8)
    with pytest.raises(DataError, match="must be 12 tokens behind its key"):
        make_facts(spec, tokenizer)
