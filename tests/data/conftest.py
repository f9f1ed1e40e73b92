"""A small byte-level BPE tokenizer of our own, in a folder as models have it; a fresh cache."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog. How many foxes are there? There is 1 fox.",
    "What is the capital of France? The capital of France is Paris.",
    "user assistant system tool Write a response that completes the request. Instruction Response",
    'def f(x): return x + 1  # {"name": "f", "arguments": {"x": 1}}',
] * 4
TAGGED_CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def trained_tokenizer(
    special_tokens=SPECIAL_TOKENS, corpus=CORPUS, *, adds_bos=True, use_regex=True
):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if adds_bos:
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[bos]
        )
    return tokenizer


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """Every test has a cache of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TENFOLD_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def backend():
    return trained_tokenizer()


@pytest.fixture
def make_model(tmp_path, backend):
    """Writes a model folder: make_model(chat_template=..., tokenizer=..., **tokenizer_config)."""

    def make(name="model", *, chat_template=TAGGED_CHATML, tokenizer=None, **config) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (tokenizer or backend).save(str(folder / "tokenizer.json"))
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **config}
        kept = {key: value for key, value in settings.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(kept))
        if chat_template is not None:
            (folder / "chat_template.jinja").write_text(chat_template)
        return str(folder)

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows as jsonl (or raw text or bytes as they are) and gives the path."""

    def write(rows, name="data.jsonl") -> str:
        path = tmp_path / name
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        elif isinstance(rows, str):
            path.write_text(rows, encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def train_all():
    """The examples of a file with an eval file beside it, so that every row of the file is trained:
    train_all(spec) -> (ids, trained ids) of each example."""
    from trainers.data import prepare_data

    def examples(spec):
        train = prepare_data(spec).train
        rows = [train.example(i) for i in range(len(train))]
        return [(row.input_ids.tolist(), row.input_ids[row.loss_mask].tolist()) for row in rows]

    return examples


@pytest.fixture
def spec_for(model, write_rows):
    """A DataSpec whose eval is a file of its own, so that every row of `data` is trained."""
    from trainers.data import DataSpec

    def spec(data, **options):
        held_out = write_rows([{"prompt": "held", "completion": "out"}], "held_out.jsonl")
        return DataSpec(data=data, **{"model": model, "eval": held_out, **options})

    return spec


@pytest.fixture
def sums(spec_for, write_rows):
    """Of 40 short rows."""
    rows = [{"prompt": f"{i} plus one?", "completion": f" It is {i + 1}."} for i in range(40)]
    return spec_for(write_rows(rows))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real training files in {folder}")
    return folder


@pytest.fixture(scope="session")
def templates():
    """Chat templates by name."""
    return {"tagged": TAGGED_CHATML, "plain": PLAIN_CHATML}


@pytest.fixture(scope="session")
def train_tokenizer():
    """trained_tokenizer(special_tokens, corpus, adds_bos=...)."""
    return trained_tokenizer
