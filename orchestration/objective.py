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
        sign: of it in what is minimised.
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

    def of(self, loss: float) -> float:
        """The score that stands for what is minimised."""
        return self.sign * loss

    def text(self, loss: float) -> str:
        return f"{self.of(loss):.4f}"


LOSS = Objective("eval_loss", "loss", "nats/token", 1)
BITS = Objective("eval_bits_per_byte", "bits per byte", "bits/byte", 1)
SCORE = Objective("eval_score", "score", "mean on held-out rows", -1)
REWARD = Objective("eval_reward", "reward", "mean on held-out prompts", -1)


def objective_named(key: str) -> Objective:
    """Of a key of metrics.jsonl."""
    return {each.key: each for each in (LOSS, BITS, SCORE, REWARD)}[key]


def objective_of(method: str) -> Objective:
    """Of a config's or a plan's method."""
    return REWARD if method == "rl" else LOSS


def method_of_study(results: Mapping[str, Any]) -> str:
    """Of a study's results.json."""
    return "rl" if results.get("objective") == REWARD.key else "sft"


def objective_of_rows(rows: Sequence[Mapping[str, Any]]) -> Objective:
    """Of a trial's metrics rows."""
    return REWARD if any(REWARD.key in row for row in rows) else LOSS
