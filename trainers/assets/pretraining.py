"""The pretraining loop of `make_tiny_llama.py`: plan, learning rate, held-out loss, checkpoints.

Shape legend: B sequences of a step, T tokens of a window.
"""

import math
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

SEED = 20261125
# CPU attention is a third of a step at 512 tokens, so most of the training is on short windows and
# the last part on whole ones, where the later positions are learnt.
STAGES = ((256, 16, 0.8), (1024, 4, 0.2))  # T, B on a CPU, share of the tokens
CPU_STEP_TOKENS = 4096
WARMUP_STEPS = 100
REPORTED_WINDOWS, CHOOSING_WINDOWS = slice(400), slice(400, None)
"""Held-out windows of 1,024 tokens whose loss is reported, and those that choose when to stop."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a base is pretrained.

    Args:
        num_tokens: tokens of training, repeats counted.
        peak_learning_rate: of AdamW, after the warmup.
        device: cpu or cuda; on cuda bf16 autocast over fp32 weights.
        step_scale: tokens of a step, in CPU_STEP_TOKENS.
        stop_after: checks of the held-out loss without a new best after which training ends with the
            best weights; None trains to the end and keeps the last.
        check_steps: steps between two checks.
        check_batch: held-out windows in one forward pass.
    """

    num_tokens: int
    peak_learning_rate: float
    device: torch.device
    step_scale: int
    stop_after: int | None
    check_steps: int
    check_batch: int

    def autocast(self) -> AbstractContextManager[object]:
        is_cuda = self.device.type == "cuda"
        return torch.autocast("cuda", torch.bfloat16) if is_cuda else nullcontext()


def cpu_recipe(num_tokens: int, peak_learning_rate: float) -> Recipe:
    """fp32, steps of 4,096 tokens, to the end."""
    return Recipe(
        num_tokens=num_tokens,
        peak_learning_rate=peak_learning_rate,
        device=torch.device("cpu"),
        step_scale=1,
        stop_after=None,
        check_steps=200,
        check_batch=1,
    )


def cuda_recipe(num_tokens: int, peak_learning_rate: float) -> Recipe:
    """bf16 autocast, steps of 16,384 tokens, as long as the held-out loss falls."""
    return Recipe(
        num_tokens=num_tokens,
        peak_learning_rate=peak_learning_rate,
        device=torch.device("cuda"),
        step_scale=4,
        stop_after=4,
        check_steps=30,
        check_batch=16,
    )


def steps(stream: torch.Tensor, recipe: Recipe) -> list[tuple[int, torch.Tensor]]:
    """Windows for every step: (T, start offsets); each stage walks shuffled whole windows."""
    generator = torch.Generator().manual_seed(SEED)
    plan: list[tuple[int, torch.Tensor]] = []
    for seq_len, cpu_batch, share in STAGES:
        batch = cpu_batch * recipe.step_scale
        starts = torch.arange(0, len(stream) - seq_len - 1, seq_len)
        wanted = int(recipe.num_tokens * share) // (seq_len * batch)
        order = torch.cat(
            [
                starts[torch.randperm(len(starts), generator=generator)]
                for _ in range(1 + wanted * batch // len(starts))
            ]
        )
        plan += [(seq_len, order[i * batch : (i + 1) * batch]) for i in range(wanted)]
    return plan


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Warmup, then a cosine to 2% of the peak."""
    warmup = min(WARMUP_STEPS, max(1, num_steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def held_out_loss(
    model: LlamaForCausalLM, stream: torch.Tensor, windows: slice, recipe: Recipe
) -> float:
    """Mean nats/token over the stream's windows of 1,024 tokens that the slice names."""
    model.eval()
    starts = torch.arange(0, len(stream) - 1024, 1024)[windows].tolist()
    total = 0.0
    for at in range(0, len(starts), recipe.check_batch):
        batch = starts[at : at + recipe.check_batch]
        ids = torch.stack([stream[s : s + 1024] for s in batch]).to(recipe.device)
        total += model(input_ids=ids, labels=ids).loss.item() * len(ids)
    model.train()
    return total / len(starts)


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


class BestWeights:
    """The weights of the lowest held-out loss so far, on the model's device."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model, self.loss, self.step, self.num_worse = model, math.inf, 0, 0
        self.weights: dict[str, torch.Tensor] = {}

    def check(self, loss: float, step: int) -> None:
        print(f"  held out {loss:.3f}, best {min(loss, self.loss):.3f}", flush=True)
        if not loss < self.loss:
            self.num_worse += 1
            return
        self.loss, self.step, self.num_worse = loss, step, 0
        self.weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    @torch.no_grad()
    def restore(self) -> None:
        if not self.weights:
            raise ValueError(
                f"the held-out loss must be a number at one check at least, got {self.num_worse} that "
                "are not: the learning rate is too high for this width, or there are no tokens"
            )
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.weights[name])


def pretrain(
    model: LlamaForCausalLM, train: torch.Tensor, held_out: torch.Tensor, recipe: Recipe, work: Path
) -> int:
    """Trains in place; the number of tokens after which the weights were what they are.

    A run without `stop_after` that was killed goes on from its last checkpoint in `work`.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.peak_learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    plan, step_tokens = steps(train, recipe), CPU_STEP_TOKENS * recipe.step_scale
    best = BestWeights(model) if recipe.stop_after is not None else None
    first, began = 0 if best else load_work(work, model, optimizer), time.time()
    for step in range(first, len(plan)):
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(plan), recipe.peak_learning_rate)
        loss = train_step(model, optimizer, train, plan[step], recipe)
        done = step + 1
        if done % 50 == 0:
            speed = (done - first) * step_tokens / (time.time() - began)
            print(
                f"step {done}/{len(plan)} loss {loss.item():.3f} {speed:.0f} tokens/s", flush=True
            )
        is_check = done % recipe.check_steps == 0
        if best and (is_check or done == len(plan)):
            with recipe.autocast():
                best.check(held_out_loss(model, held_out, CHOOSING_WINDOWS, recipe), done)
            if best.num_worse == recipe.stop_after:
                break
        elif is_check:
            save_work(work, done, model, optimizer)
            loss_now = held_out_loss(model, held_out, slice(16), recipe)
            print(f"  held out (16 windows) {loss_now:.3f}", flush=True)
    if best:
        best.restore()
    return (best.step if best else len(plan)) * step_tokens


def train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    train: torch.Tensor,
    windows: tuple[int, torch.Tensor],
    recipe: Recipe,
) -> torch.Tensor:
    """One optimizer step on the windows; its loss in nats/token."""
    seq_len, starts = windows
    ids = torch.stack([train[s : s + seq_len] for s in starts.tolist()]).to(recipe.device)
    with recipe.autocast():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
