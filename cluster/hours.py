"""How long a sweep takes on GPUs of a known model, and what it costs. An estimate: the plan says so."""

from dataclasses import dataclass

from cluster.gpus import peak_flops
from search_spaces.architecture import ModelShape

UTILIZATION, UTILIZATION_RANGE = 0.3, (0.2, 0.45)
"""ASSUMPTION: share of a GPU's dense bf16 peak that LoRA training reaches, and the range in which public
reports of 7B to 70B lie; 4-bit weights and short rows are at its lower end."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Hours of a sweep whose every trial runs to its end, GPU-hours, and money where a price was given.

    low and high: hours at the ends of UTILIZATION_RANGE.
    """

    hours: float
    low: float
    high: float
    gpu_hours: float
    price: float | None


def flops_per_token(shape: ModelShape, adapter_params: int, *, recomputed: bool) -> float:
    """FLOPs of a LoRA training step for each token.

    Args:
        adapter_params: of one adapter; an expert's adapters count as if every token met them all, a
            small overestimate.
        recomputed: with gradient checkpointing.

    Source: 2 FLOPs for each weight a token meets in the forward pass and again in the backward pass to
        the inputs (a frozen weight has no gradient of its own), 2 more where layers are computed
        again, 6 for each trained weight. Not counted: attention scores, 4-bit decoding.
    """
    base = 0
    for linear in shape.linears:
        share = shape.num_active_experts / shape.num_experts if linear.component == "experts" else 1
        base += int(linear.num_params * share)
    return 2 * base * (3 if recomputed else 2) + 6 * adapter_params


def sweep_cost(
    total_flops: float, *, gpu_name: str | None, num_gpus: int, price_per_gpu_hour: float | None
) -> Cost | None:
    """Hours and money of so many FLOPs on so many GPUs; None for a GPU whose speed is not known."""
    peak = peak_flops(gpu_name)
    if peak is None or num_gpus < 1:
        return None
    seconds = total_flops / (peak * num_gpus)
    low, high = (seconds / share / 3600 for share in reversed(UTILIZATION_RANGE))
    hours = seconds / UTILIZATION / 3600
    price = None if price_per_gpu_hour is None else hours * num_gpus * price_per_gpu_hour
    return Cost(hours=hours, low=low, high=high, gpu_hours=hours * num_gpus, price=price)
