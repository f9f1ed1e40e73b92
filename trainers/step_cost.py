"""What one optimizer step costs: FLOPs counted, seconds and peak bytes measured, by the code that a trial
runs (Trainer, Pack, LossHead; one adapter, or the whole model).

    python -m trainers.step_cost SPEC.json OUT.json [--wait]

measures one arm in a process of its own, so that no other arm's memory is in its peak. With --wait it
imports everything, prints "ready", and measures when a line comes: many can get ready at once and then
measure one after the other.
"""

import ctypes
import gc
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trainers.adapters import Pack
from trainers.base_model import device_name, load_base, pick_device
from trainers.base_spec import BaseSpec, Quantization
from trainers.batches import Batch, RowSource
from trainers.composer import ForwardLimits
from trainers.cpu import keep_freed_memory
from trainers.dropout import DropoutTokens
from trainers.full import unfreeze
from trainers.head import LossHead, vocabulary_size
from trainers.loop import Trainer
from trainers.measure import now, random_rows
from trainers.meta_shape import shape_of_config
from trainers.paths import read_json, replace_folder, temporary_folder, write_json
from trainers.runs import RunSpec, new_run
from trainers.slots import AdapterSpec

ENDLESS = 10**9
SHIPPED_BASE = Path(__file__).parent / "assets" / "tiny-llama"
SMALL_LR = 1e-6
"""Costs do not depend on it; random weights must not diverge."""
LINEAR_OPS = ("mm", "addmm", "addmm_", "gemm_4bit")
"""Where the products of the linears and of one adapter end; attention's are batched or fused."""


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """One arm.

    Args:
        model: folder of the base; one with a config.json alone gets random weights, written into it.
        lora_rank: 0 is full fine-tuning.
        target: as a candidate's.
        rows, tokens: of the batch, which is one forward; every token but a row's first bears loss.
        num_threads: torch threads on a CPU.
        warmup_steps: steps before anything is timed.
        min_steps, sample_s: fewest steps and seconds that are timed.
    """

    model: str
    lora_rank: int
    lora_alpha: float
    target: tuple[str, ...]
    quantization: Quantization
    dtype: str
    rows: int
    tokens: int
    num_threads: int
    warmup_steps: int
    min_steps: int
    sample_s: float

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StepSpec":
        """The spec that a SPEC.json holds."""
        target: dict[str, Any] = {"target": tuple(values["target"])}
        return cls(**(values | target))


def measure_step(spec: StepSpec) -> dict[str, Any]:
    """{"device", "seconds", "bytes", "flops"} of one arm.

    "bytes": base, adapter, gradients and optimizer are sums over tensors; peak is base and the most that
    was held above the loaded model (by torch's allocator on a GPU; resident on a CPU, and None where the
    system does not tell).

    Raises:
        ValueError: a model or target that cannot be trained.
    """
    write_random_weights(Path(spec.model))
    model = _load(spec)
    for parameter in model.parameters():
        parameter.detach().sum()  # a file's weights are resident only once they have been read
    loaded = held_bytes(model.device)
    reset_peak(model.device)
    bench = StepBench(model, spec)
    seconds = bench.sample()
    highest, counted = peak_bytes(model.device), bench.counted_bytes()
    grown = None if highest is None or loaded is None else highest - loaded
    peak = None if grown is None else counted["base"] + grown
    return {
        "device": device_name(model.device),
        "seconds": seconds,
        "bytes": {**counted, "peak": peak},
        "flops": bench.flops(),
    }


def rehearse(spec: StepSpec) -> None:
    """Makes one step of the arm with the shipped base: what Python, torch and bitsandbytes load when
    they are first used is no part of an arm's memory, but of what was held before."""
    small = replace(spec, model=str(SHIPPED_BASE), rows=1, tokens=16)
    StepBench(_load(small), small).step()


def _load(spec: StepSpec) -> PreTrainedModel:
    return load_base(BaseSpec(model=spec.model, quantization=spec.quantization, dtype=spec.dtype))


