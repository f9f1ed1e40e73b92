"""Can an adapter hold a data set? Adapter bits against dataset bits, in exact integers.

The rule is 2 x params >= dataset bits: equality holds, one bit less is UNDERCAPACITY. It is an
estimate of where learning gets slower, not a law (docs/doctrine.md, section 1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypedDict

from search_spaces import doctrine
from search_spaces.architecture import COMPONENTS, ModelShape, lora_num_params

Real = int | float | Fraction


class CapacityVerdict(TypedDict):
    """What `validate_capacity` returns, for the doctrine's snippet."""

    status: str
    message: str
    suggested_rank: int
    rank: int
    adapter_params: int
    adapter_bits: int
    dataset_tokens: int
    dataset_bits: int
    margin: float


@dataclass(frozen=True, kw_only=True)
class CapacityCheck:
    """One adapter against one data set.

    Attributes:
        ok: adapter_bits >= dataset_bits.
        lora_rank: the nominal rank that was checked.
        adapter_params: exact LoRA parameters.
        adapter_bits: 2 bits for each.
        dataset_bits: what the data holds.
        margin: adapter_bits / dataset_bits; infinite for no data.
        sufficient_rank: smallest rank that holds the data, however large.
    """

    ok: bool
    lora_rank: int
    adapter_params: int
    adapter_bits: int
    dataset_bits: int
    margin: float
    sufficient_rank: int


def whole_number(key: str, value: Real) -> int:
    """A count >= 0 as an int; 2.0e9 counts as 2,000,000,000.

    Raises:
        ValueError: negative, fractional, not finite, or a boolean.
    """
    if not isinstance(value, bool):
        if isinstance(value, (int, Fraction)):
            if value >= 0 and value.denominator == 1:
                return int(value)
        elif value.is_integer() and value >= 0:
            return int(value)
    raise ValueError(f"{key} must be a whole number >= 0, got {value!r}; give a count")


def dataset_bits(num_tokens: Real, bits_per_token: Real = doctrine.BITS_PER_TOKEN.value) -> int:
    """Bits of a data set, rounded up to a whole bit.

    Args:
        num_tokens: loss-bearing tokens of one epoch, a whole number >= 0.
        bits_per_token: target loss in bits/token (nats / ln 2), finite and > 0.

    Raises:
        ValueError: out of range.

    Source: BITS_PER_TOKEN. Exact: a float is taken as the binary fraction that it is. Adapter
        bits are whole, so comparing with the rounded-up bits decides as the exact bits would.
    """
    if isinstance(bits_per_token, bool) or not math.isfinite(bits_per_token) or bits_per_token <= 0:
        raise ValueError(
            f"bits_per_token must be a finite number > 0, got {bits_per_token!r}; "
            "set capacity: doctrine"
        )
    return math.ceil(whole_number("num_tokens", num_tokens) * Fraction(bits_per_token))


def episode_bits(num_episodes: Real) -> int:
    """Bits that RL puts into an adapter, one for each episode. Source: BITS_PER_EPISODE."""
    return whole_number("num_episodes", num_episodes) * doctrine.BITS_PER_EPISODE.value


def params_per_rank(hidden_dim: int, num_layers: int) -> int:
    """The doctrine's quick count of LoRA parameters for one unit of rank.

    Exact for Llama-3.1-8B and Mistral-7B only; use `ModelShape.lora_params` for any model.

    Raises:
        ValueError: hidden_dim or num_layers < 1.
    """
    if hidden_dim < 1 or num_layers < 1:
        raise ValueError(f"hidden_dim and num_layers must be >= 1, got {hidden_dim}, {num_layers}")
    return hidden_dim * doctrine.QUICK_PARAMS_FACTOR.value * num_layers


def min_rank_for_dataset(
    dataset_tokens: Real,
    hidden_dim: int,
    num_layers: int,
    bits_per_token: Real = doctrine.BITS_PER_TOKEN.value,
) -> int:
    """The doctrine's quick formula as written: int(min_rank) + 1.

    It is one above the exact ceiling where a whole rank holds the data exactly.

    Args:
        dataset_tokens: loss-bearing tokens, a whole number >= 0.
        hidden_dim: model width, >= 1.
        num_layers: decoder layers, >= 1.
        bits_per_token: as `dataset_bits`.

    Raises:
        ValueError: out of range.

    Source: docs/doctrine.md, section 1.
    """
    bits = dataset_bits(dataset_tokens, bits_per_token)
    rank_bits = params_per_rank(hidden_dim, num_layers) * doctrine.BITS_PER_PARAM.value
    return bits // rank_bits + 1


