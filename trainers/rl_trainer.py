"""Reinforcement learning of a pack: episodes are sampled, scored by a reward, and trained on in one step.

The algorithm is that of 'LoRA Without Regret', a policy gradient with importance sampling and group-centred
advantages. In TRL's words GRPO with scale_rewards 'none', loss_type 'dapo', importance_sampling_level 'token', beta 0,
num_iterations 1 and no clip (with one step a batch, a clip would cut nothing but rounding). The loss of a step is the
sum over the tokens of all its completions, divided by their number, whatever the micro-batch size and the number of
workers.

The loop is the one of supervised fine-tuning (loop.py), so that packs, checkpoints, resumes and divergence are one
thing for both; TRL's GRPOTrainer, which has a loop, an optimizer and a model of its own for each adapter, is what the
losses and gradients of this file are tested against.

Shape legend: P prompts of a global batch, S samples of each, E = P S episodes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from trainers.adapters import Pack
from trainers.batches import RowSource
from trainers.comm import Comm
from trainers.composer import ForwardLimits
from trainers.composition import Shapes
from trainers.credentials import masked
from trainers.data.token_set import TokenizedSet
from trainers.data.tokenizer import LoadedTokenizer
from trainers.episodes import (
    Episodes,
    EpisodeSource,
    Question,
    Questions,
    group_advantages,
    informative_rows,
    joined,
    make_episodes,
    shapes_of,
    stand_ins,
)
from trainers.full import BaseWeights
from trainers.loop import Evaluation, Trainer
from trainers.out_of_memory import NoRoomError
from trainers.rewards import Reward, RewardError
from trainers.rl_spec import RLSpec
from trainers.runs import Run
from trainers.sampler import Completion, Prompt, Sampler, episode_key

EVAL_SEED = -1
"""Held-out prompts are continued with the same noise at every evaluation of every trial: what differs is the policy."""


@dataclass(frozen=True, kw_only=True)
class RewardEvaluation(Evaluation):
    """Of reinforcement learning. Examples are prompts.

    Args:
        episodes: completions trained on so far.
        train_reward: mean since the last evaluation, None at the first.
        eval_reward: mean over the held-out prompts, one completion each; eval_loss is minus it, so that what a
            sweep minimises is the same for all methods.
        kl: estimate of the policy's divergence from the base, nats/token of the held-out completions: mean of
            log(policy / base). Unbiased, so it may be a little below 0.
        entropy: of the policy over the positions of the held-out completions, mean, nats.
        completion_length: of the held-out completions, mean, tokens with the end token.
        idle_steps: of all steps, those whose completions all earned what the others of their prompt did.
    """

    episodes: int
    idle_steps: int
    train_reward: float | None
    eval_reward: float
    kl: float
    entropy: float
    completion_length: float


@dataclass(frozen=True, eq=False)
class Rollout:
    """What one worker sampled for its prompts of a batch, in their order: S completions of each, and their rewards."""

    completions: list[list[Completion]]
    rewards: list[list[float]]


@dataclass(frozen=True, eq=False)
class RunBatch:
    """A run's episodes of one step."""

    step: int
    episodes: Episodes
    reward_sum: float


