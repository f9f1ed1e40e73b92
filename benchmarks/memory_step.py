"""One real training step of a pack on a random model, and what torch says that it held at its worst.

On a CPU torch's MemTracker counts the storages of every operator's results; on a GPU the caching allocator
counts its own. What a kernel takes and gives back within itself only the allocator sees.
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cluster.holding import BaseHolding, Forward
from cluster.memory import StepBytes, step_bytes
from search_spaces.architecture import ModelShape
from search_spaces.variants import DORA, PLAIN, parts_of, stored_rank
from trainers.adapters import Pack
from trainers.base_model import DTYPES, load_base
from trainers.base_spec import BaseSpec
from trainers.batches import RowSource
from trainers.composer import ForwardLimits
from trainers.gradient_checkpointing import recompute_layers
from trainers.loop import Trainer
from trainers.runs import RunSpec, new_run
from trainers.slots import AdapterSpec


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """What is measured: a step of num_adapters adapters, each with `rows` rows of `row_tokens` tokens.

    Args:
        loss_frac: share of a row that bears loss, its last tokens.
        num_examples: examples of a packed row, which a mask keeps apart.
    """

    num_adapters: int = 2
    lora_rank: int = 4
    target: str = "attn+mlp+unembed"
    rows: int = 4
    row_tokens: int = 64
    loss_frac: float = 0.3
    dropout: float = 0.0
    variant: str = PLAIN
    dtype: str = "fp32"
    quantized: bool = False
    keep_dequantized: bool = False
    gradient_checkpointing: bool = False
    num_examples: int = 1

    @property
    def loss_tokens_per_row(self) -> int:
        """A row's first token is never predicted."""
        return min(self.row_tokens - 1, max(1, round(self.row_tokens * self.loss_frac)))

    @property
    def holding(self) -> BaseHolding:
        """The case as cluster/memory.py takes it."""
        return BaseHolding(
            quantized=self.quantized,
            compute_bytes=DTYPES[self.dtype].itemsize,
            gradient_checkpointing=self.gradient_checkpointing,
            keep_dequantized=self.keep_dequantized,
        )

    @property
    def forward(self) -> Forward:
        """The case as cluster/memory.py takes it."""
        rows = self.num_adapters * self.rows
        return Forward(
            num_adapters=self.num_adapters,
            tokens=rows * self.row_tokens,
            row_tokens=self.row_tokens,
            loss_tokens=rows * self.loss_tokens_per_row,
            lora_rank=stored_rank(self.lora_rank, self.variant),
            dropout=self.dropout > 0,
            magnitudes=DORA in parts_of(self.variant),
            packed=self.num_examples > 1,
        )

    def predicted(self, shape: ModelShape, device_type: Any) -> StepBytes:
        """What cluster/memory.py says."""
        return step_bytes(
            shape,
            self.holding,
            self.forward,
            target=self.target,
            num_slots=self.num_adapters,
            device_type=device_type,
        )


@dataclass(frozen=True, kw_only=True)
class MeasuredBytes:
    """base: parameters. held: those, NF4's constants, the adapters' store. total: the peak of the step."""

    base: int
    held: int
    total: int


class StepTracker(MemTracker):
    """MemTracker without its statistics by module, which refuse a head that is called for each chunk."""

    def __enter__(self) -> "StepTracker":
        super().__enter__()
        self._mod_tracker.clear_user_hooks()
        return self

    def peak(self, device: torch.device) -> int:
        """Most bytes that were alive at once."""
        return self.get_tracker_snapshot("peak")[device]["Total"]


@dataclass(frozen=True)
class _Row:
    input_ids: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray | None


class _Rows:
    """Random rows of one width, as RowSource reads them."""

    def __init__(self, case: StepCase, vocab_size: int, count: int) -> None:
        generator, width = np.random.default_rng(0), case.row_tokens
        mask = np.arange(width) >= width - case.loss_tokens_per_row
        length = -(-width // case.num_examples)
        positions = np.arange(width) % length if case.num_examples > 1 else None
        self.rows = [
            _Row(generator.integers(0, vocab_size, width), mask, positions) for _ in range(count)
        ]
        self.lengths = np.full(count, width)
        self.loss_token_counts = np.full(count, case.loss_tokens_per_row)
        self.num_loss_bytes = int(self.loss_token_counts.sum())

    def example(self, index: int) -> _Row:
        return self.rows[index]


def random_base(
    config: PretrainedConfig, case: StepCase, device: torch.device, folder: Path
) -> PreTrainedModel:
    """A base with random weights, loaded as a sweep loads it; `folder` is where it stands meanwhile."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[case.dtype], trust_remote_code=False
        )
    if not case.quantized:
        model.requires_grad_(False).eval()
        if case.gradient_checkpointing:
            recompute_layers(model)
        return model
    model.save_pretrained(folder)
    del model
    spec = BaseSpec(
        model=str(folder),
        dtype=case.dtype,
        keep_dequantized=case.keep_dequantized,
        gradient_checkpointing=case.gradient_checkpointing,
    )
    return load_base(spec, device)


def measure_step(
    config: PretrainedConfig, case: StepCase, device: torch.device, folder: Path
) -> MeasuredBytes:
    """Bytes of the second optimizer step (the first one's are the same but for what is made once)."""
    model = random_base(config, case, device, folder)
    shape = ModelShape.from_config(config.to_dict())
    pack, linears = Pack(model), shape.resolve_target(case.target)
    specs = [
        AdapterSpec(
            lora_rank=case.lora_rank,
            lora_alpha=8,
            linears=linears,
            dropout=case.dropout,
            seed=k,
            variant=case.variant,
        )
        for k in range(case.num_adapters)
    ]
    slots = [pack.enter(spec) for spec in specs]
    rows = RowSource(_Rows(case, shape.vocab_size, 8 * case.rows), 0, device)  # pyright: ignore[reportArgumentType]
    trainer = Trainer(pack, rows, rows, limits=ForwardLimits(max_tokens=1 << 30))
    budget = RunSpec(
        learning_rate=1e-3, global_batch_size=case.rows, num_examples=8 * case.rows, eval_every=1000
    )
    runs = [new_run(pack, slot, budget) for slot in slots]
    trainer.advance(runs)
    gc.collect()
    held = held_tensors(pack)
    return MeasuredBytes(
        base=sum(p.numel() * p.element_size() for p in model.parameters()),
        held=sum(tensor.numel() * tensor.element_size() for tensor in held),
        total=_peak(device, model, held, lambda: trainer.advance(runs)),
    )


def held_tensors(pack: Pack) -> list[torch.Tensor]:
    """What stays between two steps: weights, NF4's constants, the adapters' store."""
    return [*pack.model.parameters(), *nf4_constants(pack.model), pack.store.memory_4SP]


def nf4_constants(model: nn.Module) -> list[torch.Tensor]:
    """The constants of all NF4 weights, each tensor once."""
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    found = [
        tensor
        for state in states
        if state is not None
        for tensor in (
            state.absmax,
            state.code,
            state.offset,
            state.state2.absmax,
            state.state2.code,
        )
    ]
    return list({tensor.untyped_storage()._cdata: tensor for tensor in found}.values())


def _peak(device: torch.device, model: nn.Module, held: list[torch.Tensor], step: Any) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    tracker = StepTracker()
    tracker.track_external(model, *held)
    with tracker:
        step()
    return tracker.peak(device)
