"""Measures how many tokens a forward of this base should hold on this device.

More tokens keep the device busy until its caches (CPU) or its memory (GPU) are full. One adapter of the
largest rank trains on random rows, in forwards of growing size; the smallest size within a few percent
of the best is taken.
"""

import time
from typing import Any

import numpy as np
import torch

from search_spaces.architecture import ModelShape
from trainers.adapters import Pack
from trainers.batches import RowSource
from trainers.data.token_set import TokenizedSet
from trainers.head import LossHead
from trainers.slots import AdapterSpec

SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192, 16384, 32768, 65536)}
GOOD_ENOUGH = 1.05
"""A smaller forward is taken where it costs up to this much more for each token."""


def measure_max_tokens(
    pack: Pack, shape: ModelShape, lora_rank: int, row_tokens: int
) -> dict[str, Any]:
    """{"max_tokens", "seconds_per_token": size -> seconds}; the pack is left as it was.

    Args:
        row_tokens: length of the rows to measure with (of the data's longest rows).
    """
    target = [linear for linear in shape.linears if linear.component != "unembed"]
    spec = AdapterSpec(lora_rank=lora_rank, lora_alpha=lora_rank, linears=tuple(target))
    slot = pack.enter(spec)
    try:
        found = _measure(LossHead(pack), slot, shape.vocab_size, row_tokens)
    finally:
        pack.leave(slot)
    best = min(found.values())
    max_tokens = min(size for size, seconds in found.items() if seconds <= GOOD_ENOUGH * best)
    return {"max_tokens": max_tokens, "seconds_per_token": {str(k): v for k, v in found.items()}}


def _measure(head: LossHead, slot: int, vocab_size: int, row_tokens: int) -> dict[int, float]:
    found: dict[int, float] = {}
    for size in SIZES[head.pack.device.type]:
        try:
            found[size] = _seconds(head, slot, vocab_size, row_tokens, size) / size
        except torch.OutOfMemoryError:
            if not found:
                raise
            torch.cuda.empty_cache()
            break
    return found


def _seconds(head: LossHead, slot: int, vocab_size: int, row_tokens: int, size: int) -> float:
    rows = max(1, size // row_tokens)
    source = RowSource(random_rows(rows, size // rows, vocab_size), 0, head.pack.device)
    batch = source.batch([np.arange(rows)], head.max_positions)
    seconds = []
    for _ in range(2 if size == min(SIZES[head.pack.device.type]) else 1):
        began = now(head.pack.device)
        head.train_nats(batch, (slot,), [1.0])
        seconds.append(now(head.pack.device) - began)
    return seconds[-1]  # the first call of a process also loads code and plans


def random_rows(count: int, length: int, vocab_size: int) -> TokenizedSet:
    """Random rows of one length; every token but the first of a row bears loss."""
    ids = np.random.default_rng(0).integers(0, vocab_size, count * length, dtype=np.int32)
    offsets = np.arange(count + 1, dtype=np.int64) * length
    mask = np.ones(count * length, dtype=np.bool_)
    mask[offsets[:-1]] = False
    return TokenizedSet(
        input_ids=ids,
        loss_mask=mask,
        offsets=offsets,
        row_loss_tokens=np.full(count, length - 1, dtype=np.int64),
        row_loss_bytes=np.full(count, length, dtype=np.int64),
    )


def now(device: torch.device) -> float:
    """Seconds on a clock, read when a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
