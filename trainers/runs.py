"""The state of what a pack trains: one adapter (or a whole model), its budget, its counters, its global batch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from trainers.adapters import Pack
from trainers.batches import Share
from trainers.out_of_memory import Shortage
from trainers.slots import Slot


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """How one adapter is trained.

    Args:
        learning_rate: peak, > 0.
        global_batch_size: examples per optimizer step, over all workers.
        num_examples: budget; the last step may be smaller than the others.
        eval_every: examples between evaluations (and checkpoints), >= 1.
        lr_schedule: shape after warm-up.
        warmup: below 1 a fraction of the steps, else a number of steps.
        weight_decay: AdamW's.
        max_grad_norm: gradient clip by the adapter's own norm; 0 is no clip.
        seed: of the data order.
        group_by_length: batches of examples of similar length.
    """

    learning_rate: float
    global_batch_size: int
    num_examples: int
    eval_every: int
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    group_by_length: bool = False

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole budget."""
        return -(-self.num_examples // self.global_batch_size)


def scheduled_lr(spec: RunSpec, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0)."""
    warmup = spec.warmup * spec.num_steps if spec.warmup < 1 else spec.warmup
    if step < warmup:
        return spec.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, spec.num_steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return spec.learning_rate * factor[spec.lr_schedule]


Status = Literal["running", "waiting", "finished", "diverged", "stopped", "failed"]
"""waiting: at an evaluation that nobody has asked for yet (pack_server.py)."""


@dataclass(eq=False)
class Run:
    """One adapter's training state. Everything but tensors is in `counters`."""

    spec: RunSpec
    slot_index: int
    slot: Slot
    examples: int = 0
    steps: int = 0
    idle_steps: int = 0
    """Of reinforcement learning: those whose completions all earned what the others of their prompt did, so that
    there was nothing to learn."""
    tokens: int = 0
    loss_tokens: int = 0
    seconds: float = 0.0
    status: Status = "running"
    reason: str = ""
    grad_norm: float = 0.0
    last_lr: float = 0.0
    evaluated: int = 0
    """Examples at the last evaluation."""
    since_report: list[tuple[float, int]] = field(default_factory=list)
    """Of each step since the last evaluation: a sum (nats, or rewards) and how many it is over."""
    share: Share | None = None
    """This worker's rest of the global batch; None between two batches."""
    taken: int = 0
    """Rows of this worker's share that were taken."""
    rows_done: float = 0.0
    """Rows this pack gave the run: who has least comes next. Not a part of its state."""
    batch_rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    batch_loss_tokens: int = 0
    batch_nats: torch.Tensor | None = None
    shortage: Shortage | None = None
    """A forward of this batch that had no room on this worker: the batch will be done again."""

    COUNTERS = ("examples", "steps", "tokens", "loss_tokens", "seconds")

    @property
    def counters(self) -> dict[str, Any]:
        """What a checkpoint must restore beside weights and optimizer state, also one that was written
        between two evaluations: its next row must be that of a run that nobody disturbed."""
        between = {
            "idle_steps": self.idle_steps,
            "evaluated": self.evaluated,
            "last_lr": self.last_lr,
            "grad_norm": self.grad_norm,
        }
        between["since_report"] = [list(part) for part in self.since_report]
        return {name: getattr(self, name) for name in self.COUNTERS} | between

    def restore(self, counters: Mapping[str, Any]) -> None:
        """Takes over what `counters` gave. Checkpoints of before say nothing of `evaluated` and the like:
        they were written at evaluations alone."""
        for name in self.COUNTERS:
            setattr(self, name, counters[name])
        self.idle_steps = counters.get("idle_steps", 0)
        self.evaluated = counters.get("evaluated", self.examples)
        self.last_lr = counters.get("last_lr", 0.0)
        self.grad_norm = counters.get("grad_norm", 0.0)
        self.since_report = [(nats, tokens) for nats, tokens in counters.get("since_report", [])]

    @property
    def mean_since_report(self) -> float | None:
        """Mean of what the steps since the last evaluation brought; None where there was none."""
        total, count = (sum(part) for part in zip(*self.since_report or [(0.0, 0)], strict=True))
        return total / count if count else None

    @property
    def is_due(self) -> bool:
        """Whether the run stands at an evaluation that it has not had: at a multiple of eval_every (the
        first step at or after it), or at the end of its budget."""
        if self.share is not None or self.examples == self.evaluated:
            return False
        every = self.spec.eval_every
        ended = self.examples >= self.spec.num_examples
        return ended or self.examples // every > self.evaluated // every


def new_run(pack: Pack, slot_index: int, spec: RunSpec) -> Run:
    """A run at its first step, with its own AdamW."""
    return Run(spec=spec, slot_index=slot_index, slot=pack.slots[slot_index])
