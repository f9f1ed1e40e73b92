"""Row shapes: what is recognised, what text a row gives, what is refused."""

import json

import pytest

from trainers.data import DataError, load_tokenizer, prepare_data


@pytest.fixture
def decoded(model, train_all):
    """(whole text, trained text) of each example of a spec."""
    tokenizer = load_tokenizer(model)

    def texts(spec):
        return [(tokenizer.decode(ids), tokenizer.decode(kept)) for ids, kept in train_all(spec)]

    return texts


@pytest.mark.parametrize(
    "names",
    [
        ("prompt", "completion"),
        ("question", "answer"),
        ("query", "response"),
        ("prompt", "response"),
        ("input", "output"),
    ],
)
def test_known_pair_is_read_without_a_map(names, decoded, spec_for, write_rows):
    row = dict(zip(names, ("What is 1?", " A number."), strict=True))
    spec = spec_for(write_rows([row]))
    assert decoded(spec) == [("<s>What is 1? A number.</s>", " A number.</s>")]
    assert prepare_data(spec).audit.recognised == (names != ("prompt", "completion"))


def test_column_map_is_used_and_described(decoded, spec_for, write_rows):
    path = write_rows([{"problem": "1+1=", "solution": "2", "prompt": "unused"}])
    spec = spec_for(path, columns={"prompt": "problem", "completion": "solution"})
    held_out = write_rows([{"problem": "held", "solution": "out"}], "held.jsonl")
    spec = spec_for(path, columns=spec.columns, eval=held_out)
    assert decoded(spec) == [("<s>1+1=2</s>", "2</s>")]
    audit = prepare_data(spec).audit
    assert audit.shapes == {"completion (solution -> completion, problem -> prompt)": 2}
    assert not audit.recognised


def test_column_map_to_an_absent_column_names_those_found(spec_for, write_rows):
    path = write_rows([{"problem": "1+1=", "solution": "2"}])
    with pytest.raises(DataError, match="names 'question', found problem, solution"):
        prepare_data(spec_for(path, columns={"prompt": "question", "completion": "solution"}))


