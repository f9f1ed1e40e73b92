"""Chat rows: rendered as transformers renders, training the assistant's text and nothing else."""

import json

import pytest

from trainers.data import DataError, load_tokenizer, prepare_data
from trainers.data.chat_template import ChatTemplate
from trainers.data.messages import chat_row
from trainers.data.records import RowError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris, évidemment 🦊."},
    {"role": "user", "content": "And of <b>Spain</b> & “Chile”?"},
    {"role": "assistant", "content": "Madrid;\n\n  Santiago. "},
]
ANSWERS = [m["content"] for m in TALK if m["role"] == "assistant"]
STRICT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
# Shaped as Qwen3's: the thinking block is put into turns behind the last user message only.
THINKING = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
TOOLS = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_template(tmp_path, source):
    path = tmp_path / "template.jinja"
    path.write_text(source)
    return str(path)


@pytest.fixture
def trained_text(model, spec_for, write_rows, tmp_path, train_all):
    """What each of the rows trains under a template, decoded: (whole, trained)."""

    def texts(rows, template, **options):
        path = write_template(tmp_path, template)
        tokenizer = load_tokenizer(model)
        examples = train_all(spec_for(write_rows(rows), chat_template=path, **options))
        return [(tokenizer.decode(ids), tokenizer.decode(kept)) for ids, kept in examples]

    return texts


@pytest.mark.parametrize("name", ["tagged", "plain"])
def test_chat_trains_assistant_text_and_end_tokens_only(name, templates, trained_text):
    ((whole, kept),) = trained_text([{"messages": TALK}], templates[name])
    assert kept == "".join(answer + "<|im_end|>" for answer in ANSWERS)
    assert whole.startswith("<s><|im_start|>system\nBe brief.<|im_end|>\n")
    assert "“Chile”" in whole
    assert "<b>Spain</b> &" in whole


def test_chat_template_without_tags_trains_what_the_tagged_one_trains(templates, trained_text):
    rows = [{"messages": TALK}, {"messages": TALK[1:3]}]
    tagged = trained_text(rows, templates["tagged"])
    assert trained_text(rows, "{{ bos_token }}" + templates["plain"]) == tagged


@pytest.mark.parametrize("name", ["tagged", "plain", "strict", "thinking", "tools"])
def test_chat_text_and_mask_are_those_of_transformers(name, templates, make_model):
    transformers = pytest.importorskip("transformers")
    named = {**templates, "strict": STRICT, "thinking": THINKING, "tools": TOOLS}
    folder = make_model(chat_template=named[name])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    talk = TALK[1:] if name == "strict" else TALK
    ours = load_tokenizer(folder)
    template = ChatTemplate(named[name], ours.special_tokens, ["<|im_end|>", "</s>"])
    rendered = template.assistant_spans(chat_row(talk))
    assert rendered.text == theirs.apply_chat_template(talk, tokenize=False)
    if name == "tagged":
        both = theirs.apply_chat_template(
            talk, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
        )
        ids = ours.encoder.encode(rendered.text)
        mask = [
            int(any(a < stop and start < b for a, b in rendered.spans))
            for start, stop in ids.offsets
        ]
        assert both["input_ids"] == ids.ids
        assert both["assistant_masks"] == mask


def test_chat_examples_have_the_ids_and_mask_of_transformers(model, spec_for, write_rows):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(model).apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    example = prepare_data(spec_for(write_rows([{"messages": TALK}]))).train.example(0)
    assert example.input_ids.tolist() == theirs["input_ids"]
    assert example.loss_mask.astype(int).tolist() == theirs["assistant_masks"]


def test_chat_loss_bytes_are_those_of_the_answers(spec_for, write_rows):
    train = prepare_data(spec_for(write_rows([{"messages": TALK}]))).train
    assert train.num_loss_bytes == sum(len(answer.encode()) for answer in ANSWERS)


def test_chat_answer_that_merges_with_its_header_is_trained_whole(trained_text, templates):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\n\nline"}]
    for template in templates.values():
        ((_, kept),) = trained_text([{"messages": talk}], template)
        assert kept == "\n\nline<|im_end|>"


def test_chat_end_of_turn_that_is_no_token_is_trained_as_text(trained_text):
    ((_, kept),) = trained_text([{"messages": TALK[1:]}], STRICT)
    assert kept == "".join(answer.strip() + "<end_of_turn>" for answer in ANSWERS)


def test_chat_tags_that_leave_out_the_end_still_train_it(templates, trained_text):
    template = templates["tagged"].replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert template != templates["tagged"]
    ((_, kept),) = trained_text([{"messages": TALK}], template)
    assert kept == "".join(answer + "<|im_end|>" for answer in ANSWERS)


def test_chat_thinking_template_trains_each_turn_as_it_is_rendered(trained_text):
    last = {**TALK[4], "reasoning_content": "Two countries."}
    ((whole, kept),) = trained_text([{"messages": [*TALK[:4], last]}], THINKING)
    thought = "<think>\nTwo countries.\n</think>\n\n"
    assert kept == f"{ANSWERS[0]}<|im_end|>{thought}{ANSWERS[1]}<|im_end|>"
    assert whole.count("<think>") == 1


