"""A training step of a pack on fake tensors: shapes and lifetimes of a model that no memory here would hold.

MemTracker counts what would have been allocated. Fake tensors have no values, so the loop's own decisions
(is this loss finite?) cannot be made: the step is the loop's parts one after another.
"""

from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import quantize_4bit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks.memory_step import StepCase, StepTracker
from search_spaces.architecture import ModelShape
from trainers.adapters import Pack
from trainers.base_model import DTYPES
from trainers.batches import Batch, LossBlocks
from trainers.gradient_checkpointing import recompute_layers
from trainers.head import LossHead
from trainers.optimizer import adamw_step, clip_gradients, grad_norm
from trainers.slots import AdapterSpec

CPU = torch.device("cpu")


class FakeNf4Linear(nn.Linear):
    """bitsandbytes' 4-bit product over a plain packed tensor: its own Params4bit is a subclass of Tensor,
    as a fake tensor is, and cannot be both."""

    def __init__(self, linear: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=False)
        packed, self.state = quantize_4bit(
            linear.weight.data, quant_type="nf4", compress_statistics=True
        )
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return bitsandbytes.matmul_4bit(input, self.weight, quant_state=self.state)

    def constants(self) -> list[torch.Tensor]:
        """What NF4 keeps beside the weights."""
        state: Any = self.state
        return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def fake_step_bytes(config: PretrainedConfig, case: StepCase) -> int:
    """Most bytes alive at once in a forward, backward and optimizer step of all adapters of a case."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[case.dtype], trust_remote_code=False
        )
        model.requires_grad_(False).eval()
        constants = _quantize(model) if case.quantized else []
        if case.gradient_checkpointing:
            recompute_layers(model)
        pack = _pack(model, case)
        batch = _batch(case, LossHead(pack).max_positions)
        tracker = StepTracker()
        tracker.track_external(model, pack.store.memory_4SP, *constants)
        with tracker:
            _step(pack, batch, case)
        return tracker.peak(CPU)


def _quantize(model: PreTrainedModel) -> list[torch.Tensor]:
    head, constants = model.get_output_embeddings(), []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            replaced = FakeNf4Linear(module)
            model.set_submodule(name, replaced)
            constants += replaced.constants()
    return constants


def _pack(model: PreTrainedModel, case: StepCase) -> Pack:
    pack = Pack(model)
    linears = ModelShape.from_config(model.config.to_dict()).resolve_target(case.target)
    for seed in range(case.num_adapters):
        pack.enter(AdapterSpec(lora_rank=case.lora_rank, lora_alpha=8, linears=linears, seed=seed))
    return pack


def _batch(case: StepCase, max_positions: int) -> Batch:
    forward = case.forward
    segment = forward.loss_tokens // case.num_adapters
    blocks = -(-segment // max_positions)
    assert segment % blocks == 0, "choose loss tokens that the chunks divide"
    where = torch.zeros(forward.loss_tokens, dtype=torch.int64)
    rows = forward.tokens // case.row_tokens
    return Batch(
        rows_B=torch.zeros(rows, dtype=torch.int64),
        ids_BT=torch.zeros(rows, case.row_tokens, dtype=torch.int64),
        loss=LossBlocks(where, where, tuple(k for k in pack_order(case) for _ in range(blocks))),
    )


def pack_order(case: StepCase) -> range:
    """Slots of the adapters of a case."""
    return range(case.num_adapters)


def _step(pack: Pack, batch: Batch, case: StepCase) -> None:
    LossHead(pack).train_nats(batch, tuple(pack_order(case)), [1.0] * case.num_adapters)
    for slot in pack.slots.values():
        clip_gradients(slot, grad_norm(slot), 1.0)
        adamw_step(slot, 0, lr=1e-3, weight_decay=0.0)
