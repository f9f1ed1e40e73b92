"""Which base a sweep trains on. Imports no torch: a plan names a base without loading it."""

from dataclasses import dataclass
from typing import Literal

Quantization = Literal["nf4", "none"]
NOT_QUANTIZED = ("falcon",)
"""Model types of whose layers 4-bit loading reaches none: transformers (seen in 5.24) quantizes modules of exactly
nn.Linear, and theirs are of a class of their own."""


@dataclass(frozen=True, kw_only=True)
class BaseSpec:
    """Which base, and in which numbers.

    Args:
        model: folder or hub id.
        revision: hub revision, or None for its default branch.
        quantization: "nf4" or "none".
        dtype: "bf16" or "fp32" ("fp64" for tests): compute type, and storage of what stays
            unquantized. "auto" is bf16 where the device has it, else fp32.
        keep_dequantized: hold the NF4 weights dequantized: the same numbers, more memory, and no
            repeated work. Only where the memory plan has room.
        sharded: each worker of a group holds its part of the weights (ZeRO-3), none of them all.
        gradient_checkpointing: layers are computed again in the backward pass; always so where sharded.
    """

    model: str
    revision: str | None = None
    quantization: Quantization = "nf4"
    dtype: str = "auto"
    keep_dequantized: bool = False
    sharded: bool = False
    gradient_checkpointing: bool = False
