"""The training loop: K >= 1 adapters on one frozen base (or a whole model, K = 1, in full.py).

One forward and one backward per micro-step serve all adapters of the pack. Each adapter has its own
optimizer, schedule, data order, global batch and budget; it steps when ITS batch is full. The loss
of a step is the sum over its global batch of the nats of the loss-bearing tokens, divided by their
number, whatever the micro-batch size and the number of workers.

Shape legend: K active adapters, B rows (K segments), T positions, V vocabulary, N loss-bearing tokens.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from trainers.adapters import Pack, Slot
from trainers.batches import Batch, RowSource, example_order, worker_micro_batches
from trainers.comm import Comm
from trainers.dropout import row_keys

ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8


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


@dataclass
class Run:
    """One adapter's training state. Everything but tensors is in `counters`."""

    spec: RunSpec
    slot_index: int
    slot: Slot
    optimizer: torch.optim.Optimizer
    examples: int = 0
    steps: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    seconds: float = 0.0
    status: Literal["running", "finished", "diverged", "stopped"] = "running"
    reason: str = ""
    grad_norm: float = 0.0
    last_lr: float = 0.0
    since_report: list[tuple[float, int]] = field(default_factory=list)
    pending: list[np.ndarray] = field(default_factory=list)
    batch_rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    batch_loss_tokens: int = 0
    batch_nats: torch.Tensor | None = None

    COUNTERS = ("examples", "steps", "tokens", "loss_tokens", "seconds")

    @property
    def counters(self) -> dict[str, Any]:
        """What a checkpoint must restore beside weights and optimizer state."""
        return {name: getattr(self, name) for name in self.COUNTERS}


def new_run(pack: Pack, slot_index: int, spec: RunSpec) -> Run:
    """A run at its first step, with its own AdamW."""
    slot = pack.slots[slot_index]
    optimizer = torch.optim.AdamW(
        list(slot.parameters.values()),
        lr=spec.learning_rate,
        betas=ADAM_BETAS,
        eps=ADAM_EPS,
        weight_decay=spec.weight_decay,
    )
    return Run(spec=spec, slot_index=slot_index, slot=slot, optimizer=optimizer)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A run's state at an evaluation: one row of metrics.jsonl."""

    examples: int
    steps: int
    tokens: int
    loss_tokens: int
    train_loss: float | None
    eval_loss: float
    eval_bits_per_byte: float
    lr: float
    grad_norm: float
    seconds: float
    peak_bytes: int


OnEvaluation = Callable[[Run, Evaluation], bool]
"""Gets each evaluation; returns whether the run goes on. Called on every worker."""


