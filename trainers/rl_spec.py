"""What a trial of reinforcement learning is told beside what every trial is told. Pure: no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainers.integrity import file_sha256
from trainers.rewards import file_of


@dataclass(frozen=True, kw_only=True)
class RLSpec:
    """How episodes are made and what they earn.

    Args:
        reward: name of each reward (see rewards.py) -> its weight.
        num_generations: completions sampled for a prompt, >= 2: an episode earns what it has above their mean.
        max_completion_length: tokens of a completion, end token included, >= 1.
        temperature: that the policy samples at, > 0.
    """

    reward: Mapping[str, float]
    num_generations: int
    max_completion_length: int
    temperature: float = 1.0

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

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "RLSpec":
        """The spec that a trial's config.json holds."""
        return cls(**values)  # pyright: ignore[reportArgumentType]


def absolute_reward(name: str) -> str:
    """The reward with the whole path of its file: a worker's working directory is not the driver's."""
    path = file_of(name)
    if path is None:
        return name
    return f"{Path(path).expanduser().resolve()}:{name.rpartition(':')[2]}"