def validate_capacity(
    *,
    rank: int,
    hidden_dim: int,
    num_layers: int,
    dataset_tokens: Real,
    bits_per_token: Real = doctrine.BITS_PER_TOKEN.value,
) -> CapacityVerdict:
    """The doctrine's check of a rank against a data set, by the quick parameter count.

    Args:
        rank: lora_rank, >= 1.
        hidden_dim: model width, >= 1.
        num_layers: decoder layers, >= 1.
        dataset_tokens: loss-bearing tokens of one epoch, a whole number >= 0.
        bits_per_token: as `dataset_bits`.

    Returns:
        `status` ('OK' or 'UNDERCAPACITY'), `message`, `suggested_rank` (the exact ceiling of this
        count) and the numbers.

    Raises:
        ValueError: out of range.
    """
    _check_rank(rank)
    per_rank = params_per_rank(hidden_dim, num_layers)
    bits = dataset_bits(dataset_tokens, bits_per_token)
    adapter_bits = rank * per_rank * doctrine.BITS_PER_PARAM.value
    suggested = max(1, -(-bits // (per_rank * doctrine.BITS_PER_PARAM.value)))
    status = "OK" if adapter_bits >= bits else "UNDERCAPACITY"
    comparison = (
        f"{adapter_bits:,} adapter bits {'>=' if status == 'OK' else '<'} {bits:,} data bits"
    )
    advice = "" if status == "OK" else f"; raise lora_rank to {suggested}"
    return CapacityVerdict(
        status=status,
        message=f"{status}: rank {rank} holds {comparison}{advice}",
        suggested_rank=suggested,
        rank=rank,
        adapter_params=rank * per_rank,
        adapter_bits=adapter_bits,
        dataset_tokens=whole_number("dataset_tokens", dataset_tokens),
        dataset_bits=bits,
        margin=_margin(adapter_bits, bits),
    )


def check_capacity(
    shape: ModelShape,
    lora_rank: int,
    dataset_bits: Real,
    target: str | Sequence[str] = COMPONENTS,
) -> CapacityCheck:
    """The exact check of an adapter on a model against a data set.

    Args:
        shape: the model.
        lora_rank: nominal rank, >= 1.
        dataset_bits: bits of the data, >= 0; a fraction of a bit counts as a bit.
        target: what the adapter is on, as `ModelShape.resolve_target` takes it.

    Raises:
        ValueError: out of range, or an unknown target.
    """
    _check_rank(lora_rank)
    bits = whole_bits(dataset_bits)
    linears = shape.resolve_target(target)
    params = lora_num_params(linears, lora_rank, shape.num_active_experts)
    adapter_bits = params * doctrine.BITS_PER_PARAM.value
    return CapacityCheck(
        ok=adapter_bits >= bits,
        lora_rank=lora_rank,
        adapter_params=params,
        adapter_bits=adapter_bits,
        dataset_bits=bits,
        margin=_margin(adapter_bits, bits),
        sufficient_rank=sufficient_rank(shape, bits, target),
    )


def sufficient_rank(
    shape: ModelShape, dataset_bits: Real, target: str | Sequence[str] = COMPONENTS
) -> int:
    """Smallest nominal rank, >= 1, whose adapter holds the data; it may exceed any useful rank.

    Args:
        shape: the model.
        dataset_bits: bits of the data, >= 0.
        target: as in `check_capacity`.

    Raises:
        ValueError: bits negative or not finite, or an unknown target.
    """
    bits = whole_bits(dataset_bits)
    linears = shape.resolve_target(target)

    def holds(rank: int) -> bool:
        params = lora_num_params(linears, rank, shape.num_active_experts)
        return params * doctrine.BITS_PER_PARAM.value >= bits

    # Parameters grow with the rank (by steps, with experts): bisection is exact.
    high = 1
    while not holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def whole_bits(bits: Real) -> int:
    """Bits as an int, a fraction of a bit rounded up.

    Raises:
        ValueError: negative, not finite, or a boolean.
    """
    if isinstance(bits, bool) or not math.isfinite(bits) or bits < 0:
        raise ValueError(f"dataset_bits must be a finite number >= 0, got {bits!r}; give a count")
    return math.ceil(bits)


def _check_rank(rank: int) -> None:
    if isinstance(rank, bool) or rank < 1:
        raise ValueError(f"lora_rank must be an integer >= 1, got {rank!r}; set lora_rank: 16")


def _margin(adapter_bits: int, bits: int) -> float:
    return adapter_bits / bits if bits else math.inf
