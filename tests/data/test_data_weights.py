"""Several files with weights."""

from dataclasses import replace

import pytest

from trainers.data import DataError, DataSpec, cached_audit, load_tokenizer, prepare_data


def rows(name, count):
    return [{"prompt": f"{name} {i}? ", "completion": f"{name} answer {i}"} for i in range(count)]


@pytest.fixture
def files(write_rows):
    return [write_rows(rows(name, 200), f"{name}.jsonl") for name in ("one", "two")]


def completions(prepared_set, model):
    """How often each trained text stands in a set."""
    tokenizer, found = load_tokenizer(model), {}
    for index in range(len(prepared_set)):
        example = prepared_set.example(index)
        text = tokenizer.decode(example.input_ids[example.loss_mask].tolist())
        found[text] = found.get(text, 0) + 1
    return found


def test_weights_of_one_read_the_files_after_each_other(files, spec_for, write_rows):
    both = prepare_data(spec_for(dict.fromkeys(files, 1)))
    joined = write_rows([*rows("one", 200), *rows("two", 200)], "joined.jsonl")
    assert both.train.content_hash == prepare_data(spec_for(joined)).train.content_hash


def test_weight_above_one_repeats_rows_and_counts_their_new_tokens_once(files, spec_for, model):
    once = prepare_data(spec_for(files[0]))
    thrice = prepare_data(spec_for({files[0]: 3}))
    assert set(completions(thrice.train, model).values()) == {3}
    audit = thrice.audit
    assert audit.num_train_loss_tokens == 3 * once.audit.num_train_loss_tokens
    assert audit.num_new_loss_tokens == once.audit.num_train_loss_tokens
    assert audit.num_train_loss_tokens == thrice.train.num_loss_tokens
    assert (audit.num_rows, audit.num_train_rows, audit.num_repeats) == (201, 600, 400)
    assert audit.num_duplicates == 0


def test_weight_below_one_takes_that_part_by_content(files, spec_for, model, write_rows):
    half = prepare_data(spec_for({files[0]: 0.5}))
    taken = completions(half.train, model)
    assert set(taken.values()) == {1}
    assert 80 < len(taken) < 120
    assert half.audit.num_unsampled == 200 - len(taken)
    # The same rows, wherever they stand, and with a larger weight no others less.
    shuffled = write_rows(rows("one", 200)[::-1], "shuffled.jsonl")
    assert completions(prepare_data(spec_for({shuffled: 0.5})).train, model) == taken
    more = completions(prepare_data(spec_for({files[0]: 1.5})).train, model)
    assert {text for text, count in more.items() if count == 2} == set(taken)
    assert set(more.values()) == {1, 2}


def test_weights_do_not_move_rows_across_the_split(files, model):
    def sides(weight):
        prepared = prepare_data(DataSpec(data={files[0]: weight}, model=model, eval=0.2))
        return set(completions(prepared.train, model)), completions(prepared.eval, model)

    train, held_out = sides(1)
    more_train, more_held_out = sides(4)
    assert (train, held_out) == (more_train, more_held_out)  # held out once, not four times
    few_train, few_held_out = sides(0.5)
    assert few_train < train
    assert few_held_out.keys() < held_out.keys()


def test_weights_are_part_of_the_cache_key(files, spec_for):
    spec = spec_for(dict.fromkeys(files, 1))
    prepare_data(spec)
    assert cached_audit(spec) is not None
    assert cached_audit(replace(spec, data={files[0]: 1, files[1]: 2})) is None


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weight_that_is_none_is_refused(files, weight):
    with pytest.raises(DataError, match="weights above 0"):
        DataSpec(data={files[0]: weight})


def test_weighted_file_without_usable_rows_is_named(files, write_rows, spec_for):
    long = write_rows([{"prompt": "word " * 500, "completion": "x"}], "long.jsonl")
    with pytest.raises(DataError, match=r"long\.jsonl: no row with a loss-bearing token is left"):
        prepare_data(spec_for({files[0]: 1, long: 1}, seq_len=64))
