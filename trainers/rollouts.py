"""Completions of prompts and what they earn, on all workers of a group together: for reinforcement learning, and for a
task metric beside a loss.

Shape legend: P prompts, S samples of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from trainers.adapters import Pack
from trainers.comm import Comm
from trainers.credentials import masked
from trainers.data.tokenizer import LoadedTokenizer
from trainers.episodes import Question, Questions, spoken
from trainers.out_of_memory import NoRoomError
from trainers.rewards import Reward, RewardError
from trainers.rl_spec import RewardSpec
from trainers.sampler import Completion, Prompt, Sampler, episode_key

EVAL_SEED = -1
"""Held-out prompts are continued with the same noise at every evaluation of every trial: what differs is the policy."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """What one worker sampled for its prompts, in their order: S completions of each, and their rewards."""

    completions: list[list[Completion]]
    rewards: list[list[float]]


class Roller:
    """Samples for the slots of a pack and scores what came."""

    def __init__(
        self, sampler: Sampler, reward: Reward, tokenizer: LoadedTokenizer, comm: Comm
    ) -> None:
        self.sampler, self.reward, self.tokenizer, self.comm = sampler, reward, tokenizer, comm

    def sampled(
        self,
        slots: Sequence[int | None],
        questions: Sequence[Sequence[Question]],
        keys: Sequence[Sequence[Sequence[int]]],
    ) -> list[list[Rollout | str]]:
        """Of each worker, in their order, its rollouts of each slot's questions, or why there are none.

        Args:
            questions: this worker's, of each slot.
            keys: of the samples of each question, [P, S].
        """
        asked = [
            [Prompt(q.ids, key) for q, row in zip(part, rows, strict=True) for key in row]
            for part, rows in zip(questions, keys, strict=True)
        ]
        try:
            flat = self.sampler.sample(list(zip(slots, asked, strict=True)))
        except NoRoomError as error:
            return self.comm.gather([str(error)] * len(slots))
        parted = [
            _in_groups(done, [len(row) for row in rows])
            for done, rows in zip(flat, keys, strict=True)
        ]
        scored = [self._scored(*pair) for pair in zip(questions, parted, strict=True)]
        return self.comm.gather(scored)

    def _scored(
        self, questions: Sequence[Question], completions: list[list[Completion]]
    ) -> Rollout | str:
        pairs = [(q, c) for q, group in zip(questions, completions, strict=True) for c in group]
        try:
            rewards = self.reward(
                [question.prompt for question, _ in pairs],
                [spoken(self.tokenizer, completion.ids) for _, completion in pairs],
                [question.answer for question, _ in pairs],
            )
        except RewardError as error:
            return masked(str(error))
        return Rollout(completions, _in_groups(rewards, [len(group) for group in completions]))

    def held_out(
        self, slot: int | None, questions: Questions, limit: int | None = None
    ) -> tuple[list[Question], list[Completion], list[float]]:
        """Questions of a set, a completion of each by a slot or the base, and what they earned.

        Args:
            limit: most questions, spread over the set; None: all.

        Raises:
            RewardError: a reward that failed, or no room; on all workers alike.
        """
        count = min(len(questions), limit or len(questions))
        rows = np.linspace(0, len(questions) - 1, count).round().astype(int).tolist()
        asked = [questions.question(row) for row in rows]
        own = slice(self.comm.world_rank, None, self.comm.world_size)
        keys = [[episode_key(EVAL_SEED, row, 0)] for row in rows[own]]
        parts = [part[0] for part in self.sampled([slot], [asked[own]], [keys])]
        if (reason := reason_of(parts)) is not None:
            raise RewardError(reason)
        completions, rewards = joined_rollouts(parts)
        return asked, [group[0] for group in completions], [group[0] for group in rewards]


def make_roller(
    pack: Pack,
    spec: RewardSpec,
    tokenizer: LoadedTokenizer,
    temperature: float,
    comm: Comm,
    who: str,
) -> Roller:
    """A roller as a spec asks for it.

    Args:
        temperature: that the policy samples at; 0: its likeliest token, always.
        who: asks for it; for the message of a refusal.

    Raises:
        ValueError: a sharded base, or a reward that cannot be used.
    """
    if pack.sharding is not None:
        raise ValueError(
            f"{who} needs a whole base on each worker, which samples token by token, got a sharded one; set "
            "strategy: ddp or single"
        )
    sampler = Sampler(
        pack,
        pad_id=tokenizer.pad_id,
        end_ids=[tokenizer.eos_id, *_own_ends(pack)],
        max_completion_length=spec.max_completion_length,
        temperature=temperature,
    )
    return Roller(sampler, Reward(spec.reward), tokenizer, comm)


def _own_ends(pack: Pack) -> list[int]:
    """The end tokens that the model itself is served with."""
    config = pack.model.generation_config
    ends = config.eos_token_id if config is not None else None
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def reason_of(parts: Sequence[Rollout | str]) -> str | None:
    """Why the workers have no rollouts; None where all have."""
    return next((part for part in parts if isinstance(part, str)), None)


def joined_rollouts(
    parts: Sequence[Rollout | str],
) -> tuple[list[list[Completion]], list[list[float]]]:
    """Completions and rewards of all workers in the order of the prompts, each [P, S]."""
    found = [part for part in parts if isinstance(part, Rollout)]
    completions = _interleaved([part.completions for part in found])
    return completions, _interleaved([part.rewards for part in found])


def _in_groups(items: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    bounds = np.cumsum([0, *sizes]).tolist()
    return [list(items[start:stop]) for start, stop in pairwise(bounds)]


def _interleaved(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """What the workers have of a list of which each took every world_size-th item, in the list's order."""
    whole: list[Any] = [None] * sum(map(len, parts))
    for at, part in enumerate(parts):
        whole[at :: len(parts)] = part
    return whole
