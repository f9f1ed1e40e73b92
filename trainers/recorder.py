"""What a trial leaves on disk while it trains: its metrics, checkpoints and best weights, and how it ended."""

import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from trainers.checkpoint import save_checkpoint
from trainers.checkpoint_folder import Checkpoint, copy_weights, put_back
from trainers.credentials import masked
from trainers.gate import Probe
from trainers.integrity import GateError, sealed_row, sound_rows
from trainers.loop import Evaluation
from trainers.object_store import StoreError
from trainers.paths import (
    TrialPaths,
    append_text,
    drop_previous,
    remove_folder,
    write_json_lines,
    write_state,
    write_text,
)
from trainers.runs import Run
from trainers.trial_spec import Report, TrialSpec


class Recorder:
    """Writes each evaluation to the trial's folder and reports it. Called on every worker; world rank 0
    writes.

    Args:
        checkpoint: that the run goes on from, on all workers; None: it begins.
    """

    def __init__(
        self,
        spec: TrialSpec,
        probe: Probe,
        paths: TrialPaths,
        report: Report,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.spec, self.probe, self.paths, self.report = spec, probe, paths, report
        self.writes = probe.comm.world_rank == 0
        self.has_ended = False
        # The checkpoint's rows, whatever metrics.jsonl holds: what came after will be written again.
        self.rows = checkpoint.rows if checkpoint else []
        self._together(lambda: self._take_up(checkpoint))

    def _take_up(self, checkpoint: Checkpoint | None) -> None:
        known, damaged = sound_rows(self.paths.metrics)
        for number in damaged:
            self.note(f"{self.paths.metrics}:{number} is damaged, the checkpoint's rows are taken")
        if checkpoint is None:
            if damaged or any(row["steps"] > 0 for row in known):
                self.note("no checkpoint is left; the trial begins again")
            return
        if known != self.rows:
            write_json_lines(self.paths.metrics, self.rows)
        for problem in checkpoint.problems:
            at = checkpoint.state["examples"]
            self.note(f"{problem}; the checkpoint before it is taken, of {at} examples")
        put_back(checkpoint, self.paths.checkpoint)
        best = self.spec.judge.best_row(self.rows)
        at_best = best is not None and best["examples"] == checkpoint.state["examples"]
        if at_best and self.spec.keep_weights:
            copy_weights(self.paths.checkpoint, self.paths.best)  # a worker that died before it did

    def note(self, text: str) -> None:
        """Keeps what went wrong and was mended, for the driver to say."""
        append_text(self.paths.notes, f"{sealed_row({'note': text})}\n")

    def __call__(self, run: Run, evaluation: Evaluation) -> bool:
        """Whether the run goes on.

        Raises:
            GateError: what was saved is not what was trained; on all workers alike.
            OSError, StoreError: the run's storage takes nothing more; on all workers alike.
        """
        row = asdict(evaluation)
        if self.spec.data.retention is None:
            del row["retention_loss"]
        # A worker that died right after its first checkpoint evaluates the base once more.
        self.rows = [*(old for old in self.rows if old["examples"] < row["examples"]), row]
        probe_loss = self.probe.loss(run)

        def write() -> None:
            write_json_lines(self.paths.metrics, self.rows)
            self._checkpoint(run, probe_loss)
            if self.spec.keep_weights and self.spec.judge.best_row(self.rows) is row:
                copy_weights(self.paths.checkpoint, self.paths.best)

        self._together(write)
        return self.report(row)

    def save(self, run: Run) -> None:
        """Writes a checkpoint between two evaluations; the same errors."""
        probe_loss = self.probe.loss(run)
        self._together(lambda: self._checkpoint(run, probe_loss))

    def _together(self, write: Callable[[], None]) -> None:
        """Lets world rank 0 write; what keeps it from it is raised on all workers alike."""
        problem: Exception | None = None
        if self.writes:
            try:
                write()
            except (GateError, OSError, StoreError) as error:
                problem = error
        if problem := self.probe.comm.share(problem):
            raise problem

    def _checkpoint(self, run: Run, probe_loss: float) -> None:
        save_checkpoint(
            self.probe.pack,
            run,
            self.paths.checkpoint,
            base_name=self.spec.base.model,
            revision=self.spec.base.revision,
            probe_loss=probe_loss,
            rows=self.rows,
        )

    @property
    def saved_steps(self) -> int:
        """Steps at the last evaluation: a checkpoint is not older."""
        return self.rows[-1]["steps"] if self.rows else 0

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
        self._together(lambda: self.write_failure(self.paths, error, run.examples, run.steps))

    def finish(self, run: Run) -> None:
        """Writes how the trial ended, once: a trial whose status.json is there is not written to any more."""
        if self.has_ended:
            return
        self.has_ended = True

        def write() -> None:
            self.write_status(self.paths, run.status, run.reason, run.examples, run.steps)
            if self.spec.keep_weights:
                drop_previous(self.paths.checkpoint)
            else:
                remove_folder(self.paths.checkpoint)

        self._together(write)

    @staticmethod
    def write_status(
        paths: TrialPaths, status: str, reason: str, examples: int, steps: int
    ) -> None:
        """status.json of a trial."""
        write_state(
            paths.status,
            {"status": status, "reason": masked(reason), "examples": examples, "steps": steps},
        )

    @classmethod
    def write_failure(cls, paths: TrialPaths, error: Exception, examples: int, steps: int) -> None:
        """error.txt and status.json of a trial that failed."""
        write_text(paths.error, masked("".join(traceback.format_exception(error))))
        cls.write_status(paths, "failed", str(error), examples, steps)
