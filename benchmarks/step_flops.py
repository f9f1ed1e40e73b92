"""Floating-point operations: of a step, as they are counted, and of this machine in a second, as measured."""

import time
from typing import Any

import torch

from benchmarks.step_arms import Bench, synchronize
from search_spaces.architecture import ModelShape


def gemm_flops_per_second(
    shape: ModelShape, tokens: int, loss_tokens: int, device: Any, dtype: Any
) -> float:
    """What torch.mm reaches on this machine over one forward's own products: every linear of the base at
    its shape and number, the head at the loss-bearing tokens; median of 5 passes."""
    kinds = [
        (linear, loss_tokens if linear.component == "unembed" else tokens)
        for linear in shape.linears
    ]
    pairs = [
        (
            torch.randn(rows, linear.in_features, device=device, dtype=dtype),
            torch.randn(linear.in_features, linear.out_features, device=device, dtype=dtype),
            linear.count,
        )
        for linear, rows in kinds
    ]
    seconds = sorted(_pass_seconds(pairs, device) for _ in range(6))[2]
    return sum(2 * rows * linear.num_params for linear, rows in kinds) / seconds


def _pass_seconds(pairs: list[Any], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    for left, right, count in pairs:
        for _ in range(count):
            torch.mm(left, right)
    synchronize(device)
    return time.perf_counter() - began


def step_flops(
    shape: ModelShape,
    bench: Bench,
    tokens: int,
    loss_tokens: int,
    row_tokens: int,
    *,
    full: bool = False,
) -> float:
    """Floating-point operations of one optimizer step of one adapter.

    2 for each base weight and token in the forward, 2 for the gradient of its input (and 2 for its own
    when it is trained), 6 for each adapter weight; the head only at loss-bearing tokens; attention
    2 products forward and 4 backward over the causal half. Not counted: norms, softmax, embeddings,
    the optimizer.
    """
    factor = 6 if full else 4
    adapted = {linear.name for linear in bench.linears} if not full else set()
    total = 0.0
    for linear in shape.linears:
        rows = loss_tokens if linear.component == "unembed" else tokens
        total += factor * linear.num_params * rows
        if linear.name in adapted:
            sides = linear.count * (linear.in_features + linear.out_features)
            total += 6 * bench.lora_rank * sides * rows
    queries = next(one for one in shape.linears if one.component == "attn").out_features
    return total + 6 * 2 * shape.num_layers * queries * tokens * row_tokens / 2
