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
from typing import Any

import numpy as np

from trainers.adapters import Pack
from trainers.batches import RowSource
from trainers.comm import Comm
from trainers.composer import ForwardLimits
from trainers.composition import Shapes
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
from trainers.loop import Evaluation, Trainer, slot_of
from trainers.rl_spec import RLSpec
from trainers.rollouts import Roller, Rollout, joined_rollouts, make_roller, reason_of
from trainers.runs import Run
from trainers.sampler import Completion, episode_key


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
        roller: Roller,
        questions: tuple[Questions, Questions],
        comm: Comm | None = None,
        retention: RowSource | None = None,
        weights: BaseWeights | None = None,
    ) -> None:
        super().__init__(pack, train, held_out, limits=limits, comm=comm, retention=retention)
        self.spec, self.roller, self.weights = spec, roller, weights
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
        found = self.roller.sampled([slot_of(run) for run in runs], own, keys)
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

    def _take(
        self, run: Run, questions: Sequence[Question], parts: Sequence[Rollout | str]
    ) -> None:
        """Makes a run's batch of what all workers sampled, or ends it with the reason of one of them."""
        if (reason := reason_of(parts)) is not None:
            run.status, run.reason = "failed", reason
            return
        completions, rewards = joined_rollouts(parts)
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
        questions, completions, rewards = self.roller.held_out(slot_of(run), self.eval_questions)
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
    comm: Comm,
    **others: Any,
) -> RLTrainer:
    """A trainer as a spec asks for it.

    Args:
        others: limits and retention of a Trainer.

    Raises:
        ValueError: a sharded base, or a reward that cannot be used.
    """
    assert isinstance(train.rows, TokenizedSet)
    assert isinstance(held_out.rows, TokenizedSet)
    return RLTrainer(
        pack,
        train,
        held_out,
        spec=spec,
        roller=make_roller(pack, spec, tokenizer, spec.temperature, comm, "method: rl"),
        questions=(Questions(train.rows, tokenizer), Questions(held_out.rows, tokenizer)),
        weights=weights,
        comm=comm,
        **others,
    )
