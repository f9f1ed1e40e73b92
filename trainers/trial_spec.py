"""What determines a trial's numbers, and where they go."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from search_spaces.candidate import Candidate
from trainers.base_spec import BaseSpec
from trainers.data import DataSpec
from trainers.metrics import BY_LOSS, Judge
from trainers.mirror import local_folder
from trainers.rl_spec import RLSpec, TaskSpec
from trainers.runs import RunSpec

DEFAULT_MAX_TOKENS = 2048
"""Tokens of one forward where nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """Everything that determines a trial's numbers, and where they go.

    Args:
        name: folder name under runs/NAME/trials.
        folder: the trial's folder.
        num_examples, eval_every: in examples.
        group_by_length: batches of examples of similar length.
        micro_batch_size: most rows of one forward on one worker; None: as many as max_tokens allows.
        max_tokens: of one forward on one worker, over all adapters of a pack.
        num_threads: torch threads of a CPU worker; part of what makes two runs identical.
        keep_weights: whether weights outlive the trial; False: a study wants its numbers alone, and a
            fine-tuned model per point fills a disk.
        rl: how it is trained by rewards; None: supervised.
        task: what its answers are worth, measured at every evaluation; None: nothing is asked.
        judge: by what its best evaluation is found.
        repeats: the trial whose candidate it trains on another seed.
    """

    name: str
    folder: Path
    base: BaseSpec
    data: DataSpec
    candidate: Candidate
    num_examples: int
    eval_every: int
    group_by_length: bool = False
    micro_batch_size: int | None = None
    max_tokens: int = DEFAULT_MAX_TOKENS
    num_threads: int = 1
    keep_weights: bool = True
    rl: RLSpec | None = None
    task: TaskSpec | None = None
    judge: Judge = BY_LOSS
    repeats: str | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrialSpec":
        """The spec that a trial's config.json holds."""
        parts = {
            "folder": local_folder(values["folder"]),
            "base": BaseSpec(**values["base"]),
            "data": DataSpec(**values["data"]),
            "candidate": Candidate.from_dict(values["candidate"]),
            "rl": RLSpec(**rl) if (rl := values.get("rl")) else None,
            "task": TaskSpec(**task) if (task := values.get("task")) else None,
            "judge": Judge(**values.get("judge", {})),
        }
        return cls(**(values | parts))


Report = Callable[[dict[str, Any]], bool]
"""Gets each metrics row on every worker; returns whether the trial goes on."""


def run_spec(spec: TrialSpec) -> RunSpec:
    """The training half of a candidate."""
    candidate = spec.candidate
    return RunSpec(
        learning_rate=candidate.learning_rate,
        global_batch_size=candidate.global_batch_size,
        num_examples=spec.num_examples,
        eval_every=spec.eval_every,
        lr_schedule=cast(Any, candidate.lr_schedule),
        warmup=candidate.warmup,
        weight_decay=candidate.weight_decay,
        max_grad_norm=candidate.max_grad_norm,
        seed=candidate.seed,
        group_by_length=spec.group_by_length,
    )
