"""Templates of real models, as TRL ships them, and small ones in the form of others: text as
transformers renders it, and exactly the assistant's text trained."""

import copy
import re
from pathlib import Path

import jinja2
import pytest

from trainers.data.chat_template import ChatTemplate
from trainers.data.messages import chat_row
from trainers.data.records import DataError, RowError

TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
# What the models' tokenizers have as added tokens.
MARKER = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|<｜[^<>\n]{1,40}｜>|</?[a-z_]+>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?[A-Z_]+\]"
)
# Templates of vision models, which print nothing for content that is text.
PARTS_ONLY = re.compile(r"in message\['content'\] (%|\|)")
# What some of TRL's training templates tag of the turn's beginning.
HEADERS = re.compile(r"<｜Assistant｜>|<\|(im_)?start\|>assistant")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **others):
    return {"role": "assistant", "content": text, **others}


def calling(*cities):
    calls = [
        {
            "id": "a1b2c3d4e",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": city}},
        }
        for city in cities
    ]
    return assistant("", tool_calls=calls)


def answered(text):
    return {"role": "tool", "name": "get_weather", "tool_call_id": "a1b2c3d4e", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
SCHEMAS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a place.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Place."}},
                "required": ["city"],
            },
        },
    }
]
TALKS = {
    "one turn": [user("Capital?"), assistant("Paris, it is.")],
    "two turns": [user("First?"), assistant("Number one."), user("Second?"), assistant(" Two. \n")],
    "system": [SYSTEM, user("First?"), assistant("One."), user("Second?"), assistant("Two.")],
    "tool": [user("Rain?"), calling("Rome"), answered("dry"), assistant("No."), user("Thanks"),
             assistant("Welcome")],
    "two tools": [SYSTEM, user("Rain?"), calling("Rome", "Oslo"), answered("dry"), answered("wet"),
                  assistant("Only in the north.")],
    "thinking": [user("First?"), assistant("One.", reasoning_content="Counting."), user("Second?"),
                 assistant("Two.", reasoning_content="Counting on.")],
    "thinking tool": [user("Rain?"), {**calling("Rome"), "reasoning_content": "Ask."},
                      answered("dry"), assistant("No.", reasoning_content="Say.")],
    "empty answer": [user("First?"), assistant(""), user("Second?"), assistant("Two.")],
    "markers in text": [user("say <|im_end|> or <end_of_turn>\n<|im_start|>assistant\nno"),
                        assistant("well <eos> <|im_end|> then"), user("no <|eot_id|>!"),
                        assistant("Two.")],
}  # fmt: skip


def trl_files():
    try:
        import trl
    except ImportError:
        return []
    return sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


TRL = {path.stem: path for path in trl_files()}
needs_trl = pytest.mark.skipif(not TRL, reason="needs trl, which ships chat templates")
NAMES = pytest.mark.parametrize("name", [name for name in TRL if name != "glm4moe"])


def template_of(source, **options):
    markers = {*MARKER.findall(COMMENT.sub("", source)), *TOKENS.values()}
    return ChatTemplate(source, TOKENS, sorted(markers), **options)


def trained(template, talk, tools=None):
    rendered = template.assistant_spans(chat_row(talk, tools=tools))
    return [rendered.text[start:stop] for start, stop in rendered.spans]


def transformers_text(source, talk, tools, **options):
    from transformers.utils.chat_template_utils import render_jinja_template

    talk = copy.deepcopy(talk)
    if PARTS_ONLY.search(source):
        talk = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk]
    return render_jinja_template([talk], tools=tools, chat_template=source, **TOKENS, **options)


def tools_of(talk):
    return SCHEMAS if any("tool_calls" in message for message in talk) else None


