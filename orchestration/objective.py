"""What a method is judged by, in words and numbers. A sweep minimises eval_loss whatever the method; of
reinforcement learning that is minus the held-out reward, and people are shown the reward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Objective:
    """A score as people know it.

    Args:
        key: its name in metrics.jsonl.
        noun: what people call it.
        unit: for axes and titles.
        sign: of it in eval_loss.
        is_lower_better: which way is better.
    """

    key: str
    noun: str
    unit: str
    sign: int

    @property
    def title(self) -> str:
        return f"{self.key} ({self.unit})"

    @property
    def best(self) -> Any:
        """The better of several: min or max."""
        return min if self.sign > 0 else max

    def of(self, eval_loss: float) -> float:
        """The score that an eval_loss stands for."""
        return self.sign * eval_loss

    def text(self, eval_loss: float) -> str:
        return f"{self.of(eval_loss):.4f}"


LOSS = Objective("eval_loss", "loss", "nats/token", 1)
REWARD = Objective("eval_reward", "reward", "mean on held-out prompts", -1)


def objective_named(key: str) -> Objective:
    """Of a key of metrics.jsonl."""
    return {each.key: each for each in (LOSS, REWARD)}[key]


def objective_of(method: str) -> Objective:
    """Of a config's or a plan's method."""
    return REWARD if method == "rl" else LOSS


def method_of_study(results: Mapping[str, Any]) -> str:
    """Of a study's results.json."""
    return "rl" if results.get("objective") == REWARD.key else "sft"


def objective_of_rows(rows: Sequence[Mapping[str, Any]]) -> Objective:
    """Of a trial's metrics rows."""
    return REWARD if any(REWARD.key in row for row in rows) else LOSS
