"""A pack that learns by rewards on a tiny model, whose tokens are spelled as characters."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from tests.trainers.tiny import Row, Rows
from trainers.adapters import Pack
from trainers.batches import RowSource
from trainers.comm import Comm
from trainers.composer import ForwardLimits
from trainers.data.tokenizer import LoadedTokenizer
from trainers.episodes import Questions
from trainers.rewards import Reward
from trainers.rl_spec import RLSpec
from trainers.rl_trainer import RLTrainer
from trainers.rollouts import Roller
from trainers.runs import RunSpec
from trainers.sampler import Sampler

CPU = torch.device("cpu")
END = 7
SPEC = RLSpec(reward={}, num_generations=4, max_completion_length=6)
RUN = RunSpec(learning_rate=1e-2, global_batch_size=5, num_examples=40, eval_every=1000)
TOKENIZER = cast(
    LoadedTokenizer,
    SimpleNamespace(
        decode=lambda ids: "".join(map(chr, ids)),
        encoder=SimpleNamespace(
            decode=lambda ids, skip_special_tokens: "".join(chr(i) for i in ids if i != END)
        ),
    ),
)


def question_rows(count: int, seed: int = 0) -> Rows:
    """Prompts of 2 to 9 tokens with an answer of one token and the end."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(generator.integers(2, 10))
        ids = np.concatenate([generator.integers(8, 256, length + 1), [END]])
        rows.append(Row(ids, np.arange(len(ids)) >= length))
    return Rows(rows)


def evens(completions: Sequence[str], **_: Any) -> list[float]:
    """The share of even tokens: half of a random policy's."""
    return [sum(ord(c) % 2 == 0 for c in text) / max(1, len(text)) for text in completions]


def rl_trainer(
    pack: Pack,
    reward: Callable[..., Any] = evens,
    *,
    spec: RLSpec = SPEC,
    comm: Comm | None = None,
    max_tokens: int = 1 << 20,
    rows: tuple[Rows, Rows] | None = None,
    **others: Any,
) -> RLTrainer:
    train, held_out = rows or (question_rows(30), question_rows(12, seed=1))
    given = Reward({})
    given.parts = [("test", 1.0, reward)]
    sampler = Sampler(
        pack,
        pad_id=0,
        end_ids=[END],
        max_completion_length=spec.max_completion_length,
        temperature=spec.temperature,
    )
    return RLTrainer(
        pack,
        RowSource(cast(Any, train), 0, CPU),
        RowSource(cast(Any, held_out), 0, CPU),
        limits=ForwardLimits(max_tokens=max_tokens),
        spec=spec,
        roller=Roller(sampler, given, TOKENIZER, comm or Comm()),
        questions=(
            Questions(cast(Any, train), TOKENIZER),
            Questions(cast(Any, held_out), TOKENIZER),
        ),
        comm=comm,
        **others,
    )
