"""Dropout masks as a function of who, what and where, not of a generator's history.

An element's fate is a hash of (adapter seed, layer, training example, optimizer step, position, feature).
So an adapter's masks are the same beside any neighbours, however the batch is padded, split into
micro-batches or shared between workers, after a resume, and when activations are recomputed.
"""

import torch

# splitmix64's multipliers (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014),
# as signed integers: torch's int64 arithmetic wraps around.
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_RESOLUTION = 1 << 24


def _mix(x: torch.Tensor) -> torch.Tensor:
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def row_keys(rows: torch.Tensor, step: int) -> torch.Tensor:
    """Keys of a step's examples: rows int64 [B] of the training set -> int64 [B]."""
    return _mix(_mix(rows * _GOLDEN + 1) + step)


def keep_mask(
    keys_B: torch.Tensor, layer_key: int, num_positions: int, num_features: int, rate: float
) -> torch.Tensor:
    """Which inputs stay, bool [B, T, I]; each is dropped with probability `rate`."""
    device = keys_B.device
    positions_T = torch.arange(num_positions, device=device) * _GOLDEN
    features_I = torch.arange(1, num_features + 1, device=device) * _GOLDEN
    token_BT = _mix(_mix(keys_B ^ layer_key)[:, None] + positions_T)
    hashed_BTI = _mix(token_BT[:, :, None] + features_I)
    return (hashed_BTI & (_RESOLUTION - 1)) >= round(rate * _RESOLUTION)