def write_random_weights(folder: Path) -> None:
    """Gives a folder with a config.json alone the weights that transformers initialises."""
    if not (folder / "config.json").is_file() or any(folder.glob("*.safetensors*")):
        return
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    temporary = temporary_folder(folder)
    model.save_pretrained(temporary)
    replace_folder(temporary, folder)


class TimedHead(LossHead):
    """A head that notes how long each forward with its backward took."""

    def __init__(self, pack: Pack) -> None:
        super().__init__(pack)
        self.seconds = 0.0

    def train_nats(
        self,
        batch: Batch,
        slots: tuple[int, ...],
        scale_n: list[float],
        dropout: DropoutTokens | None = None,
    ) -> torch.Tensor:
        began = now(self.pack.device)
        nats_n = super().train_nats(batch, slots, scale_n, dropout)
        self.seconds = now(self.pack.device) - began
        return nats_n


class StepBench:
    """One adapter, or a whole model, that makes steps on one batch after the other."""

    def __init__(self, model: PreTrainedModel, spec: StepSpec) -> None:
        self.spec, self.model = spec, model
        self.full = spec.lora_rank == 0
        self.pack = unfreeze(model) if self.full else Pack(model)
        slot = 0 if self.full else self.pack.enter(self._adapter())
        rows = random_rows(spec.rows, spec.tokens, vocabulary_size(model))
        self.source = RowSource(rows, 0, model.device)
        limits = ForwardLimits(max_tokens=spec.rows * spec.tokens)
        self.trainer = Trainer(self.pack, self.source, self.source, limits=limits)
        self.trainer.head = self.head = TimedHead(self.pack)
        run = RunSpec(
            learning_rate=SMALL_LR,
            global_batch_size=spec.rows,
            num_examples=ENDLESS,
            eval_every=ENDLESS,
        )
        self.run = new_run(self.pack, slot, run)

    def _adapter(self) -> AdapterSpec:
        linears = shape_of_config(self.model.config).resolve_target(self.spec.target)
        return AdapterSpec(
            lora_rank=self.spec.lora_rank, lora_alpha=self.spec.lora_alpha, linears=linears
        )

    def step(self) -> tuple[float, float]:
        """Makes one optimizer step; its seconds, and those of its forward and backward."""
        began = now(self.pack.device)
        self.trainer.advance([self.run])
        seconds = now(self.pack.device) - began
        if self.run.status != "running":
            raise ValueError(f"a step must end with finite numbers, got {self.run.reason}")
        return seconds, self.head.seconds

    def sample(self) -> dict[str, Any]:
        """Median seconds of a step, of its forward and backward, and of the rest (the batch's tensors,
        clip, AdamW), after the warm-up; and of how many steps."""
        for _ in range(self.spec.warmup_steps):
            self.step()
        steps: list[tuple[float, float]] = []
        while len(steps) < self.spec.min_steps or sum(s for s, _ in steps) < self.spec.sample_s:
            steps.append(self.step())
        return {
            "step": statistics.median(whole for whole, _ in steps),
            "forward_backward": statistics.median(part for _, part in steps),
            "update": statistics.median(whole - part for whole, part in steps),
            "num_steps": len(steps),
        }

    def counted_bytes(self) -> dict[str, int]:
        """Bytes of the tensors that training holds between steps."""
        slot = self.run.slot
        return {
            "base": base_bytes(self.model),
            "adapter": 0 if self.full else _num_bytes(slot.weights),
            "gradients": _num_bytes(slot.grads),
            "optimizer": _num_bytes([*slot.exp_avgs, *slot.exp_avg_sqs]),
        }

    def flops(self) -> dict[str, int]:
        """FLOPs of one step's forward and backward: the decoder's linears (with what the adapters add
        to them), its attention, the head at the loss-bearing positions, and all of them.

        Counted by torch for each matrix product that was computed, two for a multiply-add. Not counted:
        everything elementwise (norms, softmax, activations, dequantization), the loss, the optimizer.
        """
        batch = self.source.batch([np.arange(self.spec.rows)], self.head.max_positions)
        slots = () if self.full else (self.run.slot_index,)
        step = self._counted(lambda: self.head.train_nats(batch, slots, [1.0]))
        decoder = self._counted(lambda: self._decoder_step(batch, slots))
        self.run.slot.zero_grad()
        linears = sum(decoder.get(name, 0) for name in LINEAR_OPS)
        attention = sum(decoder.values()) - linears
        total = sum(step.values())
        return {
            "linears": linears,
            "attention": attention,
            "head": total - linears - attention,
            "step": total,
        }

    def _decoder_step(self, batch: Batch, slots: tuple[int, ...]) -> None:
        self.pack.activate(slots)
        hidden = self.head.decoder(input_ids=batch.ids_BT, use_cache=False).last_hidden_state
        hidden.backward(torch.ones_like(hidden))

    @staticmethod
    def _counted(work: Callable[[], object]) -> dict[str, int]:
        """FLOPs by operator name."""
        with FlopCounterMode(display=False, custom_mapping=op_formulas()) as counter:
            work()
        found = counter.get_flop_counts().get("Global", {})
        return {str(op).rsplit(".", 1)[-1]: count for op, count in found.items()}


