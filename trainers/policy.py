"""The objective of reinforcement learning, token by token.

Shape legend: M loss-bearing positions (with padding).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class PolicyTokens:
    """What the objective must know of the positions that bear loss, in their order.

    Args:
        advantages_M: of each token's episode, 0 for padding.
        logps_M: log-probability of each token by the policy that sampled it, 0 for padding.
        temperature: that the policy samples at: its logits are divided by it.
    """

    advantages_M: torch.Tensor
    logps_M: torch.Tensor
    temperature: float = 1.0

    def losses(self, nats_M: torch.Tensor, where: slice) -> torch.Tensor:
        """Loss of some tokens: minus advantage times (probability now over when it was sampled).

        TRL's GRPO with importance_sampling_level 'token' and without a clip; the policy gradient with importance
        sampling of 'LoRA Without Regret'. Nothing is clipped: a batch of episodes is used for one step, so the ratio
        is 1 but for the rounding of sampling.
        """
        ratios = torch.exp(-nats_M - self.logps_M[where].to(nats_M.dtype))
        return -self.advantages_M[where].to(nats_M.dtype) * ratios
