"""A run's batch of reinforcement learning: prompts, what was sampled for them, what it earned.

Shape legend: P prompts, S samples of each, E = P S episodes, T tokens of an episode.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from trainers.batches import IGNORED, Batch, RowSource
from trainers.composition import Shapes
from trainers.data.token_set import Example, TokenizedSet
from trainers.data.tokenizer import LoadedTokenizer
from trainers.policy import PolicyTokens
from trainers.sampler import Completion


@dataclass(frozen=True, eq=False)
class Question:
    """A row of the data as reinforcement learning sees it: ids int64 [T] of the prompt, and the texts that a reward
    is given."""

    ids: np.ndarray
    prompt: str
    answer: str


class Questions:
    """The prompts of a tokenized set: everything before a row's last loss-bearing span, which is the answer."""

    def __init__(self, rows: TokenizedSet, tokenizer: LoadedTokenizer) -> None:
        self.rows, self.tokenizer = rows, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def question(self, row: int) -> Question:
        """The question of a row."""
        example = self.rows.example(row)
        start, stop = last_span(example.loss_mask)
        ids = example.input_ids[:start].astype(np.int64)
        answer = spoken(self.tokenizer, example.input_ids[start:stop])
        return Question(ids, self.tokenizer.decode(ids), answer)


def spoken(tokenizer: LoadedTokenizer, ids: np.ndarray) -> str:
    """Text of ids without special tokens."""
    return tokenizer.encoder.decode(ids.tolist(), skip_special_tokens=True)


def last_span(mask: np.ndarray) -> tuple[int, int]:
    """Bounds of the last run of true values. Raises: ValueError: there is none."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    if not len(edges):
        raise ValueError("a row must have an answer, has none")
    return int(edges[-2]), int(edges[-1])


@dataclass(frozen=True, eq=False)
class Episode:
    """A prompt with one completion: what a step trains on.

    Args:
        ids: int64 [T].
        prompt_length: tokens before the completion.
        logps: of the completion's tokens by the policy that sampled them, float32.
        advantage: what the episode earned more than the mean of its group.
    """

    ids: np.ndarray
    prompt_length: int
    logps: np.ndarray
    advantage: float


def group_advantages(rewards_PS: np.ndarray) -> np.ndarray:
    """What each sample earned more than its group's mean, [P, S]. Not divided by the group's standard deviation:
    that weighs questions by how nearly they are decided (Liu et al. 2025, arXiv 2503.20783)."""
    return rewards_PS - rewards_PS.mean(axis=1, keepdims=True)


def make_episodes(
    questions: Sequence[Question], completions: Sequence[Completion], advantages: np.ndarray
) -> "Episodes":
    """The episodes of a batch; a question for each completion."""
    return Episodes(
        [
            Episode(
                np.concatenate([question.ids, done.ids]),
                len(question.ids),
                done.logps,
                float(advantage),
            )
            for question, done, advantage in zip(
                questions, completions, advantages.ravel(), strict=True
            )
        ]
    )


class Episodes:
    """Episodes as rows of a set (see batches.RowSource)."""

    num_loss_bytes = 0

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self.episodes = list(episodes)
        self.lengths = np.array([len(e.ids) for e in episodes], dtype=np.int64)
        self.loss_token_counts = np.array([len(e.logps) for e in episodes], dtype=np.int64)

    @property
    def teach(self) -> bool:
        """Whether any has an advantage; if not, a step on them has no gradient."""
        return any(episode.advantage != 0 for episode in self.episodes)

    def __len__(self) -> int:
        return len(self.episodes)

    def example(self, index: int) -> Example:
        """An episode as a row: its completion bears the loss."""
        episode = self.episodes[index]
        mask = np.arange(len(episode.ids)) >= episode.prompt_length
        return Example(input_ids=episode.ids, loss_mask=mask, num_loss_bytes=0)


class EpisodeSource(RowSource):
    """Episodes as micro-batches, each loss-bearing position with its advantage and its log-probability."""

    def __init__(
        self, rows: Episodes, pad_id: int, device: torch.device, temperature: float
    ) -> None:
        super().__init__(rows, pad_id, device)
        self.episodes, self.temperature = rows.episodes, temperature

    def batch(self, segments: Sequence[np.ndarray], max_block: int = 1 << 30) -> Batch:
        found = super().batch(segments, max_block)
        if found.loss is None:
            return found
        advantages, logps = (np.zeros(found.ids_BT.shape) for _ in range(2))
        for at, row in enumerate(found.rows_B.tolist()):
            if row >= 0:
                episode = self.episodes[row]
                where = slice(episode.prompt_length, len(episode.ids))
                advantages[at, where], logps[at, where] = episode.advantage, episode.logps
        predicted_M = found.loss.index_M.cpu().numpy() + 1  # a position predicts the next token
        is_real_M = found.loss.targets_M != IGNORED
        policy = PolicyTokens(
            self._on_device(advantages.reshape(-1)[predicted_M]) * is_real_M,
            self._on_device(logps.reshape(-1)[predicted_M]) * is_real_M,
            self.temperature,
        )
        return Batch(found.rows_B, found.ids_BT, found.loss, found.positions_BT, policy)


def joined(parts: Sequence[tuple[Episodes, np.ndarray]]) -> tuple[Episodes, list[np.ndarray]]:
    """Rows of several runs' batches as one set, and where in it those of each run are."""
    chosen = [[source.episodes[int(row)] for row in rows] for source, rows in parts]
    counts = np.cumsum([0, *map(len, chosen)])
    segments = [np.arange(*bounds) for bounds in pairwise(counts)]
    return Episodes([episode for part in chosen for episode in part]), segments


def informative_rows(episodes: Episodes) -> np.ndarray:
    """Rows whose gradient is not zero by their advantage alone, [K]; one at least, as a batch has a step."""
    rows = np.flatnonzero([episode.advantage != 0 for episode in episodes.episodes])
    return rows if len(rows) else np.zeros(1, dtype=np.int64)


def shapes_of(episodes: Episodes) -> Shapes:
    """Of the episodes that are trained on."""
    chosen = [episodes.episodes[row] for row in informative_rows(episodes)]
    return tuple((len(episode.ids), len(episode.logps)) for episode in chosen)


def stand_ins(shapes: Shapes) -> Episodes:
    """Episodes of these shapes, of which nothing is learnt that is kept."""
    return Episodes(
        [
            Episode(
                np.zeros(size, dtype=np.int64), size - loss, np.zeros(loss, dtype=np.float32), 1.0
            )
            for size, loss in shapes
        ]
    )
