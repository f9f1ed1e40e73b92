"""A pack that died does its logged forwards again: real rows for trials that still have to do them, and, beside them,
rows of the same shape for those that are further on, or gone."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainers.comm import Comm
from trainers.composition import CompositionLog, Forward, Part, Script, Shapes
from trainers.loop import Watch
from trainers.runs import Run
from trainers.trial_spec import TrialSpec, run_spec

if TYPE_CHECKING:
    from trainers.sft_trainer import Station


class Replay:
    """Forwards that are left of a script.

    Args:
        station: whose pack the trials are in.
        script: what is to be done again.
        runs: the trials that came back, by name.
    """

    def __init__(self, station: "Station", script: Script, runs: Mapping[str, Run]) -> None:
        self.station, self.script = station, script
        self.forwards = deque(script.forwards)
        self.ghosts: dict[str, Run] = {}
        for name, run in runs.items():
            run.rows_done = script.done.get(name, run.rows_done)

    def step(self, runs: Mapping[str, Run]) -> list[Run] | None:
        """Does the next forward in which somebody still has rows; gives the runs that stand at an evaluation now.
        None: nothing was done, as a trial waits to be asked for its evaluation."""
        while self.forwards:
            forward = self.forwards[0]
            real = [part for part in forward if _is_real(part, runs.get(part.name))]
            if any(_is_behind(part, runs.get(part.name)) for part in forward):
                break  # rows before these are missing in the log: it leads to no known numbers
            if any(runs[part.name].status == "waiting" for part in real):
                return None
            self.forwards.popleft()
            if real:
                return self._do(forward, runs, {part.name for part in real})
        self.end()
        return []

    def end(self) -> None:
        """Takes the others' rows out of the pack."""
        self.forwards.clear()
        for ghost in self.ghosts.values():
            self.station.leave(ghost)
        self.ghosts.clear()

    def _do(self, forward: Forward, runs: Mapping[str, Run], real: set[str]) -> list[Run]:
        trainer = self.station.trainer
        if forward[0].shapes is not None:
            return self._sample(forward, runs, real)
        parts: list[tuple[Run, np.ndarray]] = []
        for part in forward:
            run = runs[part.name] if part.name in real else self._ghost(part)
            if run.share is None:
                trainer.begin_batches([run])
            assert run.share is not None
            if part.name not in real:
                run.share.take(part.start)
            parts.append((run, run.share.take(part.rows)))
            run.rows_done = part.done + part.rows
        ghosts = {run for run, _ in parts if run in self.ghosts.values()}
        return trainer.forward(parts, ghosts)

    def _sample(self, forward: Forward, runs: Mapping[str, Run], real: set[str]) -> list[Run]:
        """Samples episodes again, beside those of ghosts, whose own are thrown away."""
        chosen: list[Run] = []
        for part in forward:
            if part.name in real:
                runs[part.name].rows_done = part.done
            chosen.append(runs[part.name] if part.name in real else self._ghost(part, poses=False))
        self.station.trainer.begin_batches(chosen)
        return []

    def _ghost(self, part: Part, *, poses: bool = True) -> Run:
        """A stand-in at a trial's step: what it computes has the right shape, and is thrown away."""
        if part.name not in self.ghosts:
            spec = TrialSpec.from_dict(self.script.trials[part.name])
            self.ghosts[part.name] = self.station.stand_in(spec.candidate, run_spec(spec))
        ghost = self.ghosts[part.name]
        ghost.steps, ghost.share = part.step, None
        ghost.examples = part.step * ghost.spec.global_batch_size
        shapes = self.script.shapes.get((part.name, part.step))
        if poses and shapes is not None:
            self.station.trainer.pose(ghost, shapes)
        return ghost


class Memory(Watch):
    """What a pack server keeps of its forwards, and does again when it begins.

    Args:
        log: of the group; world rank 0 writes it.
    """

    def __init__(self, log: CompositionLog, comm: Comm) -> None:
        self.log, self.comm = log, comm
        self.names: dict[Run, str] = {}
        self.returning: dict[str, Run] = {}
        """Trials that entered before the first forward: they may have to do some again."""
        self.trials: dict[str, dict[str, Any]] = {}
        self.has_begun = False

    def enter(self, trial: dict[str, Any], run: Run) -> None:
        """A trial entered the pack."""
        name = trial["name"]
        self.names[run], self.trials[name] = name, trial
        if self.has_begun:
            self._write(lambda: self.log.enter(trial, run.steps))
        else:
            self.returning[name] = run

    def leave(self, run: Run) -> None:
        """A trial left the pack."""
        name = self.names.pop(run)
        self.returning.pop(name, None)
        self.trials.pop(name, None)

    def begin(self, station: "Station") -> Replay | None:
        """What is to be done again, before the first forward of this process."""
        self.has_begun = True
        steps = {name: run.steps for name, run in self.returning.items()}
        is_writer = self.comm.world_rank == 0
        script = self.comm.share(self.log.script(steps) if is_writer else None)
        again = {part.name for forward in script.forwards for part in forward if not part.is_void}
        for name in steps.keys() - again:
            self._write(lambda name=name: self.log.enter(self.trials[name], steps[name]))
        return Replay(station, script, self.returning) if script.forwards else None

    def forward(self, parts: Sequence[tuple[Run, np.ndarray]]) -> None:
        told = [
            Part(self.names[run], run.steps, run.taken, len(rows), run.rows_done - len(rows))
            for run, rows in parts
        ]
        self._write(lambda: self.log.forward(told))

    def sampled(self, parts: Sequence[tuple[Run, Shapes]]) -> None:
        told = [
            Part(self.names[run], run.steps, 0, 0, run.rows_done, shapes=shapes)
            for run, shapes in parts
        ]
        self._write(lambda: self.log.sampled(told))

    def again(self, run: Run) -> None:
        self._write(lambda: self.log.again(self.names[run], run.steps))

    def compact(self, steps: Mapping[str, int]) -> None:
        """See CompositionLog.compact."""
        self._write(lambda: self.log.compact(steps))

    def _write(self, write: Callable[[], None]) -> None:
        if self.comm.world_rank == 0:
            write()


def _is_real(part: Part, run: Run | None) -> bool:
    if run is None or part.is_void or run.status not in ("running", "waiting"):
        return False
    return run.steps == part.step and run.taken == part.start


def _is_behind(part: Part, run: Run | None) -> bool:
    if run is None or part.is_void or run.status not in ("running", "waiting"):
        return False
    return (run.steps, run.taken) < (part.step, part.start)
