"""What a trial leaves on disk while it trains: its metrics, checkpoints and best weights, and how it ended."""

import traceback
from dataclasses import asdict
from typing import Any

from trainers.checkpoint import checkpoint_examples, copy_weights, save_checkpoint
from trainers.gate import GateError, Probe
from trainers.loop import Evaluation, Run
from trainers.metrics import best_row
from trainers.paths import (
    TrialPaths,
    read_json_lines,
    remove_folder,
    write_json,
    write_json_lines,
    write_text,
)
from trainers.trial_spec import Report, TrialSpec


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