def test_chat_message_weights_choose_what_is_trained(templates, trained_text):
    first = {**TALK[2], "weight": 0}
    rows = [{"messages": [*TALK[:2], first, *TALK[3:]]}]
    for template in templates.values():
        ((_, kept),) = trained_text(rows, template)
        assert kept == ANSWERS[1] + "<|im_end|>"


def test_chat_weight_of_zero_on_others_changes_nothing(templates, trained_text):
    weighted = [m if m["role"] == "assistant" else {**m, "weight": 0, "train": None} for m in TALK]
    for template in templates.values():
        same = trained_text([{"messages": TALK}, {"messages": weighted}], template)
        assert same[0] == same[1]


def test_chat_without_completion_only_trains_every_token_but_the_first(templates, trained_text):
    ((whole, kept),) = trained_text(
        [{"messages": TALK}], templates["tagged"], completion_only=False
    )
    assert "<s>" + kept == whole


# A08, A09, A10


def test_chat_without_a_template_is_refused_with_both_choices(make_model, spec_for, write_rows):
    folder = make_model("base", chat_template=None)
    path = write_rows([{"messages": TALK}])
    with pytest.raises(
        DataError, match=r"no chat template.*chat_template: FILE.*prompt and completion"
    ):
        prepare_data(spec_for(path, model=folder))


def test_chat_template_file_takes_the_models_place(
    make_model, spec_for, write_rows, tmp_path, templates
):
    folder = make_model("base", chat_template=None)
    spec = spec_for(write_rows([{"messages": TALK}]), model=folder)
    path = write_template(tmp_path, templates["tagged"])
    chosen = spec_for(spec.data, model=folder, chat_template=path)
    own = prepare_data(spec_for(spec.data)).train.content_hash
    assert prepare_data(chosen).train.content_hash == own


def test_chat_rows_that_the_template_refuses_are_named_with_its_reason(trained_text):
    rows = [{"messages": TALK[1:]}, {"messages": TALK}, {"messages": TALK[2:]}]
    with pytest.raises(DataError, match=r"^2 bad rows: ") as error:
        trained_text(rows, STRICT)
    assert ":2: the chat template refuses the conversation: System role not sup" in str(error.value)
    assert ":3: the chat template refuses the conversation: Roles must alternate" in str(
        error.value
    )


def test_chat_row_without_an_assistant_turn_is_a_bad_row(trained_text, templates):
    with pytest.raises(DataError, match=":1: must have an assistant message to train on"):
        trained_text([{"messages": TALK[:2]}], templates["tagged"])


def test_chat_template_whose_tags_wrap_the_user_is_refused(templates, trained_text):
    template = templates["plain"].replace("{{ '<|im_start|>'", "{% generation %}{{ '<|im_start|>'")
    template = template.replace(
        "+ '\\n' }}{% endfor %}", "+ '\\n' }}{% endgeneration %}{% endfor %}"
    )
    assert "endgeneration" in template
    with pytest.raises(DataError, match="generation tags must wrap the assistant's text"):
        trained_text([{"messages": TALK}], template)


def test_chat_template_that_rewrites_earlier_turns_is_refused_with_the_row(trained_text):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ messages | length }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(
        DataError, match=":1: message 3: where the assistant speaks cannot be verified"
    ):
        trained_text([{"messages": TALK}], template)


# A16


CALLS = [
    ({"name": "f", "arguments": {"x": 1}}, 'f{"x": 1}'),
    ({"name": "g", "arguments": {"y": "t"}}, 'g{"y": "t"}'),
]


def tool_rows(as_text):
    rows = []
    for call, _ in CALLS:
        arguments = json.dumps(call["arguments"]) if as_text else call["arguments"]
        calls = [{"type": "function", "function": {"name": call["name"], "arguments": arguments}}]
        asked = {"role": "user", "content": "q", "tool_calls": None}
        rows.append(
            {"messages": [asked, {"role": "assistant", "content": None, "tool_calls": calls}]}
        )
    return rows


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tool_call_keeps_its_own_arguments(kind, as_text, spec_for, write_rows, tmp_path, model):
    import pyarrow
    import pyarrow.parquet

    path = write_rows(tool_rows(as_text))
    if kind == "parquet":
        path = str(tmp_path / "rows.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(tool_rows(as_text)), path)
    train = prepare_data(spec_for(path, chat_template=write_template(tmp_path, TOOLS))).train
    tokenizer = load_tokenizer(model)
    for index, (_, expected) in enumerate(CALLS):
        example = train.example(index)
        kept = tokenizer.decode(example.input_ids[example.loss_mask].tolist())
        assert kept == f"<tool_call>{expected}</tool_call><|im_end|>"
        whole = tokenizer.decode(example.input_ids.tolist())
        assert "null" not in whole
        assert "None" not in whole


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"temp": 3}', '{"temp": 3}'),  # the inner text of a JSON value in the row
        ('{"temp":1.50,"city":"Zürich","n":null}', '{"temp": 1.50, "city": "Zürich", "n": null}'),
        ('[{"id": 1}, "two"]', '[{"id": 1}, "two"]'),
        ("[]", "[]"),
        ('["Paris", "Rome"]', '["Paris", "Rome"]'),
        ('[{"type": "text", "text": "as "}, {"type": "text", "text": "parts"}]', "as parts"),
        (r'"{\"temp\":1.50}"', '{"temp":1.50}'),  # JSON text is text, and not written twice
        ("1.50", "1.50"),
        ("true", "true"),
        ("null", ""),
    ],
)
def test_tool_result_is_its_json_text_once(content, text, spec_for, write_rows, model, templates):
    """As json.dumps(ensure_ascii=False) writes it, with numbers as they stand in the file."""
    row = (
        '{"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": %s},'
        ' {"role": "assistant", "content": "a"}]}\n'
    )
    train = prepare_data(spec_for(write_rows(row % content))).train
    whole = load_tokenizer(model).decode(train.example(0).input_ids.tolist())
    assert f"<|im_start|>tool\n{text}<|im_end|>\n" in whole


