"""The driver's eyes on a sweep: what Tune decides becomes status.json, progress and tracker rows."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune

from orchestration.mending import sound_record
from orchestration.progress import Progress
from orchestration.results import fetch_records, notes_of, read_trial
from orchestration.rungs import BY_SCHEDULER
from orchestration.tracking import Tracker
from trainers.credentials import masked
from trainers.mirror import send_rest
from trainers.paths import RunPaths, write_text


class Ledger(tune.Callback):
    """Follows the trials. A stop by the scheduler is seen here and nowhere else: Tune ends the trial's
    processes without telling them.

    Args:
        on_end: is told of each trial that ended.
        on_put_off: is told of each trial that never began and will be run later.
        check: called before a trial is tried again or has failed; raises where the sweep as a whole
            cannot go on, so that its trials stay as they are.
        num_notes: notes of each trial that an earlier driver said.
        on_step: called in every turn of Tune's loop, many times a second.
        reasons: trial -> why it is being stopped, where that is not its scheduler's decision.
    """

    def __init__(
        self,
        run: RunPaths,
        progress: Progress,
        trackers: list[Tracker],
        on_end: Callable[[str], None] = lambda name: None,
        on_put_off: Callable[[str], None] = lambda name: None,
        check: Callable[[], None] = lambda: None,
        num_notes: Mapping[str, int] | None = None,
        on_step: Callable[[], None] = lambda: None,
        reasons: Mapping[str, str] | None = None,
    ) -> None:
        self.run, self.progress, self.trackers = run, progress, trackers
        self.on_end, self.on_put_off, self.check = on_end, on_put_off, check
        self.num_notes = dict(num_notes or {})
        self.on_step, self.reasons = on_step, {} if reasons is None else reasons
        self.never_began: list[str] = []
        """Trials that Tune gave up because the actor that they were to reuse had died."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks into tuner.pkl; a terminal and open trackers cannot go there.
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.on_step()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.progress.started(trial_name(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "steps" not in result:
            return  # the one report of a trial that ended without a score; it is there for the scheduler
        self.progress.reported(trial_name(trial), result)
        self._say_notes(trial_name(trial))
        if self.trackers:
            paths = self.run.trial(trial_name(trial))
            fetch_records(paths)
            record = read_trial(paths)
            for tracker in self.trackers:
                tracker.update(record)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # What ended without a scheduler's word says how (orchestration/thin.py).
        reason = self.reasons.get(trial_name(trial), BY_SCHEDULER)
        ended = (trial.last_result or {}).get("ended", {"status": "stopped", "reason": reason})
        self.end(trial_name(trial), ended["status"], ended["reason"], trial)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.check()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.check()
        if trial.num_failures <= trial.max_failures:  # Tune tries again only what was running
            self.never_began.append(trial_name(trial))
            self.on_put_off(trial_name(trial))
            return
        self.end(trial_name(trial), "failed", error_line(trial), trial)

    def end(self, name: str, status: str, reason: str, trial: Any = None) -> None:
        """A trial has ended.

        Args:
            trial: Tune's; None of one that Tune was never given.
        """
        paths = self.run.trial(name)
        self.on_end(name)
        fetch_records(paths)
        record = sound_record(paths, status, reason, self.progress.say)
        if trial is not None and _has_error_file(trial):
            write_text(paths.error, masked(_error_text(trial)))
        self._say_notes(name)
        self.progress.ended(record.name, record.status, record.reason)
        for tracker in self.trackers:
            tracker.finish(record)
        if self.trackers:
            send_rest(self.run.root)

    def _say_notes(self, name: str) -> None:
        notes = notes_of(self.run.trial(name))
        for note in notes[self.num_notes.get(name, 0) :]:
            self.progress.say(f"{name}: {note}")
        self.num_notes[name] = len(notes)


def trial_name(trial: Any) -> str:
    """Our name of a Tune trial."""
    return trial.config["trial"]["name"]


def _has_error_file(trial: Any) -> bool:
    return bool(trial.error_file) and Path(trial.error_file).exists()


def _error_text(trial: Any) -> str:
    return Path(trial.error_file).read_text(encoding="utf-8", errors="replace")


def error_line(trial: Any) -> str:
    """The last line of a failed trial's traceback that names an error."""
    if not _has_error_file(trial):
        return "no error was recorded"
    lines = masked(_error_text(trial)).strip().splitlines()
    telling = [line.strip() for line in lines if "Error" in line and not line.startswith(" ")]
    return (telling[-1] if telling else lines[-1].strip())[:300]