@needs_trl
@NAMES
@pytest.mark.parametrize("talk", TALKS.values(), ids=list(TALKS))
def test_real_template_trains_the_assistant_alone_or_refuses_the_row(name, talk):
    """What is trained holds every answer and ends it, and holds nothing that others said."""
    template = template_of(TRL[name].read_text(encoding="utf-8"))
    try:
        texts = trained(template, talk, tools_of(talk))
    except RowError:
        assert talk not in (TALKS["one turn"], TALKS["two turns"], TALKS["empty answer"])
        return
    answers = [m["content"].strip() for m in talk if m["role"] == "assistant"]
    whole = "".join(texts)
    assert all(answer in whole for answer in answers)
    assert whole.count("Rome") == str(talk).count("Rome")
    for message in talk:
        if message["role"] != "assistant":
            assert message["content"] not in whole.replace("well <eos> <|im_end|> then", "")
    last = texts[-1].removesuffix(TOKENS["eos_token"]) or texts[-2]
    assert texts[-1].endswith((template.end_of_turn, TOKENS["eos_token"]))
    assert last.removesuffix(template.end_of_turn).rstrip().endswith(answers[-1])


@needs_trl
@NAMES
def test_real_template_text_is_that_of_transformers(name):
    pytest.importorskip("transformers")
    source = TRL[name].read_text(encoding="utf-8")
    template = template_of(source)
    compared = 0
    for kind, talk in TALKS.items():
        tools = tools_of(talk)
        try:
            (theirs,), _ = transformers_text(source, talk, tools)
            rendered = template.assistant_spans(chat_row(talk, tools=tools))
        except (jinja2.TemplateError, TypeError, RowError):  # e.g. arguments that must be text
            continue
        if tools and not ("Weather of a place." in theirs and "Rome" in theirs):
            continue  # which is lost there; we write it as text
        assert rendered.text == theirs, kind
        compared += 1
    assert compared >= 4


@needs_trl
@pytest.mark.parametrize("name", [name for name in TRL if name.endswith("_training")])
def test_real_template_with_tags_trains_what_transformers_masks(name):
    """But for the header and the white space behind the end of turn, which the model is not to
    write: some of TRL's tags wrap them."""
    pytest.importorskip("transformers")
    source = TRL[name].read_text(encoding="utf-8")
    template = template_of(source)
    for talk in (TALKS["one turn"], TALKS["two turns"], TALKS["thinking"]):
        rendered = template.assistant_spans(chat_row(talk))
        (text,), (tags,) = transformers_text(source, talk, None, return_assistant_tokens_mask=True)
        theirs = {i for start, stop in tags for i in range(start, stop)}
        ours = {i for start, stop in rendered.spans for i in range(start, stop)}
        assert ours <= theirs
        missing = "".join(text[i] for i in sorted(theirs - ours))
        assert not HEADERS.sub("", missing).strip()


THOUGHT = "<think>\nCounting on.\n</think>\n\n"
EXACT = [
    ("llama3", "two turns", ["Number one.<|eot_id|>", "Two.<|eot_id|>"]),
    ("gemma", "two turns", ["Number one.<end_of_turn>", "Two.<end_of_turn>"]),
    ("phi3", "two turns", ["Number one.<|end|>", " Two. \n<|end|>"]),
    ("smolvlm", "two turns", [" Number one.<end_of_utterance>", "  Two. \n<end_of_utterance>"]),
    ("llava_next", "two turns", [" Number one.</s>", "  Two. \n</s>"]),
    ("qwen3", "two turns", ["Number one.<|im_end|>",
                            "<think>\n\n</think>\n\n Two. \n<|im_end|>"]),
    ("qwen3", "thinking", ["One.<|im_end|>", f"{THOUGHT}Two.<|im_end|>"]),
    ("qwen3", "thinking tool", [
        '<think>\nAsk.\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city":'
        ' "Rome"}}\n</tool_call><|im_end|>',
        "<think>\nSay.\n</think>\n\nNo.<|im_end|>"]),
    ("qwen3", "tool", [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
        "<|im_end|>", "No.<|im_end|>", "<think>\n\n</think>\n\nWelcome<|im_end|>"]),
    # The generation prompt opens the thinking, which is not the assistant's to write.
    ("qwen3_6", "thinking", ["One.<|im_end|>", "Counting on.\n</think>\n\nTwo.<|im_end|>"]),
    ("qwen3_5_nothink", "one turn", ["Paris, it is.<|im_end|>"]),
    ("deepseekv3", "two turns", ["Number one.<｜end▁of▁sentence｜>", " Two. \n<｜end▁of▁sentence｜>"]),
    ("deepseekv3_training", "one turn", ["Paris, it is.<｜end▁of▁sentence｜>"]),
    ("deepseekv3", "two tools", [
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Rome"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>'
        'get_weather\n```json\n{"city": "Oslo"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
        "<｜end▁of▁sentence｜>", "Only in the north.<｜end▁of▁sentence｜>"]),
    ("llama3_1", "tool", ['{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>',
                          "No.<|eot_id|>", "Welcome<|eot_id|>"]),
    # Three ends of turn: before another turn, of a call, of the conversation.
    ("gptoss", "tool", [
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
        "<|channel|>final<|message|>No.<|end|>", "<|channel|>final<|message|>Welcome<|return|>"]),
    ("gptoss", "thinking", [
        "<|channel|>final<|message|>One.<|end|>",
        "<|channel|>analysis<|message|>Counting on.<|end|><|start|>assistant<|channel|>final"
        "<|message|>Two.<|return|>"]),
    ("diffusion_gemma", "tool", [
        '<|tool_call>call:get_weather{city:<|"|>Rome<|"|>}<tool_call|><|tool_response>',
        "No.<turn|>", "Welcome<turn|>"]),
]  # fmt: skip


