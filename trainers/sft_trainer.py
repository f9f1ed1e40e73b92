"""One trial of supervised fine-tuning, from base and data to checkpoints and metrics.

The doctrine's own snippet imports from here: `count_tokens` and `validate_capacity`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from search_spaces.candidate import Candidate
from search_spaces.capacity import validate_capacity
from trainers.adapters import AdapterSpec, Pack, inject
from trainers.base_model import BaseSpec, load_base
from trainers.batches import RowSource
from trainers.checkpoint import copy_weights, load_checkpoint, save_checkpoint
from trainers.comm import Comm
from trainers.composer import ForwardLimits
from trainers.data import DataSpec, PreparedData, count_tokens, prepare_data
from trainers.full import unfreeze
from trainers.loop import Evaluation, Run, RunSpec, Trainer, new_run
from trainers.meta_shape import shape_of_config
from trainers.metrics import best_row
from trainers.paths import TrialPaths, read_json_lines, write_json, write_json_lines
from trainers.tokenizer import load_tokenizer

__all__ = ["TrialResult", "TrialSpec", "count_tokens", "train_trial", "validate_capacity"]


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """Everything that determines a trial's numbers, and where they go.

    Args:
        name: folder name under runs/NAME/trials.
        folder: the trial's folder.
        num_examples, eval_every: in examples.
        micro_batch_size: rows of one forward on one worker.
        num_threads: torch threads of a CPU worker; part of what makes two runs identical.
    """

    name: str
    folder: Path
    base: BaseSpec
    data: DataSpec
    candidate: Candidate
    num_examples: int
    eval_every: int
    micro_batch_size: int
    num_threads: int = 1

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
    if not torch.cuda.is_available():
        torch.set_num_threads(spec.num_threads)
    torch.manual_seed(spec.candidate.seed)
    data = prepare_data(spec.data)
    pack, device = _build_pack(spec)
    comm = Comm()
    trainer = _trainer(pack, data, spec, device, comm)
    run = new_run(pack, 0, run_spec(spec))
    paths = TrialPaths(spec.folder)
    load_checkpoint(run, paths.checkpoint)
    recorder = _Recorder(
        spec, pack, paths, report, writes=comm.world_rank == 0, examples=run.examples
    )
    if run.examples >= spec.num_examples:
        run.status = "finished"
    trainer.run([run], recorder)
    recorder.finish(run)
    return TrialResult(status=run.status, reason=run.reason, rows=tuple(recorder.rows))


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
    )


def _build_pack(spec: TrialSpec) -> tuple[Pack, torch.device]:
    model = load_base(spec.base)
    if spec.candidate.full_finetune:
        return unfreeze(model), model.device
    shape = shape_of_config(model.config)
    adapter = AdapterSpec(
        lora_rank=spec.candidate.lora_rank,
        lora_alpha=spec.candidate.lora_alpha,
        linears=tuple(shape.resolve_target(spec.candidate.target)),
        dropout=spec.candidate.dropout,
        seed=spec.candidate.seed,
    )
    return inject(model, [adapter]), model.device


def _trainer(
    pack: Pack, data: PreparedData, spec: TrialSpec, device: torch.device, comm: Comm
) -> Trainer:
    pad_id = load_tokenizer(spec.data.model, revision=spec.data.revision).pad_id
    return Trainer(
        pack,
        RowSource(data.train, pad_id, device),
        RowSource(data.eval, pad_id, device),
        limits=ForwardLimits(max_tokens=1 << 11, micro_batch_size=spec.micro_batch_size),
        comm=comm,
    )


class _Recorder:
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

    def __call__(self, run: Run, evaluation: Evaluation) -> bool:
        row = asdict(evaluation)
        # A worker that died right after its first checkpoint evaluates the base once more.
        self.rows = [*(old for old in self.rows if old["examples"] < row["examples"]), row]
        if self.writes:
            self._write(run, row)
        return self.report(row)

    def _write(self, run: Run, row: dict[str, Any]) -> None:
        save_checkpoint(
            self.pack,
            run,
            self.paths.checkpoint,
            base_name=self.spec.base.model,
            revision=self.spec.base.revision,
        )
        if best_row(self.rows) is row:
            copy_weights(self.paths.checkpoint, self.paths.best)
        write_json_lines(self.paths.metrics, self.rows)

    def finish(self, run: Run) -> None:
        if self.writes:
            status = {
                "status": run.status,
                "reason": run.reason,
                "examples": run.examples,
                "steps": run.steps,
            }
            write_json(self.paths.status, status)
