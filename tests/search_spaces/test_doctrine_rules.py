"""The doctrine's numbers, and where each applies."""

import math

import pytest

from search_spaces import doctrine
from search_spaces.priors import learning_rate_prior


@pytest.mark.parametrize(
    ("num_params", "sft", "rl"),
    [
        (1_000_000, (16, 32), (4, 8)),  # below 1B: the first row
        (1_235_814_400, (16, 32), (4, 8)),
        (3_212_749_824, (16, 32), (4, 8)),
        (7_000_000_000, (32, 64), (8, 16)),
        (8_030_261_248, (32, 64), (8, 16)),
        (13_000_000_000, (64, 128), (16, 32)),
        (34_000_000_000, (128, 192), (32, 48)),
        (46_702_792_704, (128, 192), (32, 48)),  # Mixtral: 1.374 x above 34B, 1.499 x below 70B
        (70_553_706_496, (128, 256), (32, 64)),
        (405_000_000_000, (128, 256), (32, 64)),  # above 70B: the last row
    ],
)
def test_rank_range_by_size_matches_doctrine_table(num_params, sft, rl):
    assert doctrine.rank_range(num_params, "sft") == sft
    assert doctrine.rank_range(num_params, "rl") == rl


def test_rank_range_between_rows_nearest_edge_in_log_size():
    # Between 3B and 7B the edges are equally far at sqrt(21)B; between 8B and 13B at sqrt(104)B.
    middle = round(math.sqrt(21) * 1e9)
    assert doctrine.size_class_of(middle - 10).name == "1-3B"
    assert doctrine.size_class_of(middle + 10).name == "7-8B"
    assert doctrine.size_class_of(10_198_000_000).name == "7-8B"
    assert doctrine.size_class_of(10_199_000_000).name == "13B"


def test_rank_range_tie_goes_to_the_smaller_row(monkeypatch):
    rows = [
        doctrine.SizeClass(name="small", low_params=1, high_params=2, sft=(1, 2), rl=(1, 1)),
        doctrine.SizeClass(name="large", low_params=8, high_params=8, sft=(3, 4), rl=(1, 1)),
    ]
    table = doctrine.Rule(key="lora_rank", value=tuple(rows), source="", evidence="")
    monkeypatch.setattr(doctrine, "RANK_TABLE", table)
    assert doctrine.rank_range(4) == (1, 2)


def test_rank_range_size_class_wins_and_unknown_refused():
    assert doctrine.rank_range(1, "rl", size_class="70B") == (32, 64)
    with pytest.raises(ValueError, match=r"size_class must be one of 1-3B, .*got '8B'"):
        doctrine.rank_range(1, size_class="8B")
    with pytest.raises(ValueError, match="method must be 'sft' or 'rl', got 'dpo'"):
        doctrine.rank_range(1, "dpo")
    with pytest.raises(ValueError, match="num_params must be >= 1"):
        doctrine.rank_range(0)


def test_ranks_in_range_holds_both_ends_and_powers_between():
    assert doctrine.ranks_in_range(128, 192) == (128, 192)
    assert doctrine.ranks_in_range(16, 64) == (16, 32, 64)
    assert doctrine.ranks_in_range(8, 8) == (8,)


def test_learning_rate_prior_doctrine_llama31_8b_is_4_88e_4():
    prior = learning_rate_prior(hidden_size=4096, model_type="llama")
    assert prior.lora == pytest.approx(4.8828125e-4, rel=1e-12)
    assert prior.full_ft == pytest.approx(4.8828125e-5, rel=1e-12)
    assert not prior.extrapolated


@pytest.mark.parametrize(
    ("hidden", "extrapolated"), [(2047, True), (2048, False), (8192, False), (8193, True)]
)
def test_learning_rate_prior_outside_checked_widths_says_extrapolated(hidden, extrapolated):
    prior = learning_rate_prior("doctrine", hidden_size=hidden, model_type="qwen3")
    assert prior.extrapolated is extrapolated
    assert ("extrapolated" in prior.source) is extrapolated


def test_learning_rate_prior_tinker_uses_the_familys_exponent():
    llama = learning_rate_prior("tinker", hidden_size=4096, model_type="llama")
    qwen = learning_rate_prior("tinker", hidden_size=4096, model_type="qwen3_moe")
    assert llama.lora == pytest.approx(5e-4 * (2000 / 4096) ** 0.781)
    assert qwen.lora == pytest.approx(5e-4 * (2000 / 4096) ** 0.0775)
    with pytest.raises(ValueError, match="known for llama and qwen only, got model_type 'gpt2'"):
        learning_rate_prior("tinker", hidden_size=4096, model_type="gpt2")


def test_learning_rate_prior_rl_keeps_the_ratio_not_the_level():
    prior = learning_rate_prior(hidden_size=64, model_type="llama", method="rl")
    assert (prior.full_ft, prior.lora) == (1e-6, pytest.approx(1e-5))
    assert not prior.extrapolated


def test_learning_rate_prior_user_numbers_are_taken():
    for name in (None, "doctrine", "user"):
        prior = learning_rate_prior(
            name, hidden_size=64, model_type="llama", full_ft_learning_rate=2e-5
        )
        assert (prior.full_ft, prior.lora) == (2e-5, pytest.approx(2e-4))
    number = learning_rate_prior(3e-4, hidden_size=64, model_type="llama")
    assert (number.lora, number.full_ft) == (3e-4, pytest.approx(3e-5))


@pytest.mark.parametrize(
    ("lr_prior", "full_ft"),
    [
        *(("tinker", 1e-5), (1e-4, 1e-5), ("user", None), ("best", None), (0.0, None)),
        *((True, None), (None, -1e-5), (None, math.nan), (math.inf, None)),
    ],
)
def test_learning_rate_prior_unusable_values_refused(lr_prior, full_ft):
    with pytest.raises(ValueError, match=r"lr_prior|full_ft_learning_rate"):
        learning_rate_prior(
            lr_prior, hidden_size=4096, model_type="llama", full_ft_learning_rate=full_ft
        )


def test_expert_rank_divides_by_active_and_floors_at_one():
    assert doctrine.expert_rank(64, 2) == 32
    assert doctrine.expert_rank(64, 8) == 8
    assert doctrine.expert_rank(7, 8) == 1
    assert "floor" in doctrine.expert_rank_note(7, 8)
    assert "floor" not in doctrine.expert_rank_note(8, 8)
    with pytest.raises(ValueError, match=r"must be >= 1, got 16 and\s+0"):
        doctrine.expert_rank(16, 0)


def test_lora_compute_frac_matches_doctrine_examples():
    assert round(doctrine.lora_compute_frac(4096, 32), 2) == 0.68
    assert round(doctrine.lora_compute_frac(4096, 256), 2) == 0.79


def test_rules_all_carry_source_and_evidence_and_unique_keys():
    assert all(rule.source and rule.evidence for rule in doctrine.RULES)
    assert len({rule.key for rule in doctrine.RULES}) == len(doctrine.RULES)
    declared = [value for value in vars(doctrine).values() if isinstance(value, doctrine.Rule)]
    assert {rule.key for rule in declared} == {rule.key for rule in doctrine.RULES}
