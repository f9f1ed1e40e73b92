"""One trial of supervised fine-tuning, from base and data to checkpoints and metrics.

The doctrine's own snippet imports from here: `count_tokens` and `validate_capacity`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from search_spaces.candidate import Candidate
from search_spaces.capacity import validate_capacity
from trainers.adapters import AdapterSpec, Pack
from trainers.base_model import BaseSpec, device_name, load_base
from trainers.batches import RowSource
from trainers.checkpoint import (
    checkpoint_examples,
    copy_weights,
    load_checkpoint,
    save_checkpoint,
)
from trainers.comm import Comm
from trainers.composer import ForwardLimits
from trainers.cpu import keep_freed_memory
from trainers.data import DataSpec, count_tokens, prepare_data
from trainers.data.retention import retention_set
from trainers.data.tokenizer import load_tokenizer
from trainers.full import BaseWeights, unfreeze
from trainers.head import check_head, check_packing
from trainers.loop import Evaluation, Run, RunSpec, Trainer, new_run
from trainers.measure import measure_max_tokens
from trainers.meta_shape import shape_of_config
from trainers.metrics import best_row
from trainers.paths import (
    TrialPaths,
    read_json_lines,
    remove_folder,
    write_json,
    write_json_lines,
)
from trainers.speed import measured_once, read_speed

if TYPE_CHECKING:
    from trainers.data.sequence_packing import PackedSet
    from trainers.data.token_set import TokenizedSet

DEFAULT_MAX_TOKENS = 2048
"""Tokens of one forward where nothing was measured."""

__all__ = ["TrialResult", "TrialSpec", "count_tokens", "train_trial", "validate_capacity"]


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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrialSpec":
        """The spec that a trial's config.json holds."""
        parts = {
            "folder": Path(values["folder"]),
            "base": BaseSpec(**values["base"]),
            "data": DataSpec(**values["data"]),
            "candidate": Candidate.from_dict(values["candidate"]),
        }
        return cls(**(values | parts))


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """How a trial ended: status finished, stopped or diverged, with the reason."""

    status: str
    reason: str
    rows: tuple[dict[str, Any], ...]

    @property
    def best(self) -> dict[str, Any] | None:
        """The trained row with the lowest eval_loss; None when there is none."""
        return best_row(self.rows)


Report = Callable[[dict[str, Any]], bool]
"""Gets each metrics row on every worker; returns whether the trial goes on."""


def train_trial(spec: TrialSpec, report: Report) -> TrialResult:
    """Trains one candidate, going on from its last checkpoint when there is one.

    Metrics, checkpoint and the best weights are written by world rank 0 at every evaluation, before
    it is reported: what a scheduler has seen is on disk.

    Raises:
        ValueError: model, data or target that cannot be trained.
    """
    station = Station(spec, Comm())
    run, recorder = station.enter(spec, report)
    station.trainer.run([run], recorder)
    recorder.finish(run)
    return TrialResult(status=run.status, reason=run.reason, rows=tuple(recorder.rows))


def recorded_rows(spec: TrialSpec) -> list[dict[str, Any]]:
    """The trained rows of a trial's earlier attempt, up to its checkpoint."""
    paths = TrialPaths(spec.folder)
    reached = checkpoint_examples(paths.checkpoint)
    rows = read_json_lines(paths.metrics)
    return [row for row in rows if row["steps"] > 0 and row["examples"] <= reached]


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


