"""Random numbers as a function of who, what and where, not of a generator's history."""

import torch

# splitmix64's multipliers (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014),
# as signed integers: torch's int64 arithmetic wraps around.
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""Keeps the hashes of neighbouring numbers apart."""


def mix(x: torch.Tensor) -> torch.Tensor:
    """A hash of each number: int64 -> int64."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return x ^ ((x >> 31) & ((1 << 33) - 1))