class RLTrainer(Trainer):
    """Trains the runs of a pack by rewards.

    Args:
        train, held_out: the data as tokenized rows; a row's last loss-bearing span is its answer, what stands
            before it the prompt.
        weights: the base's, where the whole model is trained: kl compares with it.
    """

    def __init__(
        self,
        pack: Pack,
        train: RowSource,
        held_out: RowSource,
        *,
        limits: ForwardLimits,
        spec: RLSpec,
        reward: Reward,
        questions: tuple[Questions, Questions],
        sampler: Sampler,
        comm: Comm | None = None,
        retention: RowSource | None = None,
        weights: BaseWeights | None = None,
    ) -> None:
        super().__init__(pack, train, held_out, limits=limits, comm=comm, retention=retention)
        self.spec, self.reward, self.sampler, self.weights = spec, reward, sampler, weights
        self.train_questions, self.eval_questions = questions
        self.batches: dict[Run, RunBatch] = {}

    def begin_batches(self, runs: Sequence[Run]) -> list[tuple[Run, Shapes]]:
        """Samples the next episodes of all runs together."""
        fresh = []
        for run in runs:
            self._draw_rows(run)
            batch = self.batches.get(run)
            if batch is None or batch.step != run.steps:
                fresh.append(run)
        if fresh:
            self._roll_out(fresh)
        for run in runs:
            if run.status == "running":
                episodes = self.batches[run].episodes
                num_tokens = int(episodes.loss_token_counts.sum())
                self._begin(run, informative_rows(episodes), episodes.lengths, num_tokens)
        sampled = [run for run in fresh if run.status == "running"]
        return [(run, shapes_of(self.batches[run].episodes)) for run in sampled]

    def _roll_out(self, runs: list[Run]) -> None:
        began = time.perf_counter()
        questions = [
            [self.train_questions.question(int(r)) for r in run.batch_rows] for run in runs
        ]
        own = [part[self.comm.world_rank :: self.comm.world_size] for part in questions]
        keys = [self._keys(run) for run in runs]
        found = self._sampled(
            [run.slot_index if run.slot.spec else None for run in runs], own, keys
        )
        for run, asked, parts in zip(runs, questions, zip(*found, strict=True), strict=True):
            self._take(run, asked, parts)
            run.seconds += (time.perf_counter() - began) / len(runs)

    def pose(self, run: Run, shapes: Shapes) -> None:
        self.batches[run] = RunBatch(run.steps, stand_ins(shapes), 0.0)

    def _keys(self, run: Run) -> list[list[int]]:
        """Of the samples of this worker's prompts of a run's batch, [P, S]."""
        places = range(run.examples, run.examples + len(run.batch_rows))
        own = places[self.comm.world_rank :: self.comm.world_size]
        samples = range(self.spec.num_generations)
        return [[episode_key(run.spec.seed, place, sample) for sample in samples] for place in own]

    def _sampled(
        self,
        slots: Sequence[int | None],
        questions: Sequence[Sequence[Question]],
        keys: Sequence[Sequence[Sequence[int]]],
    ) -> list[list[Rollout | str]]:
        """Of each worker, in their order, its rollouts of each slot's questions, or why there are none."""
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
                [self.train_questions.spoken(completion.ids) for _, completion in pairs],
                [question.answer for question, _ in pairs],
            )
        except RewardError as error:
            return masked(str(error))
        return Rollout(completions, _in_groups(rewards, [len(group) for group in completions]))

    def _take(
        self, run: Run, questions: Sequence[Question], parts: Sequence[Rollout | str]
    ) -> None:
        """Makes a run's batch of what all workers sampled, or ends it with the reason of one of them."""
        for part in parts:
            if isinstance(part, str):
                run.status, run.reason = "failed", part
                return
        completions = _interleaved(
            [part.completions for part in parts if isinstance(part, Rollout)]
        )
        rewards = _interleaved([part.rewards for part in parts if isinstance(part, Rollout)])
        rewards_PS = np.array(rewards)
        episodes = make_episodes(
            [question for question in questions for _ in range(self.spec.num_generations)],
            [completion for group in completions for completion in group],
            group_advantages(rewards_PS),
        )
        self.batches[run] = RunBatch(run.steps, episodes, float(rewards_PS.sum()))

    def _source_of(
        self, parts: Sequence[tuple[Run, np.ndarray]]
    ) -> tuple[RowSource, list[np.ndarray]]:
        episodes, segments = joined([(self.batches[run].episodes, rows) for run, rows in parts])
        return self._source(episodes), segments

    def _source(self, episodes: Episodes) -> EpisodeSource:
        rows = self.train_rows
        return EpisodeSource(episodes, rows.pad_id, rows.device, self.spec.temperature)

    def _count(self, run: Run, nats: float) -> None:
        batch = self.batches.pop(run)
        run.steps += 1
        run.idle_steps += not batch.episodes.teach
        run.examples += len(run.batch_rows)
        run.tokens += int(batch.episodes.lengths.sum())
        run.loss_tokens += run.batch_loss_tokens
        run.since_report.append((batch.reward_sum, len(batch.episodes)))

    def _evaluation(self, run: Run, scores: dict[str, Any]) -> Evaluation:
        return RewardEvaluation(
            **self._counted(run),
            **scores,
            episodes=run.examples * self.spec.num_generations,
            idle_steps=run.idle_steps,
            train_reward=run.mean_since_report,
        )

    def _scores(self, run: Run | None) -> dict[str, Any]:
        rows = range(len(self.eval_questions))
        questions = [self.eval_questions.question(row) for row in rows]
        own = slice(self.comm.world_rank, None, self.comm.world_size)
        keys = [[episode_key(EVAL_SEED, row, 0)] for row in rows[own]]
        slot = run.slot_index if run and run.slot.spec is not None else None
        parts = [part[0] for part in self._sampled([slot], [questions[own]], [keys])]
        if reasons := [part for part in parts if isinstance(part, str)]:
            raise RewardError(reasons[0])
        rollouts = [part for part in parts if isinstance(part, Rollout)]
        completions = [group[0] for group in _interleaved([part.completions for part in rollouts])]
        rewards = [group[0] for group in _interleaved([part.rewards for part in rollouts])]
        lengths = np.array([len(completion.ids) for completion in completions])
        reward = float(np.mean(rewards))
        entropies = np.array([completion.entropy for completion in completions])
        return {
            "eval_loss": -reward,
            "eval_reward": reward,
            "kl": self._kl(run, questions, completions),
            "entropy": float((entropies * lengths).sum() / lengths.sum()),
            "completion_length": float(lengths.mean()),
            "retention_loss": self.retention_loss(run),
        }

    def _kl(
        self, run: Run | None, questions: Sequence[Question], completions: Sequence[Completion]
    ) -> float:
        if run is None:
            return 0.0
        episodes = make_episodes(questions, completions, np.zeros(len(completions)))
        source = self._source(episodes)
        if self.weights is None:
            nats = self.evaluator.nats(None, source, self.limits)
        else:
            with self.weights.in_place_of(self.pack.model):
                nats = self.evaluator.nats(None, source, self.limits)
        logps = sum(float(completion.logps.sum(dtype=np.float64)) for completion in completions)
        return (logps + nats) / int(episodes.loss_token_counts.sum())