class Trainer:
    """Trains the runs of a pack to the end of their budgets."""

    def __init__(
        self,
        pack: Pack,
        train: RowSource,
        held_out: RowSource,
        *,
        micro_batch_size: int,
        comm: Comm | None = None,
        eval_batch_size: int = 16,
    ) -> None:
        self.pack, self.train_rows, self.held_out = pack, train, held_out
        self.micro_batch_size, self.eval_batch_size = micro_batch_size, eval_batch_size
        self.comm = comm or Comm()

    def run(self, runs: Sequence[Run], on_evaluation: OnEvaluation) -> None:
        """Trains until no run is running. The state of each run tells how it ended."""
        self._evaluate([run for run in runs if run.examples == 0], on_evaluation)
        while active := [run for run in runs if run.status == "running"]:
            began = time.perf_counter()
            for run in active:
                if not run.pending:
                    self._begin_batch(run)
            self._micro_step(active)
            full = [run for run in active if not run.pending]
            for run in full:
                self._optimizer_step(run)
            for run in active:
                run.seconds += (time.perf_counter() - began) / len(active)
            self._evaluate([run for run in full if self._evaluation_is_due(run)], on_evaluation)

    def _begin_batch(self, run: Run) -> None:
        stop = min(run.examples + run.spec.global_batch_size, run.spec.num_examples)
        rows = example_order(len(self.train_rows), run.spec.seed, run.examples, stop)
        lengths = self.train_rows.lengths
        run.pending = list(
            worker_micro_batches(
                rows, lengths, self.micro_batch_size, self.comm.world_rank, self.comm.world_size
            )
        )
        run.batch_rows = rows
        run.batch_loss_tokens = int(self.train_rows.loss_tokens[rows].sum())
        run.batch_nats = None

    def _micro_step(self, active: Sequence[Run]) -> None:
        batch = self.train_rows.batch([run.pending.pop(0) for run in active])
        self._activate(active, self._row_keys(batch, active))
        nats_K = segment_nats(self.pack, batch, len(active))
        scale_K = torch.tensor([1 / run.batch_loss_tokens for run in active], dtype=nats_K.dtype)
        (nats_K * scale_K.to(nats_K.device)).sum().backward()
        for run, nats in zip(active, nats_K.detach(), strict=True):
            run.batch_nats = nats if run.batch_nats is None else run.batch_nats + nats

    def _optimizer_step(self, run: Run) -> None:
        parameters = list(run.slot.parameters.values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        assert run.batch_nats is not None
        nats = self.comm.sum_gradients(gradients, run.batch_nats)
        loss, norm = nats / run.batch_loss_tokens, torch.nn.utils.get_total_norm(gradients)
        run.grad_norm = float(norm)
        if not self._is_finite(run, loss, run.grad_norm):
            run.optimizer.zero_grad(set_to_none=False)
            return
        if run.spec.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, run.spec.max_grad_norm, norm)
        run.last_lr = scheduled_lr(run.spec, run.steps)
        for group in run.optimizer.param_groups:
            group["lr"] = run.last_lr
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=False)  # the gradients are views: they must stay
        self._count(run, nats)

    def _count(self, run: Run, nats: float) -> None:
        run.steps += 1
        run.examples += len(run.batch_rows)
        run.tokens += int(self.train_rows.lengths[run.batch_rows].sum())
        run.loss_tokens += run.batch_loss_tokens
        run.since_report.append((nats, run.batch_loss_tokens))

    @staticmethod
    def _is_finite(run: Run, loss: float, grad_norm: float) -> bool:
        # The loss and the gradients are summed over the workers, so all of them decide alike.
        for name, value in (("train_loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                run.status, run.reason = "diverged", f"{name} {value} at step {run.steps + 1}"
                return False
        return True

    def _evaluation_is_due(self, run: Run) -> bool:
        if run.status != "running":
            return False
        before = run.examples - len(run.batch_rows)
        every = run.spec.eval_every
        return run.examples >= run.spec.num_examples or run.examples // every > before // every

    def _evaluate(self, due: Sequence[Run], on_evaluation: OnEvaluation) -> None:
        if not due:
            return
        losses, bits = self.eval_losses(due)
        for run, eval_loss, bits_per_byte in zip(due, losses, bits, strict=True):
            self._conclude(run, eval_loss, bits_per_byte, on_evaluation)

    def _conclude(
        self, run: Run, eval_loss: float, bits_per_byte: float, on_evaluation: OnEvaluation
    ) -> None:
        if not math.isfinite(eval_loss):
            run.status, run.reason = "diverged", f"eval_loss {eval_loss} at step {run.steps}"
            return
        nats, tokens = (
            (sum(part) for part in zip(*run.since_report, strict=True))
            if run.since_report
            else (0.0, 0)
        )
        evaluation = Evaluation(
            examples=run.examples,
            steps=run.steps,
            tokens=run.tokens,
            loss_tokens=run.loss_tokens,
            seconds=round(run.seconds, 3),
            train_loss=nats / tokens if tokens else None,
            eval_loss=eval_loss,
            eval_bits_per_byte=bits_per_byte,
            lr=run.last_lr,
            grad_norm=run.grad_norm,
            peak_bytes=self.comm.peak_bytes(self.held_out.device),
        )
        run.since_report.clear()
        if run.examples >= run.spec.num_examples:
            run.status = "finished"
        if not on_evaluation(run, evaluation) and run.status == "running":
            run.status, run.reason = "stopped", "stopped by its scheduler"

    @torch.no_grad()
    def eval_losses(self, runs: Sequence[Run]) -> tuple[list[float], list[float]]:
        """Held-out loss of each run: (nats/token, bits/byte), both over all loss-bearing tokens."""
        self._activate(runs, None)
        order = np.argsort(-self.held_out.lengths, kind="stable")
        share = order[self.comm.world_rank :: self.comm.world_size]
        nats_K = torch.zeros(len(runs), dtype=torch.float64, device=self.held_out.device)
        for start in range(0, len(share), self.eval_batch_size):
            rows = share[start : start + self.eval_batch_size]
            batch = self.held_out.batch([rows] * len(runs))
            nats_K += segment_nats(self.pack, batch, len(runs)).double()
        nats = self.comm.sum(nats_K).tolist()
        tokens = int(self.held_out.loss_tokens.sum())
        num_bytes = self.held_out.rows.num_loss_bytes
        return [n / tokens for n in nats], [n / math.log(2) / num_bytes for n in nats]

    def _activate(self, runs: Sequence[Run], row_keys_B: torch.Tensor | None) -> None:
        self.pack.ctx.active = tuple(run.slot_index for run in runs)
        self.pack.ctx.row_keys_B = row_keys_B

    @staticmethod
    def _row_keys(batch: Batch, active: Sequence[Run]) -> torch.Tensor:
        rows_K = batch.rows_B.chunk(len(active))
        return torch.cat(
            [row_keys(rows, run.steps) for rows, run in zip(rows_K, active, strict=True)]
        )


def segment_nats(pack: Pack, batch: Batch, num_segments: int) -> torch.Tensor:
    """Summed nats of the loss-bearing tokens of each adapter's segment, shape [K]."""
    logits_BTV = pack.model(input_ids=batch.ids_BT, use_cache=False).logits
    predicted_BT = batch.loss_BT[:, 1:]
    logits_NV = logits_BTV[:, :-1][predicted_BT]
    if logits_NV.dtype in (torch.bfloat16, torch.float16):
        logits_NV = logits_NV.float()
    nats_N = F.cross_entropy(logits_NV, batch.ids_BT[:, 1:][predicted_BT], reduction="none")
    rows_per_segment = batch.ids_BT.shape[0] // num_segments
    segment_N = predicted_BT.nonzero()[:, 0] // rows_per_segment
    zeros_K = torch.zeros(num_segments, dtype=nats_N.dtype, device=nats_N.device)
    return zeros_K.index_add(0, segment_N, nats_N)
