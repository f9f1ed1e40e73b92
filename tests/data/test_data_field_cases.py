"""Public failures of fine-tuning data, each as its input and its right value (FIELD_CASES.md, part A).

What a case stands for as a whole kind is tested beside its code; here is the case itself.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from orchestration.check import CheckOptions, checked
from orchestration.cli import main
from tests.trainers.tiny import tiny_model
from trainers.adapters import Pack
from trainers.batches import IGNORED, RowSource
from trainers.composer import ForwardLimits
from trainers.data import DataError, DataSpec, audit_data, load_tokenizer, prepare_data
from trainers.loop import Trainer

CPU = torch.device("cpu")
GOOD = [{"prompt": f"question {i} ", "completion": f"answer {i}"} for i in range(20)]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def labels(source, rows):
    """Labels as collators write them: the id to predict at each position, -100 elsewhere."""
    batch = source.batch([np.array(rows)])
    flat = np.full(batch.ids_BT.numel(), -100)
    counted = batch.loss.targets_M != IGNORED
    flat[batch.loss.index_M[counted] + 1] = batch.loss.targets_M[counted]
    return flat.reshape(batch.ids_BT.shape).tolist()


def word_level(vocabulary):
    """A tokenizer whose words are given: word -> id."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([word for word in vocabulary if word.startswith("<")])
    return tokenizer


@pytest.fixture
def shipped(write_rows, tmp_path, monkeypatch):
    """Runs a verb on rows with the shipped base, in an empty folder: shipped(verb, rows, **keys)."""
    from trainers.data.tokenizer import SHIPPED_MODEL

    monkeypatch.chdir(tmp_path)

    def run(verb, rows, **keys):
        values = {"model": str(SHIPPED_MODEL), "data": write_rows(rows), **keys}
        sweep = tmp_path / "sweep.yaml"
        sweep.write_text(json.dumps(values))
        return main([verb, str(sweep)])

    return run


@pytest.mark.parametrize("verb", ["plan", "sweep"])
def test_a01_row_whose_prompt_fills_max_length_leaves_nothing_and_ends_before_ray(
    verb, shipped, capsys
):
    row = {"prompt": "word " * 200, "completion": "ok"}
    assert shipped(verb, [row], seq_len=64) == 2
    error = capsys.readouterr().err
    assert "1 of 1 rows are longer than seq_len (max_length) 64" in error


def test_a01_no_batch_is_without_a_label(spec_for, write_rows):
    rows = [*GOOD, {"prompt": "word " * 200, "completion": "ok"}]
    prepared = prepare_data(spec_for(write_rows(rows), seq_len=64))
    assert prepared.audit.num_dropped == 1
    assert len(prepared.train) == 20
    assert prepared.train.loss_token_counts.min() > 0


def test_a02_one_overlong_eval_row_leaves_a_finite_eval_loss_and_is_reported(
    write_rows, model, spec_for
):
    held_out = write_rows([*GOOD, {"prompt": "word " * 200, "completion": "ok"}], "eval.jsonl")
    prepared = prepare_data(spec_for(write_rows(GOOD), eval=held_out, seq_len=64))
    assert prepared.audit.num_dropped == 1
    assert len(prepared.eval) == 20
    pack = Pack(tiny_model(vocab_size=512))
    source = RowSource(prepared.eval, load_tokenizer(model).pad_id, CPU)
    trainer = Trainer(pack, source, source, limits=ForwardLimits(max_tokens=64))
    nats, _ = trainer.eval_losses(None)
    assert np.isfinite(nats)
    # sum(loss x tokens) / sum(tokens), whatever the batches.
    other = Trainer(pack, source, source, limits=ForwardLimits(max_tokens=1 << 20))
    assert other.eval_losses(None)[0] == pytest.approx(nats, rel=1e-9)


def test_a03_overlong_answer_is_reported_and_kept_rows_end_with_the_end_token(
    spec_for, write_rows, model
):
    rows = [*GOOD, {"prompt": "p", "completion": "word " * 500}]
    prepared = prepare_data(spec_for(write_rows(rows), seq_len=128))
    assert prepared.audit.num_too_long == prepared.audit.num_dropped == 1
    eos = load_tokenizer(model).eos_id
    source = RowSource(prepared.train, 0, CPU)
    for row in labels(source, range(len(prepared.train))):
        assert [label for label in row if label != -100][-1] == eos
    cut = prepare_data(spec_for(write_rows(rows), seq_len=128, truncation="cut")).audit
    assert (cut.num_cut, cut.num_lost_end) == (1, 1)


