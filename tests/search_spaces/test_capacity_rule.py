"""Capacity: the doctrine's quick formula and the exact rule at its boundary."""

import math
from fractions import Fraction

import pytest

from search_spaces.capacity import (
    check_capacity,
    dataset_bits,
    episode_bits,
    min_rank_for_dataset,
    sufficient_rank,
    validate_capacity,
)

LLAMA_8B = {"hidden_dim": 4096, "num_layers": 32}
ALL_LINEAR = ("attn", "mlp")


@pytest.mark.parametrize(
    ("tokens", "rank"), [(1e6, 1), (100_000_000, 20), (1e9, 191), (10_000_000_000, 1908)]
)
def test_min_rank_for_dataset_8b_matches_doctrine(tokens, rank):
    assert min_rank_for_dataset(tokens, 4096, 32) == rank


def test_min_rank_for_dataset_exact_fit_is_one_above_the_ceiling():
    # Kept as written in the doctrine: int(min_rank) + 1.
    exact = 2 * 2_621_440
    assert min_rank_for_dataset(exact, 4096, 32) == 2
    assert validate_capacity(rank=1, **LLAMA_8B, dataset_tokens=exact)["suggested_rank"] == 1
    assert min_rank_for_dataset(0, 4096, 32) == 1


def test_validate_capacity_boundary_is_exact_to_one_bit():
    held = 64 * 2 * 2_621_440
    ok = validate_capacity(rank=64, **LLAMA_8B, dataset_tokens=held)
    short = validate_capacity(rank=64, **LLAMA_8B, dataset_tokens=held + 1)
    assert (ok["status"], ok["suggested_rank"], ok["margin"]) == ("OK", 64, 1.0)
    assert (short["status"], short["suggested_rank"]) == ("UNDERCAPACITY", 65)
    assert (ok["adapter_params"], ok["adapter_bits"]) == (167_772_160, held)
    assert "raise lora_rank to 65" in short["message"]


def test_validate_capacity_no_tokens_is_ok_at_rank_one():
    result = validate_capacity(rank=1, **LLAMA_8B, dataset_tokens=0)
    assert (result["status"], result["suggested_rank"]) == ("OK", 1)
    assert result["margin"] == math.inf


@pytest.mark.parametrize("tokens", [-1, 1.5, math.nan, math.inf, True])
def test_validate_capacity_unusable_tokens_refused(tokens):
    with pytest.raises(ValueError, match="must be a whole number >= 0"):
        validate_capacity(rank=1, **LLAMA_8B, dataset_tokens=tokens)


def test_validate_capacity_unusable_sizes_refused():
    with pytest.raises(ValueError, match="lora_rank must be an integer >= 1, got 0"):
        validate_capacity(rank=0, **LLAMA_8B, dataset_tokens=1)
    with pytest.raises(ValueError, match="hidden_dim and num_layers must be >= 1"):
        validate_capacity(rank=1, hidden_dim=0, num_layers=1, dataset_tokens=1)


def test_dataset_bits_converts_exactly_and_rounds_up():
    assert dataset_bits(2.0e9) == 2_000_000_000
    assert dataset_bits(10**18 + 1) == 10**18 + 1  # a float would lose the 1
    assert dataset_bits(3, Fraction(1, 3)) == 1
    assert dataset_bits(4, Fraction(1, 3)) == 2
    assert dataset_bits(1000, 0.5) == 500
    assert episode_bits(5000) == 5000
    with pytest.raises(ValueError, match="bits_per_token must be a finite number > 0"):
        dataset_bits(1, 0)


def test_check_capacity_tiny_llama_boundary_is_exact(tiny_llama):
    # FIELD_CASES E01: 16,384 parameters at rank 8, all-linear without the head.
    held = check_capacity(tiny_llama, 8, 32_768, ALL_LINEAR)
    assert (held.ok, held.adapter_params, held.margin) == (True, 16_384, 1.0)
    assert not check_capacity(tiny_llama, 8, 32_769, ALL_LINEAR).ok
    assert not check_capacity(tiny_llama, 4, 32_768, ALL_LINEAR).ok
    assert held.sufficient_rank == 8
    assert check_capacity(tiny_llama, 8, 32_769, ALL_LINEAR).sufficient_rank == 9
    # Half a bit more is not held either.
    assert not check_capacity(tiny_llama, 8, Fraction(65_537, 2), ALL_LINEAR).ok


@pytest.mark.parametrize("bits", [0, 1, 4095, 4096, 4097, 123_456, 10**7])
def test_sufficient_rank_is_smallest_that_holds(tiny_llama, tiny_moe, bits):
    for shape in (tiny_llama, tiny_moe):
        rank = sufficient_rank(shape, bits)
        assert 2 * shape.lora_params(rank) >= bits
        assert rank == 1 or 2 * shape.lora_params(rank - 1) < bits


def test_sufficient_rank_experts_only_steps_by_active_count(tiny_moe):
    # Ranks 1 to 3 give every expert rank 1 (2 active): the smallest of equals is given.
    one = 2 * tiny_moe.lora_params(1, ("experts",))
    assert sufficient_rank(tiny_moe, one, "experts") == 1
    assert sufficient_rank(tiny_moe, one + 1, "experts") == 4


@pytest.mark.parametrize("bits", [-1, math.nan, math.inf, True])
def test_check_capacity_unusable_bits_refused(tiny_llama, bits):
    with pytest.raises(ValueError, match="dataset_bits must be a finite number >= 0"):
        check_capacity(tiny_llama, 8, bits)