def test_function_call_of_older_openai_files_is_a_tool_call(trained_text):
    call = {"name": "f", "arguments": '{"x": 1}'}
    talk = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "f", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    ((_, kept),) = trained_text([{"messages": talk}], TOOLS)
    assert kept == '<tool_call>f{"x": 1}</tool_call><|im_end|>two<|im_end|>'


def test_sharegpt_function_call_turn_may_hold_several_calls(trained_text):
    calls = json.dumps([call for call, _ in CALLS])
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": calls},
        ]
    }
    ((_, kept),) = trained_text([row], TOOLS)
    assert kept == "".join(f"<tool_call>{text}</tool_call>" for _, text in CALLS) + "<|im_end|>"


SHAREGPT_CALL = {
    "conversations": [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": '{"r": 2}'},
        {"from": "gpt", "value": "two"},
    ],
    "tools": '[{"name": "f", "parameters": {}}]',
}


def test_sharegpt_tool_calls_render_as_text_where_the_template_has_no_tools(
    trained_text, templates
):
    ((whole, kept),) = trained_text([SHAREGPT_CALL], templates["tagged"])
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert kept == f"{call}<|im_end|>two<|im_end|>"
    assert '{"type": "function", "function": {"name": "f", "parameters": {}}}' in whole
    assert '<|im_start|>tool\n{"r": 2}<|im_end|>' in whole


def test_sharegpt_tools_as_text_are_said_in_the_audit(spec_for, write_rows):
    notes = prepare_data(spec_for(write_rows([SHAREGPT_CALL]))).audit.notes
    assert any("no place for tools" in note for note in notes)


def test_sharegpt_tool_calls_use_the_templates_own_form(trained_text):
    ((whole, kept),) = trained_text([SHAREGPT_CALL], TOOLS)
    assert kept == '<tool_call>f{"x": 1}</tool_call><|im_end|>two<|im_end|>'
    assert whole.removeprefix("<s>").startswith('<tools>{"type": "function"')


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("nothing", "messages must be JSON"),
        ({"role": "user"}, "messages must be a list, is dict"),
        (["hello"], "message 1 must be an object, is str"),
        ([{"role": "user"}], "message 1 must have content"),
        ([{"content": "a"}], "message 1: unknown role None"),
        ([{"role": "assistant", "content": "a", "weight": 0.5}], "weight must be 0 or 1, is 0.5"),
        ([{"role": "assistant", "content": "a", "loss": "1"}], "loss must be 0 or 1, is '1'"),
        ([{"role": "assistant", "content": "a", "weight": 0, "train": True}], "must say the same"),
        (
            [{"role": "user", "content": "a", "train": True}],
            "message 1: only assistant messages are trained, train is True on a user message",
        ),
        ([{"role": "tool", "content": "a", "weight": 1}], "only assistant messages are trained"),
        ([{"role": "system", "content": "a", "weight": 0.5}], "weight must be 0 or 1, is 0.5"),
        ([{"role": "function_call", "value": "f(x)"}], "function_call must be JSON"),
        ([{"role": "assistant", "tool_calls": [{"arguments": {}}]}], "must have a name"),
        (
            [{"role": "assistant", "tool_calls": {"name": "f"}}],
            "tool_calls must be a list, is dict",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}],
            "tool call arguments must be an object, is list",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x":1,"x":2}'}]}],
            'tool call arguments key "x" stands twice',
        ),
        (
            [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}],
            "only assistant messages can call tools, is user",
        ),
        ([{"role": "user", "content": {"a": 1}}], "content must be text, is dict"),
        (
            [{"role": "tool", "content": [{"type": "image_url", "image_url": {}}]}],
            "content parts must be text, one is image_url",
        ),
    ],
)
def test_chat_row_that_is_not_a_conversation_says_why(messages, reason):
    with pytest.raises(RowError, match=reason):
        chat_row(messages)