def test_a04_pad_that_is_eos_hides_no_end_token(make_model, spec_for, write_rows):
    vocabulary = {"<unk>": 0, "one": 1, "</s>": 2, "three": 3, "four": 4, "five": 5, "six": 6}
    folder = make_model("padless", tokenizer=word_level(vocabulary), bos_token=None, pad_token=None)
    path = write_rows([{"text": "one five six"}, {"text": "one five"}])
    held_out = write_rows([{"text": "three"}], "held.jsonl")
    train = prepare_data(DataSpec(data=path, model=folder, eval=held_out)).train
    assert [train.example(i).input_ids.tolist() for i in (0, 1)] == [[1, 5, 6, 2], [1, 5, 2]]
    pad_id = load_tokenizer(folder).pad_id
    assert pad_id == 2
    # The stock collator gives [[1, 5, 6, -100], [1, 5, -100, -100]]; the first token has nothing
    # before it to be predicted from.
    assert labels(RowSource(train, pad_id, CPU), [0, 1]) == [[-100, 5, 6, 2], [-100, 5, 2, -100]]


def test_a05_tokenizer_without_pad_runs_and_keeps_its_vocabulary(
    make_model, train_tokenizer, spec_for, write_rows
):
    tokenizer = train_tokenizer(["<|endoftext|>"], adds_bos=False)
    names = {"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": None}
    folder = make_model("gpt2like", tokenizer=tokenizer, **names)
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a longer one", "completion": "b"}]
    prepared = prepare_data(spec_for(write_rows(rows), model=folder))
    loaded = load_tokenizer(folder)
    assert loaded.vocab_size == tokenizer.get_vocab_size()
    assert "batches are padded with the end token" in prepared.audit.notes[0]
    batch = RowSource(prepared.train, loaded.pad_id, CPU).batch([np.array([0, 1])])
    assert batch.ids_BT.shape == (2, int(prepared.train.lengths.max()))


@pytest.mark.parametrize(
    "row", [{"messages": CHAT}, {"text": "a"}, {"prompt": "q", "completion": "a"}]
)
def test_a06_bos_stands_exactly_once(row, model, train_all, spec_for, write_rows):
    bos = load_tokenizer(model).bos_id
    ((ids, _),) = train_all(spec_for(write_rows([row])))
    assert ids[0] == bos
    assert ids.count(bos) == 1


def test_a07_prompt_length_is_the_number_of_prompt_ids(model, train_all, spec_for, write_rows):
    ((ids, kept),) = train_all(spec_for(write_rows([{"messages": CHAT}])))
    prompt = "<s><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    prompt_ids = load_tokenizer(model).encoder.encode(prompt, add_special_tokens=False).ids
    assert len(ids) - len(kept) - 1 == len(prompt_ids)  # the line end behind the answer
    assert ids[: len(prompt_ids)] == prompt_ids


def test_a08_conversations_without_a_template_end_with_the_two_choices(
    make_model, spec_for, write_rows
):
    folder = make_model("base", chat_template=None)
    spec = spec_for(write_rows([{"messages": CHAT}]), model=folder)
    with pytest.raises(DataError) as error:
        prepare_data(spec)
    assert "chat_template: FILE.jinja" in str(error.value)
    assert "prompt and completion" in str(error.value)


STRICT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "be brief"}


def test_a09_rows_that_a_template_rejects_are_named_and_a_system_message_can_be_folded(
    make_model, spec_for, write_rows, train_all
):
    rows = [
        {"messages": CHAT},
        {"messages": [SYSTEM, *CHAT]},
        {"messages": [CHAT[1], *CHAT]},
    ]
    path = write_rows(rows)
    spec = spec_for(path, model=make_model("strict", chat_template=STRICT))
    with pytest.raises(DataError, match="2 bad rows") as error:
        prepare_data(spec)
    assert f"{path}:2: " in str(error.value)
    assert "System role not supported" in str(error.value)
    assert "system_role: fold" in str(error.value)
    assert f"{path}:3: " in str(error.value)
    assert "must alternate" in str(error.value)
    folded = replace(spec, system_role="fold", bad_rows="drop")
    assert prepare_data(folded).audit.num_bad_rows == 1
    tokenizer = load_tokenizer(spec.model)
    texts = [tokenizer.decode(ids) for ids, _ in train_all(folded)]
    assert texts[1].startswith("<s><|im_start|>user\nbe brief\n\nq<|im_end|>")


def test_a10_mask_of_a_template_without_generation_tags_is_the_answer(
    make_model, templates, spec_for, write_rows, train_all
):
    folder = make_model("plain", chat_template=templates["plain"])
    ((_, kept),) = train_all(spec_for(write_rows([{"messages": CHAT}]), model=folder))
    assert load_tokenizer(folder).decode(kept) == "a<|im_end|>"


def test_a12_answer_that_merges_with_its_prompt_is_trained_whole(
    make_model, train_tokenizer, spec_for, write_rows, train_all
):
    corpus = ["x.", "x.", "call ", "call "]
    tokenizer = train_tokenizer(["</s>"], corpus, adds_bos=False, use_regex=False)
    assert tokenizer.token_to_id("x.") is not None
    folder = make_model("merging", tokenizer=tokenizer, bos_token=None, pad_token=None)
    path = write_rows([{"prompt": "call x", "completion": ".y"}])
    ((_, kept),) = train_all(spec_for(path, model=folder))
    assert load_tokenizer(folder).decode(kept[:-1]) == ".y"


