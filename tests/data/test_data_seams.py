"""Which tokens a row trains: seams, BOS, end token, truncation, windows."""

import numpy as np
import pytest
import torch

from trainers.batches import IGNORED, RowSource
from trainers.data import DataError, DataSpec, count_tokens, load_tokenizer, prepare_data


@pytest.fixture
def merging_model(make_model, train_tokenizer):
    """A tokenizer with the merge "x." (and no BOS)."""
    corpus = ["x.", "x.", "call ", "call "]
    tokenizer = train_tokenizer(["</s>"], corpus, adds_bos=False, use_regex=False)
    assert tokenizer.encode("call x.").ids[-1] == tokenizer.token_to_id("x.")
    return make_model("merging", tokenizer=tokenizer, bos_token=None, pad_token=None)


# A12


def test_completion_that_merges_with_the_prompt_is_trained_whole(
    merging_model, train_all, spec_for, write_rows
):
    path = write_rows([{"prompt": "call x", "completion": ".y"}])
    ((ids, kept),) = train_all(spec_for(path, model=merging_model))
    tokenizer = load_tokenizer(merging_model)
    assert tokenizer.decode(kept[:-1]) == ".y"
    assert tokenizer.decode(ids[:-1]) == "call x.y"
    assert kept[-1] == tokenizer.eos_id


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("call ", "x. call"),  # the space belongs to the prompt, whose token would be " x"
        ("call", " x."),
        ("é", "è"),
        ("🦊", "🦊"),
        ("", "all of it"),
        ("a\n", "\nb"),
    ],
)
def test_completion_ids_decode_to_exactly_the_completion(
    prompt, completion, model, train_all, spec_for, write_rows
):
    path = write_rows([{"prompt": prompt, "completion": completion}])
    ((ids, kept),) = train_all(spec_for(path))
    tokenizer = load_tokenizer(model)
    assert tokenizer.decode(kept) == completion + "</s>"
    assert tokenizer.decode(ids) == f"<s>{prompt}{completion}</s>"


