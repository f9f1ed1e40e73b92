"""What a trial that is judged by rewards is told beside what every trial is told. Pure: no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainers.integrity import file_sha256
from trainers.rewards import file_of


@dataclass(frozen=True, kw_only=True)
class RewardSpec:
    """What is sampled and what it earns.

    Args:
        reward: name of each reward (see rewards.py) -> its weight.
        max_completion_length: tokens of a completion, end token included, >= 1.
    """

    reward: Mapping[str, float]
    max_completion_length: int

    @property
    def files(self) -> list[str]:
        """The files of the user's that rewards are in."""
        return [path for name in self.reward if (path := file_of(name))]

    def described(self) -> dict[str, Any]:
        """All of it, with the checksum of each file (None: no such file): a run goes on with the rewards that it
        began with."""
        found = {file: Path(file).expanduser() for file in self.files}
        sums = {file: file_sha256(path) if path.is_file() else None for file, path in found.items()}
        return asdict(self) | {"files": sums}

    def for_workers(self) -> dict[str, Any]:
        """All of it as a trial's config.json holds it: a worker's working directory is not the driver's."""
        reward = {absolute_reward(name): weight for name, weight in self.reward.items()}
        return vars(self) | {"reward": reward}


@dataclass(frozen=True, kw_only=True)
class RLSpec(RewardSpec):
    """How episodes are made and what they earn.

    Args:
        num_generations: completions sampled for a prompt, >= 2: an episode earns what it has above their mean.
        temperature: that the policy samples at, > 0.
    """

    num_generations: int
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TaskSpec(RewardSpec):
    """What the answers of a fine-tuned model to held-out rows are worth.

    Args:
        num_rows: held-out rows that are answered at an evaluation, >= 1, spread over the set.
    """

    num_rows: int


def absolute_reward(name: str) -> str:
    """The reward with the whole path of its file."""
    path = file_of(name)
    if path is None:
        return name
    return f"{Path(path).expanduser().resolve()}:{name.rpartition(':')[2]}"
