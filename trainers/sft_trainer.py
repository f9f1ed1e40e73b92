"""One trial, supervised or by rewards, from base and data to checkpoints and metrics.

The doctrine's own snippet imports from here: `count_tokens` and `validate_capacity`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from search_spaces.architecture import ModelShape
from search_spaces.candidate import Candidate
from search_spaces.capacity import validate_capacity
from search_spaces.variants import DORA, parts_of, stored_rank
from trainers.adapters import Pack
from trainers.base_model import device_name, load_base
from trainers.batches import RowSource
from trainers.checkpoint import load_checkpoint, lora_config
from trainers.checkpoint_folder import fetch_checkpoint, find_checkpoint
from trainers.comm import Comm
from trainers.composer import ForwardLimits
from trainers.cpu import keep_freed_memory
from trainers.data import count_tokens, prepare_data
from trainers.data.retention import retention_set
from trainers.data.tokenizer import load_tokenizer
from trainers.full import BaseWeights, unfreeze
from trainers.gate import Probe, require_expressible
from trainers.head import check_head, check_packing
from trainers.integrity import DamagedError, GateError
from trainers.loop import Trainer
from trainers.measure import measure_max_tokens
from trainers.meta_shape import shape_of_config
from trainers.metrics import BY_LOSS, Judge
from trainers.mirror import fetch
from trainers.out_of_memory import NoRoomError, shared, shortage_in
from trainers.paths import (
    TrialPaths,
    read_json_lines,
)
from trainers.recorder import Recorder
from trainers.rl_trainer import make_rl_trainer
from trainers.runs import Run, RunSpec, new_run
from trainers.slots import AdapterSpec
from trainers.speed import measured_once, read_speed
from trainers.targets import matching_layers
from trainers.task_metric import make_task_metric
from trainers.trial_spec import Report, TrialSpec, run_spec

if TYPE_CHECKING:
    from trainers.data.sequence_packing import PackedSet
    from trainers.data.token_set import TokenizedSet

__all__ = ["TrialResult", "TrialSpec", "count_tokens", "train_trial", "validate_capacity"]


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """How a trial ended: status finished, stopped, diverged or failed, with the reason."""

    status: str
    reason: str
    rows: tuple[dict[str, Any], ...]
    judge: Judge = BY_LOSS

    @property
    def best(self) -> dict[str, Any] | None:
        """Its best evaluation, as its judge finds it; None when there is none."""
        return self.judge.best_row(self.rows)


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
    return TrialResult(
        status=run.status, reason=run.reason, rows=tuple(recorder.rows), judge=spec.judge
    )


def _refused(spec: TrialSpec, station: "Station", error: GateError) -> TrialResult:
    """The end of a trial whose checkpoint is not what it says."""
    paths = TrialPaths(spec.folder)
    if station.comm.world_rank == 0:
        Recorder.write_failure(paths, error, 0, 0)
    rows = tuple(read_json_lines(paths.metrics))
    return TrialResult(status="failed", reason=str(error), rows=rows)


def recorded_rows(spec: TrialSpec) -> list[dict[str, Any]]:
    """The trained rows of a trial's earlier attempt, up to its checkpoint; none where that is damaged, of which
    `train_trial` says what there is to say."""
    paths = TrialPaths(spec.folder)
    _fetch(paths)
    try:
        checkpoint = find_checkpoint(paths.checkpoint)
    except DamagedError:
        return []
    return [row for row in checkpoint.rows if row["steps"] > 0] if checkpoint else []


def _fetch(paths: TrialPaths) -> None:
    """Brings here what a run on an object store has of a trial: another machine may have had it."""
    for path in (paths.metrics, paths.notes):
        fetch(path)
    fetch_checkpoint(paths.checkpoint)


def adapter_of(candidate: Candidate, shape: ModelShape) -> AdapterSpec:
    """The adapter that a candidate asks for on a base of a shape."""
    return AdapterSpec(
        lora_rank=candidate.lora_rank,
        lora_alpha=candidate.lora_alpha,
        linears=tuple(shape.resolve_target(candidate.target)),
        dropout=candidate.dropout,
        seed=candidate.seed,
        variant=candidate.variant,
    )


class Station:
    """A loaded base with its data: what trials that share them train on, alone or in a pack."""

    def __init__(self, spec: TrialSpec, comm: Comm, model: PreTrainedModel | None = None) -> None:
        if not torch.cuda.is_available():
            torch.set_num_threads(spec.num_threads)
            keep_freed_memory()
        self.comm, self.base, self.data_spec = comm, spec.base, spec.data
        self.full_finetune, self.rl = spec.candidate.full_finetune, spec.rl
        self.task = spec.task
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
        tokenizer = load_tokenizer(spec.data.model, revision=spec.data.revision)
        retention = retention_set(spec.data)

        def source(rows: "TokenizedSet | PackedSet") -> RowSource:
            return RowSource(rows, tokenizer.pad_id, self.model.device)

        rows = source(self.data.train), source(self.data.eval)
        others: dict[str, Any] = {
            "limits": ForwardLimits(
                max_tokens=spec.max_tokens, micro_batch_size=spec.micro_batch_size
            ),
            "comm": self.comm,
            "retention": source(retention.rows) if retention else None,
        }
        if spec.rl is None:
            task = None
            if spec.task is not None:
                task = make_task_metric(self.pack, rows[1], spec.task, tokenizer, self.comm)
            return Trainer(self.pack, *rows, **others, task=task)
        return make_rl_trainer(self.pack, *rows, spec.rl, tokenizer, self.weights, **others)

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

    def coverage(self, candidate: Candidate) -> dict[str, Any]:
        """The matrices that a candidate adapts, counted in the loaded model.

        Raises:
            ValueError: not those of the plan, to the parameter, or layers that PEFT cannot be told of.
        """
        if candidate.full_finetune:
            return {}
        sizes = matching_layers(self.model, self.shape.resolve_target(candidate.target))
        rank = stored_rank(candidate.lora_rank, candidate.variant)
        live = sum(size.num_params(rank) for size in sizes.values())
        if DORA in parts_of(candidate.variant):
            live += sum(size.num_out for size in sizes.values())
        self._require_planned(candidate, live)
        self._require_expressible(adapter_of(candidate, self.shape))
        return {"adapter": {"layers": len(sizes), "lora_rank": candidate.lora_rank, "params": live}}

    def _require_expressible(self, adapter: AdapterSpec) -> None:
        require_expressible(self.model, adapter, lora_config(self.model, adapter, "", None))

    def _require_planned(self, candidate: Candidate, num_params: int) -> None:
        planned = self.shape.held_params(candidate.lora_rank, candidate.target, candidate.variant)
        if num_params != planned:
            raise ValueError(
                f"target {'+'.join(candidate.target)}: an adapter of rank {candidate.lora_rank} must have "
                f"{planned:,} parameters as planned, has {num_params:,} in the loaded model"
            )

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
        asked = spec.base, spec.data, spec.rl, spec.task
        shared = asked == (self.base, self.data_spec, self.rl, self.task)
        return shared and not spec.candidate.full_finetune and not self.full_finetune

    def enter(self, spec: TrialSpec, report: Report) -> tuple[Run, "Recorder"]:
        """Puts a trial's adapter into the pack, as it was at its last checkpoint.

        Raises:
            ValueError: a target that the model does not have; a GateError for a checkpoint that is not
                whole, of another trial or of another base; a NoRoomError.
        """
        torch.manual_seed(spec.candidate.seed)
        slot = 0 if self.full_finetune else self._entered(spec.candidate)
        run = new_run(self.pack, slot, run_spec(spec))
        paths = TrialPaths(spec.folder)
        try:
            if not self.full_finetune:
                views = run.slot.parameters.values()
                self._require_planned(spec.candidate, sum(view.numel() for view in views))
                self._require_expressible(adapter_of(spec.candidate, self.shape))
            _fetch(paths)
            if checkpoint := load_checkpoint(run, paths.checkpoint):
                self.probe.check_reloaded(run, checkpoint.probe_loss, checkpoint.folder)
        except ValueError:
            self.leave(run)
            raise
        if run.examples >= spec.num_examples and not run.is_due:
            run.status = "finished"
        return run, Recorder(spec, self.probe, paths, report, checkpoint)

    def stand_in(self, candidate: Candidate, spec: RunSpec) -> Run:
        """A run that has a candidate's shape, and learns nothing (see replay.py)."""
        slot = 0 if self.full_finetune else self._entered(candidate)
        return new_run(self.pack, slot, spec)

    def _entered(self, candidate: Candidate) -> int:
        """The slot of a new adapter, on all workers or on none."""
        slots: list[int] = []
        adapter = adapter_of(candidate, self.shape)
        shortage = shortage_in(lambda: slots.append(self.pack.enter(adapter)))
        (found,) = shared([shortage], self.comm, self.model.device)
        for slot in slots:
            if found is None:
                return slot
            self.pack.leave(slot)
        assert found is not None
        rank = candidate.lora_rank
        params = self.shape.held_params(rank, candidate.target, candidate.variant)
        raise NoRoomError(
            f"out of memory for an adapter of rank {rank} beside {len(self.pack.slots)} others "
            f"({16 * params:,} bytes with gradients and moments in fp32): {found.text or 'on another worker'}"
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
