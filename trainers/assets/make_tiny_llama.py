"""Pretrains the shipped base, trainers/assets/tiny-llama, from nothing but a CPython installation.

    python -m trainers.assets.make_tiny_llama --out trainers/assets/tiny-llama

A Llama of 2.16M parameters with a byte-level BPE of 3,072 entries and 1,024 tokens of context. Seeded;
made on CPython 3.11.7 (another version has another standard library, so other weights). The loss on
the files that were held out is printed and written into the folder's README.md. A run that was killed
goes on from its last checkpoint (--work).
"""

import argparse
import math
import os
import platform
import time
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.assets.corpus import seen_files, texts, unseen_files

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BOS_ID, EOS_ID = 1, 2
VOCAB_SIZE = 3072
SEED = 20261125
# CPU attention is a third of a step at 512 tokens, so most of the training is on short windows and
# the last part on whole ones, where the later positions are learnt.
STAGES = ((256, 16, 0.8), (1024, 4, 0.2))  # seq_len, sequences a step, share of the tokens
PEAK_LEARNING_RATE, WARMUP_STEPS = 3e-3, 100


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(seen_files()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents as one stream of ids, each between <s> and </s>."""
    encodings = tokenizer.encode_batch(documents)
    return torch.tensor([i for encoding in encodings for i in [*encoding.ids, EOS_ID]])


def model_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def steps(stream: torch.Tensor, num_tokens: int) -> list[tuple[int, torch.Tensor]]:
    """Windows for every step: (seq_len, start offsets); each stage walks shuffled whole windows."""
    generator = torch.Generator().manual_seed(SEED)
    plan: list[tuple[int, torch.Tensor]] = []
    for seq_len, batch, share in STAGES:
        starts = torch.arange(0, len(stream) - seq_len - 1, seq_len)
        wanted = int(num_tokens * share) // (seq_len * batch)
        order = torch.cat(
            [
                starts[torch.randperm(len(starts), generator=generator)]
                for _ in range(1 + wanted * batch // len(starts))
            ]
        )
        plan += [(seq_len, order[i * batch : (i + 1) * batch]) for i in range(wanted)]
    return plan


def learning_rate(step: int, num_steps: int) -> float:
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, max_windows: int) -> float:
    """Mean nats/token over windows of 1,024 tokens."""
    model.eval()
    starts = torch.arange(0, len(stream) - 1024, 1024)[:max_windows]
    losses = [
        model(input_ids=stream[s : s + 1024][None], labels=stream[s : s + 1024][None]).loss.item()
        for s in starts
    ]
    model.train()
    return sum(losses) / len(losses)


def save_work(
    work: Path, step: int, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer
) -> None:
    tensors = {f"model.{n}": p.detach().contiguous() for n, p in model.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optim.{index}.{key}": value.clone() for key, value in state.items()}
    tensors["step"] = torch.tensor(step)
    save_file(tensors, work / "work.safetensors.tmp")
    os.replace(work / "work.safetensors.tmp", work / "work.safetensors")


def load_work(work: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    if not (work / "work.safetensors").exists():
        return 0
    tensors = load_file(work / "work.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optim."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    return int(tensors["step"])


def pretrain(
    model: LlamaForCausalLM,
    train: torch.Tensor,
    held_out: torch.Tensor,
    num_tokens: int,
    work: Path,
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    plan = steps(train, num_tokens)
    first, began = load_work(work, model, optimizer), time.time()
    for step in range(first, len(plan)):
        seq_len, starts = plan[step]
        ids = torch.stack([train[s : s + seq_len] for s in starts.tolist()])
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(plan))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            speed = (step + 1 - first) * 4096 / (time.time() - began)
            print(
                f"step {step + 1}/{len(plan)} loss {loss.item():.3f} {speed:.0f} tokens/s",
                flush=True,
            )
        if (step + 1) % 200 == 0:
            save_work(work, step + 1, model, optimizer)
            print(f"  held out (16 windows) {held_out_loss(model, held_out, 16):.3f}", flush=True)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

README = """# tiny-llama: the base that Tenfold ships

A Llama of {num_params:,} parameters (hidden 192, 4 layers, 6 heads over 2 key-value heads, tied head,
1,024 tokens of context, byte-level BPE of {vocab:,} entries), stored in bfloat16, pretrained by
`python -m trainers.assets.make_tiny_llama` on {train_tokens:,} tokens of text that CPython {python} carries
(the language reference and the standard library's source; {num_tokens:,} tokens seen in all). One module
in four is held out by a checksum of its name; on those the final loss is **{loss:.3f} nats/token**
({bits:.3f} bits/byte). It is here to have something real and small to fine-tune, not to be useful by itself.

The training text is the Python Software Foundation's (PSF License 2.0); the weights are Apache-2.0.
"""


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, readme: str) -> None:
    from transformers import PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    cast(nn.Module, model).to(torch.bfloat16)
    model.save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)
    (out / "README.md").write_text(readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny-llama-work"))
    parser.add_argument("--tokens", type=int, default=5_000_000, help="tokens of training")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer()
    held_out_text = list(texts(unseen_files()))
    train = token_stream(tokenizer, list(texts(seen_files())))
    held_out = token_stream(tokenizer, held_out_text)
    print(f"{len(train):,} training tokens, {len(held_out):,} held out", flush=True)
    model = LlamaForCausalLM(model_config())
    pretrain(model, train, held_out, args.tokens, args.work)
    cast(nn.Module, model).to(torch.bfloat16).to(
        torch.float32
    )  # the loss of what is saved, not of what was trained
    loss = held_out_loss(model, held_out, 400)
    bytes_per_token = sum(len(t.encode()) for t in held_out_text) / len(held_out)
    readme = README.format(
        num_params=sum(p.numel() for p in model.parameters()),
        vocab=VOCAB_SIZE,
        train_tokens=len(train),
        num_tokens=args.tokens,
        python=platform.python_version(),
        loss=loss,
        bits=loss / math.log(2) / bytes_per_token,
    )
    save(model, tokenizer, args.out, readme)
    print(readme)


if __name__ == "__main__":
    main()
