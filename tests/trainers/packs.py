"""Packs of tiny adapters trained micro-step by micro-step, and what each optimizer step lost."""

from dataclasses import dataclass, field, replace

import torch

from search_spaces.architecture import ModelShape
from tests.trainers.tiny import Rows, random_rows
from trainers.adapters import Pack
from trainers.batches import RowSource
from trainers.comm import Comm
from trainers.composer import ForwardLimits
from trainers.loop import Trainer
from trainers.runs import Run, RunSpec, new_run
from trainers.slots import AdapterSpec

CPU = torch.device("cpu")
ALL_TOKENS = 1 << 20

NAMES = ("a", "b", "c", "d", "e")
TARGETS = {
    "a": ("attn", "mlp", "unembed"),
    "b": ("q_proj", "v_proj"),
    "c": ("mlp",),
    "d": ("unembed",),
    "e": ("attn", "down_proj"),
}
ADAPTERS = {
    "a": {"lora_rank": 4, "lora_alpha": 32, "seed": 0},
    "b": {"lora_rank": 1, "lora_alpha": 8, "seed": 1},
    "c": {"lora_rank": 8, "lora_alpha": 16, "seed": 2, "dropout": 0.3},
    "d": {"lora_rank": 16, "lora_alpha": 4, "seed": 3, "dropout": 0.1},
    "e": {"lora_rank": 3, "lora_alpha": 3, "seed": 4},
}
# Due after every step, so that the bench sees each.
RUN = RunSpec(learning_rate=1e-2, global_batch_size=6, num_examples=120, eval_every=1)
RUNS = {
    "a": RUN,
    "b": replace(
        RUN,
        learning_rate=3e-2,
        lr_schedule="linear",
        warmup=0.1,
        weight_decay=0.1,
        global_batch_size=1,
        num_examples=20,
        seed=1,
    ),
    # 97 examples are 19 full batches and one of two rows; no gradient clip.
    "c": replace(
        RUN,
        lr_schedule="cosine",
        warmup=3,
        global_batch_size=5,
        num_examples=97,
        seed=2,
        max_grad_norm=0.0,
    ),
    "d": replace(RUN, learning_rate=2e-2, weight_decay=0.01, num_examples=120, seed=3),
    # Leaves early: 10 steps.
    "e": replace(RUN, global_batch_size=3, num_examples=30, seed=4, max_grad_norm=0.1),
}


def adapter(model, name: str, **changes) -> AdapterSpec:
    """One of the five adapters of a mixed pack."""
    linears = ModelShape.from_config(model.config.to_dict()).resolve_target(TARGETS[name])
    return AdapterSpec(**(ADAPTERS[name] | {"linears": tuple(linears)} | changes))


@dataclass(frozen=True)
class Losses:
    """The training loss of each optimizer step, and the held-out loss of every fifth and of the last."""

    train: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)


class Bench:
    """A pack on a bench: adapters enter and leave between micro-steps."""

    def __init__(
        self,
        model,
        rows: Rows | None = None,
        *,
        max_tokens: int = ALL_TOKENS,
        comm: Comm | None = None,
    ) -> None:
        self.model, self.pack = model, Pack(model)
        self.trainer = Trainer(
            self.pack,
            RowSource(rows or random_rows(40), 0, CPU),
            RowSource(random_rows(3, seed=1), 0, CPU),
            limits=ForwardLimits(max_tokens=max_tokens),
            comm=comm,
        )
        self.runs: dict[str, Run] = {}
        self.losses: dict[str, Losses] = {}
        self.chosen: list[tuple[str, ...]] = []
        """Who had rows in each micro-step."""

    def enter(self, name: str, run_spec: RunSpec | None = None, **changes) -> Run:
        slot = self.pack.enter(adapter(self.model, name, **changes))
        self.losses[name] = Losses()
        self.runs[name] = new_run(self.pack, slot, run_spec or RUNS[name])
        return self.runs[name]

    def leave(self, name: str) -> None:
        self.pack.leave(self.runs.pop(name).slot_index)

    def micro_step(self) -> bool:
        """False: no run is running any more."""
        active = {name: run for name, run in self.runs.items() if run.status == "running"}
        if not active:
            return False
        before = {name: run.rows_done for name, run in active.items()}
        for run in self.trainer.advance(list(active.values())):
            self._record(run)
        self.chosen.append(tuple(n for n, run in active.items() if run.rows_done > before[n]))
        return True

    def micro_steps(self, count: int) -> None:
        for _ in range(count):
            assert self.micro_step()

    def train(self) -> "Bench":
        while self.micro_step():
            pass
        return self

    def is_accumulating(self, name: str) -> bool:
        """Whether a run stands inside a global batch: its gradients are half summed."""
        run = self.runs[name]
        return run.share is not None and len(run.share) < len(run.batch_rows)

    def until_accumulating(self, name: str, *, steps_done: int) -> None:
        """Trains to the middle of a global batch of a run."""
        while self.runs[name].steps < steps_done or not self.is_accumulating(name):
            assert self.micro_step()

    def _record(self, run: Run) -> None:
        losses = next(self.losses[name] for name, one in self.runs.items() if one is run)
        nats, tokens = run.since_report[-1]
        losses.train.append(nats / tokens)
        if run.steps % 5 == 0 or run.examples == run.spec.num_examples:
            self.trainer.evaluate(run, lambda _, row: losses.held_out.append(row.eval_loss) is None)


def alone(model, name: str, run_spec: RunSpec | None = None, **changes) -> Losses:
    """The losses of one adapter that never had a neighbour."""
    bench = Bench(model)
    bench.enter(name, run_spec, **changes)
    return bench.train().losses[name]