@needs_trl
@pytest.mark.parametrize(("name", "kind", "expected"), EXACT)
def test_real_template_trains_exactly(name, kind, expected):
    template = template_of(TRL[name].read_text(encoding="utf-8"))
    assert trained(template, TALKS[kind], tools_of(TALKS[kind])) == expected


def test_real_template_that_shows_only_one_call_refuses_the_second():
    if "gptoss" not in TRL:
        pytest.skip("needs trl, which ships chat templates")
    template = template_of(TRL["gptoss"].read_text(encoding="utf-8"))
    with pytest.raises(RowError, match="message 3: the chat template leaves out a tool call"):
        trained(template, TALKS["two tools"], SCHEMAS)


# Shaped as Mistral's: the system text goes into the last user message, and only while that is the
# last message of all; no header, no generation prompt.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{{ bos_token }}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' and rest[loop.index0 + 2:] == [] and system is defined %}"
    "[INST] {{ system }}\n\n{{ m.content }}[/INST]"
    "{% elif m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "<start_of_turn>{{ role }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_template_without_header_that_moves_the_system_text_trains_the_answers():
    template = template_of(MISTRAL)
    rendered = template.assistant_spans(chat_row(TALKS["system"]))
    assert rendered.text == (
        "<bos>[INST] First?[/INST] One.<eos>[INST] Be brief.\n\nSecond?[/INST] Two.<eos>"
    )
    assert trained(template, TALKS["system"]) == [" One.<eos>", " Two.<eos>"]


def test_template_date_is_one_for_all_renderings():
    source = "{{ strftime_now('%H:%M:%S.%f') }}" + CHATML
    template = template_of(source)
    first = template.assistant_spans(chat_row(TALKS["two turns"]))
    assert first.text == template.assistant_spans(chat_row(TALKS["two turns"])).text
    assert template.reads_clock
    assert not template_of(CHATML).reads_clock


# A09: system_role: fold


def test_system_message_that_is_refused_comes_with_the_offer_to_fold_it():
    with pytest.raises(
        RowError, match=r"refuses the conversation: System role not supported; system_role: fold"
    ):
        trained(template_of(GEMMA), TALKS["system"])


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_message_that_is_left_out_comes_with_the_offer_to_fold_it(role):
    source = CHATML.replace("in messages %}", f"in messages if m.role != '{role}' %}}")
    talk = [{**SYSTEM, "role": role}, *TALKS["one turn"]]
    with pytest.raises(RowError, match=rf"message 1: .* leaves out a text of this {role}.*fold"):
        trained(template_of(source), talk)
    assert trained(template_of(source, fold_system=True), talk) == ["Paris, it is.<|im_end|>"]


def test_fold_system_puts_the_text_before_the_first_users():
    template = template_of(GEMMA, fold_system=True)
    rendered = template.assistant_spans(chat_row(TALKS["system"]))
    assert rendered.text.startswith("<bos><start_of_turn>user\nBe brief.\n\nFirst?<end_of_turn>")
    assert trained(template, TALKS["system"]) == ["One.<end_of_turn>", "Two.<end_of_turn>"]


def test_fold_system_keeps_the_weights_of_the_messages():
    talk = [SYSTEM, user("First?"), assistant("One.", weight=0), user("2?"), assistant("Two.")]
    assert trained(template_of(GEMMA, fold_system=True), talk) == ["Two.<end_of_turn>"]


def test_fold_system_folds_tools_that_are_written_as_text():
    talk = [user("Rain?"), calling("Rome")]
    template = template_of(GEMMA, fold_system=True)
    text = template.assistant_spans(chat_row(talk, tools=SCHEMAS)).text
    assert re.search(r"^<bos><start_of_turn>user\nYou may call.*</tools>\n\nRain\?<end", text, re.S)
    with pytest.raises(RowError, match=r"no place for tools.*system_role: fold"):
        trained(template_of(GEMMA), talk, SCHEMAS)


@pytest.mark.parametrize("talk", [[SYSTEM, assistant("Hi.")], [SYSTEM]])
def test_fold_system_without_a_user_message_behind_it_refuses_the_row(talk):
    with pytest.raises(RowError, match="system_role: fold needs a user message right after"):
        trained(template_of(GEMMA, fold_system=True), talk)


# What cannot be verified is refused


def test_template_that_changes_what_it_is_told_refuses_the_row():
    source = CHATML.replace(
        "m.content", "(m.content | upper if 'loud' == m.content else m.content)"
    )
    assert trained(template_of(source), TALKS["one turn"]) == ["Paris, it is.<|im_end|>"]
    with pytest.raises(RowError, match="where each message's text stands cannot be verified"):
        trained(template_of(source), [user("loud"), assistant("Yes.")])


def test_template_whose_tags_leave_out_one_message_refuses_the_row():
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    assert trained(template_of(source), TALKS["one turn"]) == ["Paris, it is.<|im_end|>"]
    with pytest.raises(RowError, match="generation tags must wrap every assistant message"):
        trained(template_of(source), TALKS["two turns"])


def test_template_without_an_end_of_turn_is_refused():
    with pytest.raises(DataError, match="must end an assistant turn with an end token or text"):
        template_of("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")


def test_template_that_does_not_compile_is_refused_with_its_line():
    with pytest.raises(DataError, match=r"chat template does not compile: .*\(line 2\)"):
        template_of("\n{% for m in messages %}")


def test_template_refusal_counts_messages_as_the_row_does():
    source = CHATML.replace("in messages %}", "in messages if m.role != 'tool' %}")
    talk = [user("Rain?"), calling("Rome"), answered("dry"), assistant("No.")]
    with pytest.raises(RowError, match=r"message 3: .* this tool message"):
        trained(template_of(source), talk, SCHEMAS)


def test_template_whose_tags_stand_in_a_macro_is_refused():
    source = (
        "{% macro say(m) %}<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% endmacro %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ say(m) }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="generation tags must stand in its main text"):
        template_of(source)


def test_template_text_of_a_row_needs_no_spans():
    source = CHATML.replace("{{ m.role }}", "{{ m.role }} {{ messages | length }}")
    row = chat_row(TALKS["two turns"])
    with pytest.raises(RowError, match=r"cannot be verified.*completion_only: false"):
        template_of(source).assistant_spans(row)
    assert template_of(source).text(row).startswith("<|im_start|>user 4\nFirst?<|im_end|>\n")


def test_template_says_when_it_leaves_out_thoughts():
    if "qwen3" not in TRL:
        pytest.skip("needs trl, which ships chat templates")
    template = template_of(TRL["qwen3"].read_text(encoding="utf-8"))
    trained(template, TALKS["thinking tool"], SCHEMAS)
    assert not template.left_out_reasoning
    trained(template, TALKS["thinking"])
    assert template.left_out_reasoning
