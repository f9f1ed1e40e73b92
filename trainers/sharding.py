"""A base that no worker holds whole: DeepSpeed ZeRO-3 over the frozen weights alone.

Each worker keeps its part of every weight. A decoder layer's weights are gathered when the layer begins,
forward or backward, and let go when it ends: two all-gathers a layer and step. There is no DeepSpeed
optimizer and no DeepSpeed engine: adapters are whole on every worker, and our loop sums and steps them.

bitsandbytes' 4-bit product keeps the gathered weight until its backward pass, so that a forward would end
up holding the whole base: layers are recomputed (gradient_checkpointing.py), which leaves one at a time.

NF4's constants (absmax and offset, 0.127 bits a weight, about 1.1 GB at 70B) are no parameters: they
stay whole on every worker.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trainers.decoder import decoder_layers

SHARED_MEMORY_OP = "deepspeed_shm_comm"


def zero3_config(micro_batch_size: int = 1, grad_accum_steps: int = 1) -> dict[str, Any]:
    """DeepSpeed's config of a sharded base.

    Micro-batch and accumulation only: the third of the tied numbers (train_batch_size) is checked
    against a world size of 1 while the model is being built.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "zero_optimization": {"stage": 3},
    }


class Sharding:
    """What of DeepSpeed a sharded base needs while it trains.

    Args:
        model: its weights are sharded already (`shard_module`), its layers are recomputed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.utils import set_z3_leaf_modules

        self.model = model
        _, layers = decoder_layers(model)
        # One gather for a layer, not one for each of its matrices.
        set_z3_leaf_modules(model.base_model, list({type(layer) for layer in layers}))
        self.offload: Any = DeepSpeedZeRoOffload(
            model.base_model,
            None,
            zero3_config(),
            overlap_comm=model.device.type == "cuda",
            param_persistence_threshold=0,
        )

    @contextmanager
    def head(self) -> Iterator[None]:
        """The output head's weights are there within: gathered once for all chunks of a batch."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        with GatheredParameters(list(head.parameters())):
            yield

    def end_backward(self) -> None:
        """Lets go of the first layer: as its input needs no gradient, nothing tells that it is done."""
        self.offload.release_backward_leftovers()

    def close(self) -> None:
        """Takes the hooks off; the weights stay sharded."""
        self.offload.destroy()

    def held_bytes(self) -> int:
        """Bytes of this worker's parts."""
        parameters: list[Any] = list(self.model.parameters())
        parts = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
        return sum(part.numel() * part.element_size() for part in parts)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_module` went over the model."""
    return any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def prepare_deepspeed(device: torch.device) -> None:
    """Makes DeepSpeed use this device and the process group that is there. Before its first import.

    Raises:
        ValueError: one worker alone, which has nobody to share a base with.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() < 2:
        raise ValueError(
            "a sharded base needs at least 2 workers, there is 1; set workers_per_trial, or "
            "strategy: single"
        )
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    # DeepSpeed calls torch's all-gather by a name that torch is about to retire.
    warnings.filterwarnings("ignore", "`torch.distributed", category=FutureWarning)
    import deepspeed.comm
    import deepspeed.ops

    # Else it compiles an all-reduce of its own for CPUs, which nothing here calls.
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    deepspeed.comm.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def shard_module(module: nn.Module) -> None:
    """Leaves this worker its part of every weight of a module; what is sharded already stays."""
    from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param

    if any(not is_zero_param(parameter) for parameter in module.parameters()):
        Init(module=module, config_dict_or_path=zero3_config(), dtype=_dtype(module))


def _dtype(module: nn.Module) -> torch.dtype:
    return next(p.dtype for p in module.parameters() if p.is_floating_point())
