"""Dropout masks: the right rate, and a function of the example alone."""

import pytest
import torch

from trainers import dropout
from trainers.dropout import row_keys


def keep_mask(keys_B, layer_key, num_positions, num_features, rate):
    """The mask [B, T, I] of whole rows of one adapter."""
    rates_B = torch.full((len(keys_B),), rate)
    tokens = dropout.row_tokens(keys_B, rates_B, num_positions)
    layer_keys = torch.full_like(tokens.keys_M, layer_key)
    mask = dropout.keep_mask(tokens, layer_keys, num_features)
    return mask.view(len(keys_B), num_positions, num_features)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5])
def test_keep_mask_drops_the_given_share(rate):
    mask = keep_mask(row_keys(torch.arange(8), 3), 12345, 64, 256, rate)
    # 131,072 draws: the standard error of the share is below 0.0014.
    assert 1 - mask.double().mean().item() == pytest.approx(rate, abs=0.006)


def test_keep_mask_any_share_per_feature_and_position_is_near_the_rate():
    mask = keep_mask(row_keys(torch.arange(400), 0), 7, 20, 30, 0.3).double()
    assert (mask.mean((0, 1)) - 0.7).abs().max() < 0.03  # 8,000 draws each
    assert (mask.mean((0, 2)) - 0.7).abs().max() < 0.03


def test_keep_mask_longer_padding_and_other_rows_change_nothing():
    keys = row_keys(torch.tensor([5, 9]), 2)
    long, short = keep_mask(keys, 1, 40, 16, 0.5), keep_mask(keys[1:], 1, 12, 16, 0.5)
    assert torch.equal(long[1:, :12], short)


@pytest.mark.parametrize(("rows", "step", "layer"), [([6], 2, 1), ([5], 3, 1), ([5], 2, 4)])
def test_keep_mask_another_row_step_or_layer_is_another_mask(rows, step, layer):
    one = keep_mask(row_keys(torch.tensor([5]), 2), 1, 20, 64, 0.5)
    other = keep_mask(row_keys(torch.tensor(rows), step), layer, 20, 64, 0.5)
    assert (one == other).double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_keep_mask_rows_of_mixed_rates_each_as_if_alone():
    keys = row_keys(torch.tensor([5, 9]), 2)
    tokens = dropout.row_tokens(keys, torch.tensor([0.0, 0.5]), 12)
    mixed = dropout.keep_mask(tokens, torch.tensor([1, 7]).repeat_interleave(12), 16)
    assert bool(mixed[:12].all())
    assert torch.equal(mixed[12:], keep_mask(keys[1:], 7, 12, 16, 0.5)[0])


def test_keep_mask_of_selected_tokens_is_the_selection_of_the_mask():
    tokens = dropout.row_tokens(row_keys(torch.tensor([5, 9]), 2), torch.tensor([0.3, 0.5]), 12)
    index, layer = torch.tensor([20, 3, 11]), torch.full((24,), 4)
    selected = dropout.keep_mask(tokens.select(index), layer[index], 16)
    assert torch.equal(selected, dropout.keep_mask(tokens, layer, 16)[index])
