"""Dropout masks as a function of who, what and where, not of a generator's history.

An element's fate is a hash of (adapter seed, layer, training example, optimizer step, position, feature).
So an adapter's masks are the same beside any neighbours, however the batch is padded, split into
micro-batches or shared between workers, after a resume, and when activations are recomputed.

Shape legend: B rows, T positions, M = B T tokens (or some of them), I features.
"""

from dataclasses import dataclass

import torch

from trainers.hashing import GOLDEN, mix

_RESOLUTION = 1 << 24


@dataclass(frozen=True)
class DropoutTokens:
    """The tokens of a micro-batch, for dropout.

    Args:
        keys_M: of each token's row, from `row_keys`.
        positions_M: of each token in its row.
        rates_M: dropout of each token's adapter.
    """

    keys_M: torch.Tensor
    positions_M: torch.Tensor
    rates_M: torch.Tensor

    def select(self, index: torch.Tensor) -> "DropoutTokens":
        """Some of the tokens."""
        return DropoutTokens(self.keys_M[index], self.positions_M[index], self.rates_M[index])


def row_keys(rows: torch.Tensor, step: int) -> torch.Tensor:
    """Keys of a step's examples: rows int64 [B] of the training set -> int64 [B]."""
    return mix(mix(rows * GOLDEN + 1) + step)


def row_tokens(keys_B: torch.Tensor, rates_B: torch.Tensor, num_positions: int) -> DropoutTokens:
    """All tokens of B rows of T positions, row by row."""
    positions_T = torch.arange(num_positions, device=keys_B.device)
    return DropoutTokens(
        keys_M=keys_B.repeat_interleave(num_positions),
        positions_M=positions_T.repeat(len(keys_B)),
        rates_M=rates_B.repeat_interleave(num_positions),
    )


def keep_mask(tokens: DropoutTokens, layer_keys_M: torch.Tensor, num_features: int) -> torch.Tensor:
    """Which inputs stay, bool [M, I]; each is dropped with its token's rate.

    Args:
        layer_keys_M: int64, of the adapted layer and the token's adapter.
    """
    features_I = torch.arange(1, num_features + 1, device=tokens.keys_M.device) * GOLDEN
    token_M = mix(mix(tokens.keys_M ^ layer_keys_M) + tokens.positions_M * GOLDEN)
    hashed_MI = mix(token_M[:, None] + features_I)
    thresholds_M = (tokens.rates_M.double() * _RESOLUTION).round().long()
    return (hashed_MI & (_RESOLUTION - 1)) >= thresholds_M[:, None]