Shape = Sequence[int]


ATTENTION_OPS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
"""Each has a twin that ends in _backward."""


def op_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas for operators that training uses and torch (2.13) counts as nothing: products that are
    added in place (the low-rank ones), attention on a CPU, and bitsandbytes' 4-bit product; and for
    attention with fewer key than query heads, at which torch 2.11 raises."""
    aten = torch.ops.aten
    formulas: dict[Any, Callable[..., int]] = {
        aten.addmm_: _added_product,
        aten.baddbmm_: _added_product,
    }
    for name in ATTENTION_OPS:
        formulas[getattr(aten, name)] = _attention
        formulas[getattr(aten, f"{name}_backward")] = _attention_backward
    if (gemm_4bit := getattr(torch.ops.bitsandbytes, "gemm_4bit", None)) is not None:
        formulas[gemm_4bit] = _product_4bit
    return formulas


def _added_product(into: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(left) * right[-1]


def _product_4bit(x: Shape, packed: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * weight[0]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, _repeated(key, query), _repeated(value, query))


def _attention_backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, _repeated(key, query), _repeated(value, query))


def _repeated(shared: Shape, query: Shape) -> Shape:
    """The shape of keys or values repeated for every query head, [batch, heads, tokens, head_dim]."""
    return (shared[0], query[1], *shared[2:])


def base_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers, a tied one once, a 4-bit one with its constants."""
    held: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for part in (tensor, *_constants(getattr(tensor, "quant_state", None))):
            held[part.data_ptr()] = part.numel() * part.element_size()
    return sum(held.values())


def _constants(state: Any) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside 4-bit numbers, double quantization included."""
    if state is None:
        return []
    own = [getattr(state, name, None) for name in ("absmax", "code", "offset")]
    return [
        *(each for each in own if isinstance(each, torch.Tensor)),
        *_constants(getattr(state, "state2", None)),
    ]


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def reset_peak(device: torch.device) -> None:
    """Makes the peak what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def held_bytes(device: torch.device) -> int | None:
    """Bytes held now; on a CPU without what the C library keeps of freed memory."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return _status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes held since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int | None:
    """A line of /proc/self/status in bytes; None on a system without it."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    found = (int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
    return next(found, None)


def main(spec_file: str, out_file: str, *flags: str) -> None:
    """Measures the arm of SPEC.json into OUT.json."""
    spec = StepSpec.from_dict(read_json(Path(spec_file)))
    device = pick_device()
    if device.type == "cpu":
        torch.set_num_threads(spec.num_threads)
        keep_freed_memory()
    rehearse(spec)
    if "--wait" in flags:
        print("ready", flush=True)
        if not sys.stdin.readline():
            return  # who would have asked is gone
    write_json(Path(out_file), measure_step(spec))


if __name__ == "__main__":
    main(*sys.argv[1:])