def test_a13_empty_answer_trains_the_end_token_and_an_empty_chat_is_rejected(
    spec_for, write_rows, train_all, model
):
    spec = spec_for(write_rows([{"prompt": "a", "completion": ""}]))
    ((_, kept),) = train_all(spec)
    assert kept == [load_tokenizer(model).eos_id]
    assert prepare_data(spec).audit.num_empty == 1
    path = write_rows([{"messages": CHAT}, {"messages": []}], "chats.jsonl")
    with pytest.raises(DataError, match=r"chats\.jsonl:2: .*is empty"):
        prepare_data(spec_for(path))


def test_a14_sharegpt_has_the_ids_of_role_and_content(spec_for, write_rows, train_all):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    dialect = train_all(spec_for(write_rows([{"conversations": turns}])))
    assert dialect == train_all(spec_for(write_rows([{"messages": CHAT}], "plain.jsonl")))
    path = write_rows([{"conversations": [{"from": "narrator", "value": "q"}]}], "odd.jsonl")
    with pytest.raises(DataError, match=r"odd\.jsonl:1: .*unknown role 'narrator'"):
        prepare_data(spec_for(path))


def called(name, arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("as_text", [False, True])
def test_a16_a_tool_call_keeps_its_own_keys_and_null_content_is_empty(
    kind, as_text, spec_for, write_rows, train_all, tmp_path, model
):
    arguments = [{"x": 1}, {"y": "t"}]
    given = [json.dumps(value) for value in arguments] if as_text else arguments
    rows = [called("f", given[0]), called("g", given[1])]
    path = write_rows(rows)
    if kind == "parquet":
        path = str(tmp_path / "rows.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    tokenizer = load_tokenizer(model)
    texts = [tokenizer.decode(kept) for _, kept in train_all(spec_for(path))]
    assert texts == [
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
        '<tool_call>\n{"name": "g", "arguments": {"y": "t"}}\n</tool_call><|im_end|>',
    ]
    whole = "".join(tokenizer.decode(ids) for ids, _ in train_all(spec_for(path)))
    assert "null" not in whole
    assert "None" not in whole


def test_a17_a_byte_order_mark_changes_nothing(spec_for, write_rows):
    lines = "".join(json.dumps(row) + "\n" for row in GOOD[:2]).encode()
    hashes = {
        prepare_data(spec_for(write_rows(content, name))).train.content_hash
        for name, content in (("plain.jsonl", lines), ("bom.jsonl", b"\xef\xbb\xbf" + lines))
    }
    assert len(hashes) == 1


ROW = b'{"prompt": "a", "completion": "b"}\n'
UNREADABLE = {
    "cut": (ROW + b'{"prompt": "a", "comple', r"data\.jsonl:2: not valid JSON"),
    "utf16": (ROW.decode().encode("utf-16"), r"data\.jsonl:1: must be UTF-8 text, is UTF-16"),
    "latin1": (ROW + b'{"prompt": "\xe9", "completion": "b"}\n', r"data\.jsonl:2: .*byte 0xE9"),
    "empty": (b"", r"data\.jsonl: must hold rows, is empty \(0 bytes\)"),
    "surrogate": (
        ROW + rb'{"prompt": "\ud83d", "completion": "b"}' + b"\n",
        r"data\.jsonl:2: .*lone surrogate",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a19_unreadable_file_is_one_line_with_its_place(case, write_rows, capsys, shipped):
    content, expected = UNREADABLE[case]
    assert shipped("plan", content) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(expected, lines[0])


def test_a20_a_key_that_stands_twice_is_refused_alike_by_check_and_by_train(write_rows, spec_for):
    path = write_rows('{"prompt":"a","completion":"1","completion":"2"}\n')
    expected = 'key "completion" stands twice'
    found = checked(Path(path), CheckOptions())
    assert expected in found["data"]["bad_rows"][0]
    assert found["refusals"]
    with pytest.raises(DataError, match=f"{path}:1: .*{expected}"):
        prepare_data(spec_for(path))


@pytest.mark.parametrize(
    ("values", "trained"),
    [
        (["2024-01-02", "2024-01-03"], ["2024-01-02", "2024-01-03"]),
        (["1", 2], ["1", "2"]),
        ([1, 2], ["1", "2"]),
        (["01", 1.50], ["01", "1.5"]),
    ],
)
def test_a21_text_is_trained_as_it_is_written(
    values, trained, write_rows, spec_for, train_all, model
):
    rows = [{"prompt": "p ", "completion": value} for value in values]
    tokenizer = load_tokenizer(model)
    found = [tokenizer.decode(kept[:-1]) for _, kept in train_all(spec_for(write_rows(rows)))]
    assert found == trained


def test_a23_alpaca_without_input_is_the_same_however_it_is_said(
    write_rows, spec_for, train_all, model
):
    row = {"instruction": "Say hello.", "output": "hello"}
    path = write_rows([row | {"input": ""}, row | {"input": None}, row])
    examples = train_all(spec_for(path))
    assert examples[0] == examples[1] == examples[2]
    assert "None" not in load_tokenizer(model).decode(examples[0][0])
    assert audit_data(spec_for(path)).num_duplicates == 2
