"""Pretrains a base from nothing but a CPython installation: by default the shipped one,
trainers/assets/tiny-llama.

    python -m trainers.assets.make_tiny_llama --out trainers/assets/tiny-llama

A Llama of 2.16M parameters with a byte-level BPE of 3,072 entries and 1,024 tokens of context. Seeded;
made on CPython 3.11.7 (another version has another standard library, so other weights: --stdlib names
a copy of 3.11.7's). --hidden gives other widths at the same depth, for studies of what width does, with
the shipped tokenizer (--tokenizer). The loss on the files that were held out is printed and written
into the folder's README.md. A CPU run that was killed goes on from its last checkpoint (--work).
"""

import argparse
import math
import platform
import shutil
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.assets.corpus import seen_files, texts, unseen_files
from trainers.assets.pretraining import (
    REPORTED_WINDOWS,
    SEED,
    Recipe,
    cpu_recipe,
    cuda_recipe,
    held_out_loss,
    pretrain,
)

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BOS_ID, EOS_ID = 1, 2
VOCAB_SIZE = 3072
HIDDEN_SIZE, NUM_LAYERS, HEAD_DIM = 192, 4, 32
PEAK_LEARNING_RATE = 3e-3
CPU_TOKENS, CUDA_TOKENS = 5_000_000, 12_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def train_tokenizer(stdlib: Path | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(seen_files(stdlib)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents as one stream of ids, each between <s> and </s>."""
    encodings = tokenizer.encode_batch(documents)
    return torch.tensor([i for encoding in encodings for i in [*encoding.ids, EOS_ID]])


def num_key_value_heads(num_heads: int) -> int:
    """A third of the heads, or else the largest even share below it."""
    return next(num_heads // share for share in (3, 4, 2, 1) if num_heads % share == 0)


def model_config(hidden_size: int = HIDDEN_SIZE, num_layers: int = NUM_LAYERS) -> LlamaConfig:
    """A Llama of heads of 32; the MLP is 8/3 of the width, to the nearest 64.

    Raises:
        ValueError: hidden_size is not a positive multiple of 32.
    """
    if hidden_size < HEAD_DIM or hidden_size % HEAD_DIM:
        raise ValueError(f"--hidden must be a positive multiple of {HEAD_DIM}, got {hidden_size}")
    num_heads = hidden_size // HEAD_DIM
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=64 * round(hidden_size * 8 / 3 / 64),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads(num_heads),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def peak_learning_rate(hidden_size: int) -> float:
    """Falls with the width above the shipped one's. ASSUMPTION: 1/width, as for Adam in muP."""
    return PEAK_LEARNING_RATE * min(1.0, HIDDEN_SIZE / hidden_size)


def recipe_of(device: str, hidden_size: int, num_tokens: int | None) -> Recipe:
    """Args: device: auto (cuda where there is one), cpu or cuda. num_tokens: None for the device's."""
    peak = peak_learning_rate(hidden_size)
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return cuda_recipe(num_tokens or CUDA_TOKENS, peak)
    return cpu_recipe(num_tokens or CPU_TOKENS, peak)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

README = """# {name}: {what}

A Llama of {num_params:,} parameters (hidden {hidden}, {layers} layers, {heads} heads over {kv_heads}
key-value heads, tied head, 1,024 tokens of context, byte-level BPE of {vocab:,} entries), stored in {dtype},
pretrained by `python -m trainers.assets.make_tiny_llama` on {train_tokens:,} tokens of text that CPython
{python} carries (the language reference and the standard library's source; {num_tokens:,} tokens seen in
all), on {device}. One module in four is held out by a checksum of its name; on those the final loss is
**{loss:.3f} nats/token** ({bits:.3f} bits/byte). It is here to have something real and small to fine-tune,
not to be useful by itself.

The training text is the Python Software Foundation's (PSF License 2.0); the weights are Apache-2.0.
"""


def readme(model: LlamaForCausalLM, args: argparse.Namespace, facts: dict[str, object]) -> str:
    config = model.config
    is_shipped = (config.hidden_size, config.num_hidden_layers) == (HIDDEN_SIZE, NUM_LAYERS)
    return README.format(
        name=args.out.resolve().name,
        what="the base that Tenfold ships" if is_shipped else "a base of Tenfold's studies",
        num_params=sum(p.numel() for p in model.parameters()),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocab=VOCAB_SIZE,
        dtype={"bf16": "bfloat16", "fp32": "float32"}[args.dtype_saved],
        python=args.stdlib.resolve().name if args.stdlib else platform.python_version(),
        **facts,
    )


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(args.out)
    if args.tokenizer:
        for name in TOKENIZER_FILES:
            shutil.copyfile(args.tokenizer / name, args.out / name)
        return
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(args.out)


def parsed_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, help="checkpoints; default: a folder of /tmp by the shape"
    )
    parser.add_argument("--hidden", type=int, default=HIDDEN_SIZE, help="width, a multiple of 32")
    parser.add_argument("--layers", type=int, default=NUM_LAYERS)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--tokens", type=int, help=f"of training: {CPU_TOKENS}, on cuda {CUDA_TOKENS}"
    )
    parser.add_argument("--dtype-saved", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument(
        "--tokenizer", type=Path, help="a base's folder: its tokenizer, not a new one"
    )
    parser.add_argument(
        "--stdlib", type=Path, help="library to read, not this Python's; named by its version"
    )
    args = parser.parse_args()
    name = f"tiny-llama-{args.hidden}x{args.layers}-{args.tokens or 'default'}"
    args.work = args.work or Path("/tmp") / name
    return args


def main() -> None:
    args = parsed_args()
    recipe = recipe_of(args.device, args.hidden, args.tokens)
    config = model_config(args.hidden, args.layers)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    given = args.tokenizer and Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    tokenizer = given or train_tokenizer(args.stdlib)
    held_out_text = list(texts(unseen_files(args.stdlib)))
    train = token_stream(tokenizer, list(texts(seen_files(args.stdlib))))
    held_out = token_stream(tokenizer, held_out_text)
    print(f"{len(train):,} training tokens, {len(held_out):,} held out", flush=True)
    model = LlamaForCausalLM(config)
    cast(nn.Module, model).to(recipe.device)
    num_tokens = pretrain(model, train, held_out, recipe, args.work)
    saved = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype_saved]
    # The loss of what is saved, not of what was trained.
    cast(nn.Module, model).to(saved).to(torch.float32)
    loss = held_out_loss(model, held_out, REPORTED_WINDOWS, recipe)
    bytes_per_token = sum(len(t.encode()) for t in held_out_text) / len(held_out)
    facts: dict[str, object] = {
        "train_tokens": len(train),
        "num_tokens": num_tokens,
        "device": device_name(recipe.device),
        "loss": loss,
        "bits": loss / math.log(2) / bytes_per_token,
    }
    cast(nn.Module, model).to(saved)
    save(model, tokenizer, args)
    (args.out / "README.md").write_text(readme(model, args, facts))
    print(readme(model, args, facts))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


if __name__ == "__main__":
    main()