def make_rl_trainer(
    pack: Pack,
    train: RowSource,
    held_out: RowSource,
    spec: RLSpec,
    tokenizer: LoadedTokenizer,
    weights: BaseWeights | None,
    **others: Any,
) -> RLTrainer:
    """A trainer as a spec asks for it.

    Args:
        others: limits, comm and retention of a Trainer.

    Raises:
        ValueError: a sharded base, or a reward that cannot be used.
    """
    if pack.sharding is not None:
        raise ValueError(
            "method: rl needs a whole base on each worker, which samples token by token, got a sharded one; set "
            "strategy: ddp or single"
        )
    assert isinstance(train.rows, TokenizedSet)
    assert isinstance(held_out.rows, TokenizedSet)
    sampler = Sampler(
        pack,
        pad_id=tokenizer.pad_id,
        end_ids=[tokenizer.eos_id, *_own_ends(pack)],
        max_completion_length=spec.max_completion_length,
        temperature=spec.temperature,
    )
    return RLTrainer(
        pack,
        train,
        held_out,
        spec=spec,
        reward=Reward(spec.reward),
        questions=(Questions(train.rows, tokenizer), Questions(held_out.rows, tokenizer)),
        sampler=sampler,
        weights=weights,
        **others,
    )


def _own_ends(pack: Pack) -> list[int]:
    """The end tokens that the model itself is served with."""
    config = pack.model.generation_config
    ends = config.eos_token_id if config is not None else None
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _in_groups(items: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    bounds = np.cumsum([0, *sizes]).tolist()
    return [list(items[start:stop]) for start, stop in pairwise(bounds)]


def _interleaved(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """What the workers have of a list of which each took every world_size-th item, in the list's order."""
    whole: list[Any] = [None] * sum(map(len, parts))
    for at, part in enumerate(parts):
        whole[at :: len(parts)] = part
    return whole
