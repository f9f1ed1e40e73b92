"""The training loop: K >= 1 adapters on one frozen base (or a whole model, K = 1, in full.py).

One forward and one backward per micro-step serve as many adapters as fill it. Each adapter has its own
optimizer, schedule, data order, global batch and budget; it steps when ITS batch is full. The loss
of a step is the sum over its global batch of the nats of the loss-bearing tokens, divided by their
number, whatever the micro-batch size and the number of workers.
"""

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainers.adapters import Pack
from trainers.batches import Batch, RowSource, Share
from trainers.comm import Comm
from trainers.composer import ForwardLimits, next_forward
from trainers.composition import Shapes
from trainers.dropout import DropoutTokens, row_keys, row_tokens
from trainers.evaluator import Evaluator
from trainers.head import LossHead
from trainers.optimizer import adamw_step, clip_gradients, grad_norm
from trainers.out_of_memory import (
    NoRoomError,
    give_back,
    halved,
    shared,
    shortage_in,
)
from trainers.rewards import RewardError
from trainers.runs import Run, scheduled_lr


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A run's state at an evaluation: one row of metrics.jsonl.

    retention_loss: nats/token on the retention rows; None without any, or where it is not finite (a
    trial is judged by its eval_loss alone, and JSON has no NaN).
    """

    examples: int
    steps: int
    tokens: int
    loss_tokens: int
    eval_loss: float
    lr: float
    grad_norm: float
    seconds: float
    peak_bytes: int
    retention_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class LossEvaluation(Evaluation):
    """Of supervised fine-tuning. train_loss: nats/token since the last evaluation, None at the first."""

    train_loss: float | None
    eval_bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class TaskEvaluation(LossEvaluation):
    """With a task metric beside the loss.

    eval_score: mean of what the answers to held-out rows were worth; completion_length: of the answers, mean, tokens.
    """

    eval_score: float
    completion_length: float


TaskScores = Callable[[int | None], dict[str, float]]
"""What a slot's answers, or the base's, are worth: what TaskEvaluation has beside the loss (see task_metric.py)."""
OnEvaluation = Callable[[Run, Evaluation], bool]
"""Gets each evaluation; returns whether the run goes on. Called on every worker."""


class Watch:
    """Who wants to know of a pack's forwards; by itself nobody does."""

    def forward(self, parts: Sequence[tuple[Run, np.ndarray]]) -> None:
        """A forward of these rows, which were just taken, begins."""

    def sampled(self, parts: Sequence[tuple[Run, Shapes]]) -> None:
        """Episodes of these shapes were sampled together, for the next batch of each run."""

    def again(self, run: Run) -> None:
        """A run's batch is done again."""