def test_seam_inside_a_trimmed_space_is_seen(
    make_model, train_tokenizer, train_all, spec_for, write_rows
):
    from tokenizers import processors

    # GPT-2's post-processor takes the leading space out of a token's offsets.
    tokenizer = train_tokenizer(["</s>"], ["one two two two"], adds_bos=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    folder = make_model("trimming", tokenizer=tokenizer, bos_token=None, pad_token=None)
    path = write_rows([{"prompt": "one ", "completion": "two"}])
    ((_, kept),) = train_all(spec_for(path, model=folder))
    assert load_tokenizer(folder).decode(kept) == "two</s>"


# A06


def test_bos_stands_once_for_text_pairs_and_chat(model, train_all, spec_for, write_rows):
    bos = load_tokenizer(model).bos_id
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    kinds = [{"text": "a"}, {"prompt": "q", "completion": "a"}, {"messages": messages}]
    for number, row in enumerate([*kinds, {"text": "<s>a"}]):
        ((ids, kept),) = train_all(spec_for(write_rows([row], f"{number}.jsonl")))
        assert ids[0] == bos
        assert ids.count(bos) == 1
        assert bos not in kept


def test_end_token_written_in_the_data_stands_once(model, train_all, spec_for, write_rows):
    path = write_rows([{"prompt": "q", "completion": "a</s>"}, {"prompt": "q", "completion": "a"}])
    first, second = train_all(spec_for(path))
    assert first == second


def test_without_bos_the_first_token_is_never_trained(
    merging_model, train_all, spec_for, write_rows
):
    tokenizer = load_tokenizer(merging_model)
    for number, row in enumerate([{"text": "call x."}, {"prompt": "", "completion": "call x."}]):
        path = write_rows([row], f"{number}.jsonl")
        ((ids, kept),) = train_all(spec_for(path, model=merging_model))
        assert kept == ids[1:]
        assert kept[-1] == tokenizer.eos_id


def test_completion_only_off_trains_prompts_too(model, train_all, spec_for, write_rows):
    path = write_rows([{"prompt": "What is ", "completion": "1"}])
    ((ids, kept),) = train_all(spec_for(path, completion_only=False))
    assert kept == ids[1:]


# A01, A02, A03


def test_all_rows_too_long_is_an_error_that_names_max_length(spec_for, write_rows):
    path = write_rows([{"prompt": "word " * 200, "completion": "ok"}])
    with pytest.raises(DataError, match=r"1 of 1 rows are longer than seq_len \(max_length\) 64"):
        prepare_data(spec_for(path, seq_len=64))
    with pytest.raises(DataError, match=r"1 of 1 rows are longer than seq_len \(max_length\) 64"):
        prepare_data(spec_for(path, seq_len=64, truncation="cut"))


def test_too_long_eval_row_is_dropped_and_counted(spec_for, write_rows):
    train = write_rows([{"prompt": f"q{i}", "completion": "a"} for i in range(20)])
    rows = [{"prompt": "word " * 200, "completion": "ok"}, {"prompt": "q", "completion": "a"}]
    prepared = prepare_data(spec_for(train, eval=write_rows(rows, "eval.jsonl"), seq_len=64))
    assert len(prepared.eval) == 1
    assert prepared.eval.loss_token_counts.min() > 0
    assert (prepared.audit.num_too_long, prepared.audit.num_dropped) == (1, 1)


def test_eval_of_only_too_long_rows_is_an_error_that_names_it(spec_for, write_rows):
    train = write_rows([{"prompt": "q", "completion": "a"}])
    rows = write_rows([{"prompt": "word " * 200, "completion": "ok"}], "eval.jsonl")
    with pytest.raises(DataError, match=r"eval\.jsonl: no row with a loss-bearing token is left"):
        prepare_data(spec_for(train, eval=rows, seq_len=64))


def test_too_long_row_by_default_is_dropped_and_kept_rows_end_with_eos(
    model, train_all, spec_for, write_rows
):
    path = write_rows(
        [{"prompt": "q", "completion": "word " * 500}, {"prompt": "q", "completion": "short"}]
    )
    spec = spec_for(path, seq_len=128)
    ((_, kept),) = train_all(spec)
    assert kept[-1] == load_tokenizer(model).eos_id
    audit = prepare_data(spec).audit
    assert (audit.num_too_long, audit.num_dropped, audit.num_lost_end) == (1, 1, 0)


def test_too_long_row_cut_is_counted_with_its_lost_end(model, train_all, spec_for, write_rows):
    path = write_rows([{"prompt": "q", "completion": "word " * 500}])
    spec = spec_for(path, seq_len=128, truncation="cut")
    ((ids, kept),) = train_all(spec)
    audit = prepare_data(spec).audit
    assert len(ids) == 128
    assert load_tokenizer(model).eos_id not in kept
    assert (audit.num_too_long, audit.num_cut, audit.num_lost_end) == (1, 1, 1)
    decoded = load_tokenizer(model).decode(kept)
    assert prepare_data(spec).train.num_loss_bytes == len(decoded.encode())


@pytest.mark.parametrize("over", [0, 1])
def test_row_of_exactly_seq_len_is_kept_and_one_more_is_not(over, train_all, spec_for, write_rows):
    path = write_rows(
        [{"prompt": "q", "completion": "word " * 20}, {"prompt": "q", "completion": ""}]
    )
    (ids, _), _ = train_all(spec_for(path))
    assert len(train_all(spec_for(path, seq_len=len(ids) - over))) == 2 - over


@pytest.mark.parametrize("seq_len", [2, 3, 16, 17, 1000])
def test_long_text_is_split_so_that_every_token_is_predicted_once(
    seq_len, model, train_all, spec_for, write_rows
):
    text = "The quick brown fox — “jumps” 🦊 over the lazy dog. " * 20
    path, held_out = write_rows([{"text": text}]), write_rows([{"text": "held"}], "text.jsonl")
    spec = spec_for(path, seq_len=seq_len, eval=held_out)
    windows = train_all(spec)
    tokenizer = load_tokenizer(model)
    assert tokenizer.decode([i for _, kept in windows for i in kept]) == text + "</s>"
    assert all(len(ids) <= seq_len and kept == ids[1:] for ids, kept in windows)
    train = prepare_data(spec).train
    assert train.num_loss_tokens == count_tokens(path, model)
    assert train.num_loss_bytes == len(text.encode())


# A04, A05


def test_pad_equal_to_eos_hides_no_end_token(merging_model, spec_for, write_rows):
    path = write_rows(
        [{"prompt": "call", "completion": " x. x."}, {"prompt": "call", "completion": "y"}]
    )
    tokenizer = load_tokenizer(merging_model)
    train = prepare_data(spec_for(path, model=merging_model)).train
    source = RowSource(train, tokenizer.pad_id, torch.device("cpu"))
    batch = source.batch([np.array([0, 1])])
    assert batch.loss is not None
    assert tokenizer.pad_id == tokenizer.eos_id
    width = batch.ids_BT.shape[1]
    counted = batch.loss.targets_M != IGNORED
    predicted = (batch.loss.index_M[counted] + 1).tolist()
    assert len(set(predicted)) == len(predicted) == train.num_loss_tokens
    assert train.lengths[0] != train.lengths[1]
    for row, length in enumerate(train.lengths):
        assert batch.ids_BT[row, length - 1] == tokenizer.eos_id
        assert row * width + length - 1 in predicted
        assert (batch.ids_BT[row, length:] == tokenizer.pad_id).all()
        assert not {row * width + at for at in range(length, width)} & set(predicted)


def test_tokenizer_without_pad_takes_an_unused_token_and_does_not_grow(
    make_model, train_tokenizer, spec_for, write_rows
):
    special = ["<s>", "</s>", "<|reserved_special_token_0|>"]
    tokenizer = train_tokenizer(special)
    folder = make_model("unpadded", tokenizer=tokenizer, pad_token="<not in the vocabulary>")
    loaded = load_tokenizer(folder)
    assert loaded.pad_id == tokenizer.token_to_id("<|reserved_special_token_0|>")
    assert loaded.vocab_size == tokenizer.get_vocab_size()
    path = write_rows([{"prompt": "a", "completion": "b"}])
    notes = prepare_data(spec_for(path, model=folder)).audit.notes
    assert "<|reserved_special_token_0|>" in notes[0]


def test_tokenizer_without_end_token_is_refused(make_model):
    folder = make_model("endless", eos_token=None)
    with pytest.raises(DataError, match="must have an end token"):
        load_tokenizer(folder)


def test_model_folder_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"must have a tokenizer \(tokenizer.json\), found none in"):
        load_tokenizer(tmp_path / "bare")


