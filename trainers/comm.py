"""What the workers of a trial exchange: sums of gradients and losses, and in reinforcement learning episodes."""

import resource
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

FLAT_BYTES = 16 << 20
"""Gradients up to here are summed in a flat copy."""


class Comm:
    """Collectives over the workers of this trial; alone, every sum is the value itself."""

    def __init__(self, *, alone: bool = False) -> None:
        self.distributed = dist.is_available() and dist.is_initialized() and not alone
        self.world_size = dist.get_world_size() if self.distributed else 1
        self.world_rank = dist.get_rank() if self.distributed else 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the workers' device, summed over the workers in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, gradients: Sequence[torch.Tensor], nats: torch.Tensor) -> torch.Tensor:
        """Sums the gradients in place and returns the summed nats: one collective for all of a small
        adapter, whose copy costs less than another round; a large one's gradients where they are."""
        if self.world_size == 1:
            return nats
        if sum(g.numel() * g.element_size() for g in gradients) > FLAT_BYTES:
            for gradient in gradients:
                dist.all_reduce(gradient)
            return self.sum(nats.double())
        flat = torch.cat(
            [*(g.reshape(-1) for g in gradients), nats.reshape(1).to(gradients[0].dtype)]
        )
        dist.all_reduce(flat)
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()
        return flat[-1].double()

    def share(self, value: Any) -> Any:
        """World rank 0's value, on all workers."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, by world rank, on all workers."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def peak_bytes(self, device: torch.device) -> int:
        """Peak bytes of this worker: of the GPU's allocator, or of the process on a CPU."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