class Trainer:
    """Trains the runs of a pack, a micro-step at a time."""

    def __init__(
        self,
        pack: Pack,
        train: RowSource,
        held_out: RowSource,
        *,
        limits: ForwardLimits,
        comm: Comm | None = None,
        retention: RowSource | None = None,
        task: TaskScores | None = None,
    ) -> None:
        self.pack, self.train_rows, self.held_out, self.limits = pack, train, held_out, limits
        self.retention, self.task = retention, task
        self.comm = comm or Comm()
        self.head = LossHead(pack)
        self.evaluator = Evaluator(pack, self.head, self.comm)
        self.watch = Watch()
        self._base_scores: dict[str, Any] | None = None

    def run(self, runs: Sequence[Run], on_evaluation: OnEvaluation) -> None:
        """Trains until no run is running. The state of each run tells how it ended."""
        for run in runs:
            if run.examples == 0 or run.is_due:
                self.evaluate(run, on_evaluation)
        while active := [run for run in runs if run.status == "running"]:
            for run in self.advance(active):
                self.evaluate(run, on_evaluation)

    def advance(self, active: Sequence[Run]) -> list[Run]:
        """One forward and backward for the runs whose turn it is, and the optimizer steps of those
        whose global batch is full. Returns the runs that stand at an evaluation now."""
        if sampled := self.begin_batches([run for run in active if run.share is None]):
            self.watch.sampled(sampled)
        active = [run for run in active if run.status == "running"]
        if not active:
            return []
        parts = next_forward(active, self.limits)
        self.watch.forward(parts)
        return self.forward(parts)

    def forward(
        self, parts: Sequence[tuple[Run, np.ndarray]], ghosts: Collection[Run] = ()
    ) -> list[Run]:
        """As `advance`, of rows that were taken from the runs' batches.

        Args:
            ghosts: runs whose rows are there for the forward's shape alone.
        """
        began = time.perf_counter()
        self._try_micro_step([(run, rows) for run, rows in parts if run.shortage is None])
        for ghost in ghosts:
            ghost.slot.zero_grad()
        chosen = [run for run, _ in parts if run not in ghosts]
        for run, rows in parts:
            run.taken += len(rows)
        full = [run for run in chosen if not run.share]
        self._optimizer_steps(full)
        for run in chosen:
            run.seconds += (time.perf_counter() - began) / len(chosen)
        return [run for run in full if run.status == "running" and run.is_due]

    def begin_batches(self, runs: Sequence[Run]) -> list[tuple[Run, Shapes]]:
        """Draws the next global batch of each run; a run for which that fails has ended. Gives the shapes of what had
        to be sampled for it."""
        for run in runs:
            self._draw_rows(run)
            lengths, loss_tokens = self.train_rows.lengths, self.train_rows.loss_tokens
            self._begin(run, run.batch_rows, lengths, int(loss_tokens[run.batch_rows].sum()))
        return []

    def pose(self, run: Run, shapes: Shapes) -> None:
        """Gives a stand-in of another run (replay.py) the shape of its batch; supervised rows have theirs."""

    def _draw_rows(self, run: Run) -> None:
        """The rows of the data that a run's next global batch is of."""
        stop = min(run.examples + run.spec.global_batch_size, run.spec.num_examples)
        group = run.spec.global_batch_size if run.spec.group_by_length else None
        run.batch_rows = self.train_rows.order(run.spec.seed, run.examples, stop, group)

    def _begin(self, run: Run, rows: np.ndarray, lengths: np.ndarray, loss_tokens: int) -> None:
        """Shares out what a global batch trains on.

        Args:
            lengths: tokens of every row that `rows` are numbers of.
            loss_tokens: of the whole batch.
        """
        run.share = Share.of(rows, lengths, self.comm.world_rank, self.comm.world_size)
        run.batch_loss_tokens = loss_tokens
        run.batch_nats = run.shortage = None
        run.taken = 0

    def _try_micro_step(self, parts: list[tuple[Run, np.ndarray]]) -> None:
        """A micro-step; where it has no room, the batches that it is of will be done again."""
        if not parts:
            return
        chosen = [run for run, _ in parts]
        source, rows = self._source_of(parts)
        shortage = shortage_in(
            lambda: self._micro_step(chosen, source, rows),
            rows,
            source.lengths,
            waited_for=self.pack.sharding is not None,
        )
        if shortage is None:
            return
        give_back()
        for run in chosen:
            run.shortage = shortage
            if self.comm.world_size == 1 and run.share is not None:
                run.share.take(len(run.share))  # several workers must go on alike

    def _source_of(
        self, parts: Sequence[tuple[Run, np.ndarray]]
    ) -> tuple[RowSource, list[np.ndarray]]:
        """What the rows of a forward are numbers of, and each run's rows in it."""
        return self.train_rows, [rows for _, rows in parts]

    def _micro_step(self, chosen: list[Run], source: RowSource, rows: list[np.ndarray]) -> None:
        batch = source.batch(rows, self.head.max_positions)
        slots = tuple(run.slot_index for run in chosen if run.slot.spec is not None)
        scales = [1 / run.batch_loss_tokens for run in chosen]
        dropout = self._dropout(batch, chosen)
        for run, nats in zip(
            chosen, self.head.train_nats(batch, slots, scales, dropout), strict=True
        ):
            run.batch_nats = nats if run.batch_nats is None else run.batch_nats + nats

    @staticmethod
    def _dropout(batch: Batch, chosen: list[Run]) -> DropoutTokens | None:
        rates = [run.slot.spec.dropout if run.slot.spec else 0.0 for run in chosen]
        if not any(rates):
            return None
        rows_n = batch.rows_B.chunk(len(chosen))
        keys = [row_keys(rows, run.steps) for rows, run in zip(rows_n, chosen, strict=True)]
        rates_B = torch.tensor(rates, device=batch.rows_B.device).repeat_interleave(len(rows_n[0]))
        return row_tokens(torch.cat(keys), rates_B, batch.ids_BT.shape[1])

    def _optimizer_steps(self, full: Sequence[Run]) -> None:
        full = self._with_room(full)
        if not full:
            return
        nats = [self.comm.sum_gradients(run.slot.grad_rows, _nats_of(run)) for run in full]
        norms = [grad_norm(run.slot) for run in full]
        # The only numbers that the host waits for: once for all runs of this step.
        values = torch.stack([*nats, *(norm.double() for norm in norms)]).tolist()
        for at, run in enumerate(full):
            run.share, run.taken, run.grad_norm = None, 0, values[len(full) + at]
            if self._is_finite(run, values[at] / run.batch_loss_tokens):
                self._optimizer_step(run, norms[at])
                self._count(run, values[at])
            run.slot.zero_grad()

    def _with_room(self, full: Sequence[Run]) -> list[Run]:
        """The runs whose batch was computed on every worker; the others begin it again with forwards of half
        the size, or have failed."""
        if not full:
            return []
        found = shared([run.shortage for run in full], self.comm, self.train_rows.device)
        short = {run: shortage for run, shortage in zip(full, found, strict=True) if shortage}
        for run, shortage in short.items():
            run.share, run.taken, run.shortage = None, 0, None
            run.slot.zero_grad()
            self.watch.again(run)
            if shortage.is_single:
                peak_bytes = self.comm.peak_bytes(self.train_rows.device)
                run.status, run.reason = "failed", shortage.reason(peak_bytes)
        if short:
            self.limits = halved(self.limits, list(short.values()))
        return [run for run in full if run not in short]

    @staticmethod
    def _optimizer_step(run: Run, norm: torch.Tensor) -> None:
        if run.spec.max_grad_norm > 0:
            clip_gradients(run.slot, norm, run.spec.max_grad_norm)
        run.last_lr = scheduled_lr(run.spec, run.steps)
        adamw_step(run.slot, run.steps, lr=run.last_lr, weight_decay=run.spec.weight_decay)

    def _count(self, run: Run, nats: float) -> None:
        run.steps += 1
        run.examples += len(run.batch_rows)
        run.tokens += int(self.train_rows.lengths[run.batch_rows].sum())
        run.loss_tokens += run.batch_loss_tokens
        run.since_report.append((nats, run.batch_loss_tokens))

    @staticmethod
    def _is_finite(run: Run, loss: float) -> bool:
        # The loss and the gradients are summed over the workers, so all of them decide alike.
        for name, value in (("train_loss", loss), ("grad_norm", run.grad_norm)):
            if not math.isfinite(value):
                run.status, run.reason = "diverged", f"{name} {value} at step {run.steps + 1}"
                return False
        return True

    def evaluate(self, run: Run, on_evaluation: OnEvaluation) -> None:
        """Evaluates a run and tells; it ends here if its budget is used up, its loss is not finite,
        or the answer is no."""
        try:
            scores = self._scores_of(run)
        except (NoRoomError, RewardError) as error:
            run.status, run.reason = "failed", str(error)
            return
        eval_loss = scores["eval_loss"]
        if not math.isfinite(eval_loss):
            run.status, run.reason = "diverged", f"eval_loss {eval_loss} at step {run.steps}"
            return
        evaluation = self._evaluation(run, scores)
        run.since_report.clear()
        run.evaluated = run.examples
        if run.examples >= run.spec.num_examples:
            run.status = "finished"
        if not on_evaluation(run, evaluation) and run.status == "running":
            run.status, run.reason = "stopped", "stopped by its scheduler"

    def _evaluation(self, run: Run, scores: dict[str, Any]) -> Evaluation:
        kind = LossEvaluation if self.task is None else TaskEvaluation
        return kind(**self._counted(run), **scores, train_loss=run.mean_since_report)

    def _counted(self, run: Run) -> dict[str, Any]:
        """What every evaluation says of a run's way, whatever it is judged by."""
        return {
            "examples": run.examples,
            "steps": run.steps,
            "tokens": run.tokens,
            "loss_tokens": run.loss_tokens,
            "seconds": round(run.seconds, 3),
            "lr": run.last_lr,
            "grad_norm": run.grad_norm,
            "peak_bytes": self.comm.peak_bytes(self.held_out.device),
        }

    def _scores_of(self, run: Run) -> dict[str, Any]:
        """A run's scores. Before its first step every run is the base, which is evaluated once."""
        if run.steps > 0:
            return self._scores(run)
        if self._base_scores is None:
            self._base_scores = self._scores(None)
        return self._base_scores

    def _scores(self, run: Run | None) -> dict[str, Any]:
        """What a run, or the base, is judged by: eval_loss, and what stands beside it in a row."""
        eval_loss, bits_per_byte = self.eval_losses(run)
        found = {
            "eval_loss": eval_loss,
            "eval_bits_per_byte": bits_per_byte,
            "retention_loss": self.retention_loss(run),
        }
        # A model whose loss is not finite has diverged, and answers nothing.
        asks = self.task is not None and math.isfinite(eval_loss)
        return found | self.task(slot_of(run)) if asks and self.task else found

    def eval_losses(self, run: Run | None) -> tuple[float, float]:
        """Held-out loss of a run, or of the base: nats/token and bits/byte, over all loss-bearing
        tokens."""
        return self.evaluator.losses(slot_of(run), self.held_out, self.limits)

    def retention_loss(self, run: Run | None) -> float | None:
        """Loss of a run, or of the base, on the retention rows in nats/token; None where there are
        none, or it is not finite."""
        if self.retention is None:
            return None
        nats = self.evaluator.nats(slot_of(run), self.retention, self.limits)
        loss = nats / int(self.retention.loss_tokens.sum())
        return loss if math.isfinite(loss) else None


def slot_of(run: Run | None) -> int | None:
    return run.slot_index if run and run.slot.spec is not None else None


def _nats_of(run: Run) -> torch.Tensor:
    assert run.batch_nats is not None
    return run.batch_nats