class Station:
    """A loaded base with its data: what trials that share them train on, alone or in a pack."""

    def __init__(self, spec: TrialSpec, comm: Comm, model: PreTrainedModel | None = None) -> None:
        if not torch.cuda.is_available():
            torch.set_num_threads(spec.num_threads)
            keep_freed_memory()
        self.comm, self.base, self.data_spec = comm, spec.base, spec.data
        self.full_finetune = spec.candidate.full_finetune
        self.data = prepare_data(spec.data)
        self.model = model or load_base(spec.base)
        self.weights = BaseWeights(self.model) if self.full_finetune else None
        self.pack = unfreeze(self.model) if self.full_finetune else Pack(self.model)
        if model is None:
            check_head(self.pack)
            if spec.data.packing:
                check_packing(self.pack)
        self.shape = shape_of_config(self.model.config)
        self.trainer = self._trainer(spec)

    def _trainer(self, spec: TrialSpec) -> Trainer:
        pad_id = load_tokenizer(spec.data.model, revision=spec.data.revision).pad_id
        retention = retention_set(spec.data)

        def source(rows: "TokenizedSet | PackedSet") -> RowSource:
            return RowSource(rows, pad_id, self.model.device)

        return Trainer(
            self.pack,
            source(self.data.train),
            source(self.data.eval),
            limits=ForwardLimits(
                max_tokens=spec.max_tokens, micro_batch_size=spec.micro_batch_size
            ),
            comm=self.comm,
            retention=source(retention.rows) if retention else None,
        )

    def measure(self, path: str, lora_rank: int, row_tokens: int) -> dict[str, Any]:
        """Sizes the forwards as measured on this machine, now or before (see trainers/measure.py)."""
        measured = None
        if self.comm.world_rank == 0:
            measured = (
                read_speed(Path(path))
                if self.full_finetune
                else measured_once(Path(path), lambda: self._measure(lora_rank, row_tokens))
            )
        measured = self.comm.share(measured)
        if measured is not None:
            limits = replace(self.trainer.limits, max_tokens=measured["max_tokens"])
            self.trainer.limits = limits
        return measured or {}

    def _measure(self, lora_rank: int, row_tokens: int) -> dict[str, Any]:
        found = measure_max_tokens(self.pack, self.shape, lora_rank, row_tokens)
        return found | {"device": device_name(self.model.device)}

    def facts(self) -> dict[str, Any]:
        """What a plan of packs wants to know of a loaded base."""
        return {
            "device": device_name(self.model.device),
            "max_tokens": self.trainer.limits.max_tokens,
            "peak_bytes": self.comm.peak_bytes(self.model.device),
        }

    def serves(self, spec: TrialSpec) -> bool:
        """Whether a trial can share this station: the same base and data, and adapters. Full
        fine-tuning changes the base, so every such trial has a station of its own."""
        shared = spec.base == self.base and spec.data == self.data_spec
        return shared and not spec.candidate.full_finetune and not self.full_finetune

    def enter(self, spec: TrialSpec, report: Report) -> tuple[Run, "Recorder"]:
        """Puts a trial's adapter into the pack, as it was at its last checkpoint.

        Raises:
            ValueError: a target that the model does not have, or a checkpoint of another trial.
        """
        torch.manual_seed(spec.candidate.seed)
        slot = 0 if self.full_finetune else self.pack.enter(self._adapter(spec.candidate))
        run = new_run(self.pack, slot, run_spec(spec))
        paths = TrialPaths(spec.folder)
        try:
            load_checkpoint(run, paths.checkpoint)
        except ValueError:
            self.leave(run)
            raise
        if run.examples >= spec.num_examples:
            run.status = "finished"
        writes = self.comm.world_rank == 0
        return run, Recorder(spec, self.pack, paths, report, writes=writes, examples=run.examples)

    def _adapter(self, candidate: Candidate) -> AdapterSpec:
        return AdapterSpec(
            lora_rank=candidate.lora_rank,
            lora_alpha=candidate.lora_alpha,
            linears=tuple(self.shape.resolve_target(candidate.target)),
            dropout=candidate.dropout,
            seed=candidate.seed,
        )

    def leave(self, run: Run) -> None:
        """Takes a trial's adapter out of the pack."""
        if not self.full_finetune:
            self.pack.leave(run.slot_index)

    def close(self) -> None:
        """Gives the base back as it was loaded: without adapters, weights restored."""
        self.pack.eject()
        if self.weights is not None:
            self.weights.restore(self.model)

    def changed_to(self, spec: TrialSpec) -> "Station":
        """The station for another trial, after `close`; the base is loaded again only if it is another.
        Forwards keep the size that was measured."""
        station = Station(spec, self.comm, self.model if spec.base == self.base else None)
        limits = replace(station.trainer.limits, max_tokens=self.trainer.limits.max_tokens)
        station.trainer.limits = limits
        return station


class Recorder:
    """Writes each evaluation to the trial's folder and reports it."""

    def __init__(
        self,
        spec: TrialSpec,
        pack: Pack,
        paths: TrialPaths,
        report: Report,
        *,
        writes: bool,
        examples: int,
    ) -> None:
        self.spec, self.pack, self.paths, self.report, self.writes = (
            spec,
            pack,
            paths,
            report,
            writes,
        )
        # A restart goes on from the checkpoint: rows written after it will be written again.
        self.rows = [row for row in read_json_lines(paths.metrics) if row["examples"] <= examples]
        best = best_row(self.rows)
        if self._keeps and best is not None and best["examples"] == examples:
            copy_weights(paths.checkpoint, paths.best)  # a worker that died before it did

    def __call__(self, run: Run, evaluation: Evaluation) -> bool:
        row = asdict(evaluation)
        if self.spec.data.retention is None:
            del row["retention_loss"]
        # A worker that died right after its first checkpoint evaluates the base once more.
        self.rows = [*(old for old in self.rows if old["examples"] < row["examples"]), row]
        if self.writes:
            self._write(run, row)
        return self.report(row)

    def _write(self, run: Run, row: dict[str, Any]) -> None:
        # The row first: a checkpoint without its row would lose that evaluation for good.
        write_json_lines(self.paths.metrics, self.rows)
        save_checkpoint(
            self.pack,
            run,
            self.paths.checkpoint,
            base_name=self.spec.base.model,
            revision=self.spec.base.revision,
        )
        if self._keeps and best_row(self.rows) is row:
            copy_weights(self.paths.checkpoint, self.paths.best)

    @property
    def _keeps(self) -> bool:
        return self.writes and self.spec.keep_weights

    @property
    def trained_rows(self) -> list[dict[str, Any]]:
        """The rows after the untouched base's."""
        return [row for row in self.rows if row["steps"] > 0]

    @property
    def num_trained_rows(self) -> int:
        return len(self.trained_rows)

    def finish(self, run: Run) -> None:
        """Writes how the trial ended."""
        if self.writes:
            self.write_status(self.paths, run.status, run.reason, run.examples, run.steps)
            if not self.spec.keep_weights:
                remove_folder(self.paths.checkpoint)

    @staticmethod
    def write_status(
        paths: TrialPaths, status: str, reason: str, examples: int, steps: int
    ) -> None:
        """status.json of a trial."""
        write_json(
            paths.status,
            {"status": status, "reason": reason, "examples": examples, "steps": steps},
        )
