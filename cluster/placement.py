"""How a global batch is divided over workers and micro-steps."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BatchSplit:
    """micro_batch_size x grad_accum_steps x num_workers == global_batch_size."""

    micro_batch_size: int
    grad_accum_steps: int
    num_workers: int


def split_global_batch(
    global_batch_size: int, num_workers: int, max_micro_batch_size: int
) -> BatchSplit:
    """The largest micro-batch up to a limit that divides a worker's share of the global batch.

    Raises:
        ValueError: the workers cannot share the batch evenly.
    """
    if global_batch_size % num_workers:
        raise ValueError(
            f"global_batch_size must be a multiple of workers_per_trial ({num_workers}), got {global_batch_size}"
        )
    share = global_batch_size // num_workers
    micro = max(
        size for size in range(1, min(share, max_micro_batch_size) + 1) if share % size == 0
    )
    return BatchSplit(
        micro_batch_size=micro, grad_accum_steps=share // micro, num_workers=num_workers
    )
