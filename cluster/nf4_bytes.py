"""Bytes of what bitsandbytes quantizes to NF4 with double quantization, and which matrices those are."""

from cluster.activation_bytes import FLOAT_BYTES
from search_spaces.linear_shape import LinearShape

NF4_BLOCK, ABSMAX_BLOCK = 64, 256
"""Weights of a uint8 constant, and constants of an fp32 one. Source: QLoRA, arXiv 2305.14314, section 3."""


def is_quantizable(linear: LinearShape) -> bool:
    """Whether bitsandbytes quantizes a matrix: linear layers of the decoder's blocks. Not the head, not
    fused experts (3-D parameters; huggingface/transformers#39859)."""
    return linear.component in ("attn", "mlp")


def nf4_weight_bytes(linear: LinearShape) -> int:
    """Bytes of a matrix in four bits, its constants apart, of all `count`."""
    return linear.count * -(-linear.in_features * linear.out_features // 2)


def nf4_constant_bytes(linear: LinearShape) -> int:
    """Bytes of NF4's constants of a matrix, of all `count`: a uint8 for each 64 weights, an fp32 for each
    256 of those, an offset, and the 16 and 256 codes. Source: bitsandbytes' QuantState, 0.127 bits a weight.
    """
    absmax = -(-linear.in_features * linear.out_features // NF4_BLOCK)
    return linear.count * (absmax + FLOAT_BYTES * (-(-absmax // ABSMAX_BLOCK) + 1 + 16 + 256))
