"""A task metric: what the answers to held-out rows are worth, beside their loss."""

from dataclasses import dataclass

import numpy as np

from trainers.adapters import Pack
from trainers.batches import RowSource
from trainers.comm import Comm
from trainers.data.token_set import TokenizedSet
from trainers.data.tokenizer import LoadedTokenizer
from trainers.episodes import Questions
from trainers.rl_spec import TaskSpec
from trainers.rollouts import Roller, make_roller


@dataclass(frozen=True)
class TaskMetric:
    """Asks for an answer to each of some held-out rows, always the likeliest token, and scores them."""

    roller: Roller
    questions: Questions
    num_rows: int

    def __call__(self, slot: int | None) -> dict[str, float]:
        """What the answers of a slot, or of the base, are worth.

        Raises:
            RewardError: a reward that failed, or no room; on all workers alike.
        """
        _, answers, scores = self.roller.held_out(slot, self.questions, self.num_rows)
        lengths = [len(answer.ids) for answer in answers]
        return {"eval_score": float(np.mean(scores)), "completion_length": float(np.mean(lengths))}


def make_task_metric(
    pack: Pack, held_out: RowSource, spec: TaskSpec, tokenizer: LoadedTokenizer, comm: Comm
) -> TaskMetric:
    """A metric as a spec asks for it.

    Raises:
        ValueError: a sharded base, or a reward that cannot be used.
    """
    assert isinstance(held_out.rows, TokenizedSet)
    roller = make_roller(pack, spec, tokenizer, 0.0, comm, "a task metric")
    return TaskMetric(roller, Questions(held_out.rows, tokenizer), spec.num_rows)