def test_unknown_shape_names_line_columns_and_accepted_shapes(spec_for, write_rows):
    path = write_rows([{"chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match=r"data\.jsonl:1: no known row shape, found columns chosen"):
        prepare_data(spec_for(path))


def test_row_unlike_the_first_is_a_bad_row(spec_for, write_rows):
    path = write_rows([{"prompt": "a", "completion": "b"}, {"text": "c"}])
    with pytest.raises(DataError, match=r"data\.jsonl:2: must have column 'completion'"):
        prepare_data(spec_for(path))


def test_format_overrides_what_the_first_row_suggests(decoded, spec_for, write_rows):
    path = write_rows([{"prompt": "a", "completion": "b", "text": "whole"}])
    held_out = write_rows([{"text": "held"}], "held.jsonl")
    assert decoded(spec_for(path, format="text", eval=held_out)) == [("<s>whole</s>", "whole</s>")]


# A21


def test_text_that_looks_like_a_date_or_number_is_trained_as_written(decoded, spec_for, write_rows):
    raw = (
        '{"prompt": "on: ", "completion": "2024-01-02"}\n'
        '{"prompt": "n: ", "completion": "1"}\n'
        '{"prompt": "n: ", "completion": 2}\n'
        '{"prompt": "n: ", "completion": 1.50}\n'
        '{"prompt": 007, "completion": true}\n'.replace("007", "7e0")
    )
    trained = [kept for _, kept in decoded(spec_for(write_rows(raw)))]
    assert trained == ["2024-01-02</s>", "1</s>", "2</s>", "1.50</s>", "true</s>"]


def test_csv_of_numbers_keeps_their_text(decoded, spec_for, write_rows):
    path = write_rows("prompt,completion\n1,007\n2,2024-01-02\n", "rows.csv")
    assert [kept for _, kept in decoded(spec_for(path))] == ["007</s>", "2024-01-02</s>"]


def test_object_as_completion_is_a_bad_row(spec_for, write_rows):
    path = write_rows([{"prompt": "a", "completion": {"b": 1}}])
    with pytest.raises(DataError, match=r":1: completion must be text, is dict"):
        prepare_data(spec_for(path))


# A13


@pytest.mark.parametrize("empty", ['""', "null"])
def test_empty_completion_trains_the_end_token_alone(empty, decoded, spec_for, write_rows):
    spec = spec_for(write_rows('{"prompt": "a", "completion": EMPTY}\n'.replace("EMPTY", empty)))
    assert decoded(spec) == [("<s>a</s>", "</s>")]
    assert prepare_data(spec).audit.num_empty == 1


def test_null_prompt_is_a_bad_row(spec_for, write_rows):
    path = write_rows([{"prompt": None, "completion": "b"}])
    with pytest.raises(DataError, match=":1: prompt must be text, is null"):
        prepare_data(spec_for(path))


def test_empty_messages_is_a_bad_row_with_its_line(spec_for, write_rows):
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = write_rows([good, {"messages": []}])
    with pytest.raises(DataError, match=r"data\.jsonl:2: messages must hold at least one message"):
        prepare_data(spec_for(path))


def test_blank_text_row_is_left_out_and_counted(decoded, spec_for, write_rows):
    spec = spec_for(write_rows([{"text": "a"}, {"text": ""}]))
    assert decoded(spec) == [("<s>a</s>", "a</s>")]
    assert prepare_data(spec).audit.num_blank == 1


# A23


def test_alpaca_empty_null_and_absent_input_give_the_same_ids(train_all, spec_for, write_rows):
    row = {"instruction": "Write a response.", "output": "Paris."}
    rows = [{**row, "input": ""}, {**row, "input": None}, row]
    first, *others = train_all(spec_for(write_rows(rows)))
    assert others == [first, first]


def test_alpaca_prompt_is_stanfords(decoded, spec_for, write_rows):
    row = {"instruction": "Say {input}.", "input": "{instruction}", "output": "Paris."}
    (whole, kept), (short, _) = decoded(spec_for(write_rows([row, {**row, "input": None}])))
    assert whole == (
        "<s>Below is an instruction that describes a task, paired with an input that provides"
        " further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {input}.\n\n### Input:\n{instruction}\n\n### Response:Paris.</s>"
    )
    assert kept == "Paris.</s>"
    assert "Input:" not in short
    assert "None" not in short


def test_alpaca_history_is_refused_not_lost(spec_for, write_rows):
    path = write_rows([{"instruction": "a", "output": "b", "history": [["q", "a"]]}])
    with pytest.raises(DataError, match="history are not read; write them as messages"):
        prepare_data(spec_for(path))


# A14


def test_sharegpt_dialects_give_the_ids_of_role_content(train_all, spec_for, write_rows):
    roles = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    turns = [{"from": "human", "value": "q"}, {"from": "assistant", "value": "a"}]
    gpt = [{"from": "user", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [{"conversations": turns}, {"conversations": gpt}, {"conversations": roles}]
    expected = train_all(spec_for(write_rows([{"messages": roles}], "roles.jsonl"))) * 3
    assert train_all(spec_for(write_rows(rows))) == expected
    named_messages = [{"messages": turns}, {"messages": gpt}, {"messages": roles}]
    assert train_all(spec_for(write_rows(named_messages, "messages.jsonl"))) == expected


def test_sharegpt_unknown_role_is_a_bad_row(spec_for, write_rows):
    turns = [{"from": "human", "value": "q"}, {"from": "wizard", "value": "a"}]
    path = write_rows([{"conversations": turns}])
    with pytest.raises(
        DataError, match=":1: message 2: unknown role 'wizard'; known are user, human"
    ):
        prepare_data(spec_for(path))


def test_content_parts_are_joined_and_pictures_refused(train_all, spec_for, write_rows):
    def rows(content):
        return [
            {"messages": [{"role": "user", "content": content}, {"role": "gpt", "content": "a"}]}
        ]

    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    plain = train_all(spec_for(write_rows(rows("one two"), "plain.jsonl")))
    assert train_all(spec_for(write_rows(rows(parts)))) == plain
    with pytest.raises(DataError, match="content parts must be text, one is image"):
        prepare_data(spec_for(write_rows(rows([{"type": "image", "url": "x"}]), "image.jsonl")))


def test_messages_as_json_text_in_csv_equal_those_of_jsonl(train_all, spec_for, write_rows):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    quoted = json.dumps(messages).replace('"', '""')
    from_csv = train_all(spec_for(write_rows(f'messages\n"{quoted}"\n', "rows.csv")))
    assert from_csv == train_all(spec_for(write_rows([{"messages": messages}])))


def test_conversational_prompt_completion_trains_the_completion_only(decoded, spec_for, write_rows):
    prompt = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "given"},
        {"role": "user", "content": "q2"},
    ]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "a2"}]}
    assert [kept for _, kept in decoded(spec_for(write_rows([row])))] == ["a2<|im_end|>"]