def test_missing_model_is_refused_with_the_name(write_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = write_rows([{"text": "a"}])
    with pytest.raises(DataError, match=r"model must be a folder or a hub id; .*absent"):
        prepare_data(DataSpec(data=path, model=str(tmp_path / "absent")))


def test_loss_bytes_are_those_of_the_completion(spec_for, write_rows):
    path = write_rows([{"prompt": "Où", "completion": " évidemment 🦊"}])
    assert prepare_data(spec_for(path)).train.num_loss_bytes == len(" évidemment 🦊".encode())


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_rule_is_that_of_transformers(adds_bos, config, make_model, train_tokenizer):
    transformers = pytest.importorskip("transformers")
    folder = make_model(tokenizer=train_tokenizer(adds_bos=adds_bos), **config)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)("some text")["input_ids"]
    loaded = load_tokenizer(folder)
    assert [*loaded.prefix_ids, *loaded.encoder.encode("some text").ids] == theirs


def test_end_token_that_swallows_the_line_end_has_the_ids_of_serving(
    make_model, train_tokenizer, train_all, spec_for, write_rows
):
    from tokenizers import AddedToken

    # Phi 3's <|end|> takes the space behind it into its own offsets.
    tokenizer = train_tokenizer(["<s>", "</s>"], adds_bos=False)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, rstrip=True)])
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    folder = make_model("phi", tokenizer=tokenizer, bos_token=None, chat_template=template)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    ((ids, kept),) = train_all(spec_for(write_rows([{"messages": messages}]), model=folder))
    served = "<|user|>q<|end|>\n<|assistant|>a<|end|>\n"
    loaded = load_tokenizer(folder)
    assert ids == loaded.encoder.encode(served, add_special_tokens=False).ids
    assert [loaded.encoder.id_to_token(i) for i in kept] == ["a", "<|end|>"]
