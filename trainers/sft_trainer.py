"""One trial of supervised fine-tuning, from base and data to checkpoints and metrics.

The doctrine's own snippet imports from here: `count_tokens` and `validate_capacity`.
"""

import traceback
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
    recorded_probe_loss,
    save_checkpoint,
)
from trainers.comm import Comm
from trainers.composer import ForwardLimits
from trainers.cpu import keep_freed_memory
from trainers.data import DataSpec, count_tokens, prepare_data
from trainers.data.retention import retention_set
from trainers.data.tokenizer import load_tokenizer
from trainers.full import BaseWeights, unfreeze
from trainers.gate import GateError, Probe
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
    write_text,
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
    """How a trial ended: status finished, stopped, diverged or failed, with the reason."""

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
    it is reported: what a scheduler has seen is on disk. A save, or a checkpoint to go on from, that does
    not pass the gate ends the trial as failed.

    Raises:
        ValueError: model, data or target that cannot be trained.
    """
    station = Station(spec, Comm())
    try:
        run, recorder = station.enter(spec, report)
    except GateError as error:
        return _refused(spec, station, error)
    try:
        station.trainer.run([run], recorder)
    except GateError as error:
        recorder.fail(run, error)
    recorder.finish(run)
    return TrialResult(status=run.status, reason=run.reason, rows=tuple(recorder.rows))


def _refused(spec: TrialSpec, station: "Station", error: GateError) -> TrialResult:
    """The end of a trial whose checkpoint is not what it says."""
    paths = TrialPaths(spec.folder)
    if station.comm.world_rank == 0:
        Recorder.write_failure(paths, error, 0, 0)
    rows = tuple(read_json_lines(paths.metrics))
    return TrialResult(status="failed", reason=str(error), rows=rows)


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
        if self.full_finetune and spec.base.sharded:
            raise ValueError(
                "full fine-tuning needs a whole base on each worker, got a sharded one; set strategy: single"
            )
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
        self.probe = Probe(self.trainer)

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
        """Sizes the forwards as measured on this machine, now or before (see trainers/measure.py). Of a
        sharded base they stay as the plan has them: memory decides, and all workers must run alike."""
        if self.pack.sharding is not None:
            return {}
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
            ValueError: a target that the model does not have; a GateError for a checkpoint that is not
                whole, of another trial or of another base.
        """
        torch.manual_seed(spec.candidate.seed)
        slot = 0 if self.full_finetune else self.pack.enter(self._adapter(spec.candidate))
        run = new_run(self.pack, slot, run_spec(spec))
        paths = TrialPaths(spec.folder)
        try:
            if load_checkpoint(run, paths.checkpoint):
                recorded = recorded_probe_loss(paths.checkpoint)
                self.probe.check_reloaded(run, recorded, paths.checkpoint)
        except ValueError:
            self.leave(run)
            raise
        if run.examples >= spec.num_examples and not run.is_due:
            run.status = "finished"
        return run, Recorder(spec, self.probe, paths, report, examples=run.evaluated)

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
    """Writes each evaluation to the trial's folder and reports it. Called on every worker; world rank 0
    writes.

    Args:
        examples: that the run had seen at its last evaluation before it entered.
    """

    def __init__(
        self, spec: TrialSpec, probe: Probe, paths: TrialPaths, report: Report, *, examples: int
    ) -> None:
        self.spec, self.probe, self.paths, self.report = spec, probe, paths, report
        self.writes = probe.comm.world_rank == 0
        # A restart goes on from the checkpoint: rows written after it will be written again.
        self.rows = [row for row in read_json_lines(paths.metrics) if row["examples"] <= examples]
        best = best_row(self.rows)
        is_best = best is not None and best["examples"] == checkpoint_examples(paths.checkpoint)
        if self._keeps and is_best:
            copy_weights(paths.checkpoint, paths.best)  # a worker that died before it did

    def __call__(self, run: Run, evaluation: Evaluation) -> bool:
        """Whether the run goes on.

        Raises:
            GateError: what was saved is not what was trained; on all workers alike.
        """
        row = asdict(evaluation)
        if self.spec.data.retention is None:
            del row["retention_loss"]
        # A worker that died right after its first checkpoint evaluates the base once more.
        self.rows = [*(old for old in self.rows if old["examples"] < row["examples"]), row]
        # The row first: a checkpoint without its row would lose that evaluation for good.
        if self.writes:
            write_json_lines(self.paths.metrics, self.rows)
        self.save(run)
        if self._keeps and best_row(self.rows) is row:
            copy_weights(self.paths.checkpoint, self.paths.best)
        return self.report(row)

    def save(self, run: Run) -> None:
        """Writes a checkpoint, of an evaluation or between two; the same GateErrors, on all workers."""
        probe_loss = self.probe.loss(run)
        refusal = self._checkpoint(run, probe_loss) if self.writes else ""
        if refusal := self.probe.comm.share(refusal):
            raise GateError(refusal)

    def _checkpoint(self, run: Run, probe_loss: float) -> str:
        """Why the gate refused what was written; empty: it did not."""
        try:
            save_checkpoint(
                self.probe.pack,
                run,
                self.paths.checkpoint,
                base_name=self.spec.base.model,
                revision=self.spec.base.revision,
                probe_loss=probe_loss,
            )
        except GateError as error:
            return str(error)
        return ""

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

    def fail(self, run: Run, error: GateError) -> None:
        """Ends a run whose save or checkpoint did not pass the gate; `finish` writes the rest."""
        run.status, run.reason = "failed", str(error)
        if self.writes:
            self.write_failure(self.paths, error, run.examples, run.steps)

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

    @classmethod
    def write_failure(cls, paths: TrialPaths, error: Exception, examples: int, steps: int) -> None:
        """error.txt and status.json of a trial that failed."""
        write_text(paths.error, "".join(traceback.format_exception(error)))
        cls.write_status(paths, "failed", str(error), examples, steps)
