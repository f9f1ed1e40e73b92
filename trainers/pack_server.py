"""A warm worker: loads the base once, then trains whatever trials it is given until it is told to stop.

Trials enter and leave the running pack; the messages come over a `Link`, so that this file knows
nothing of Ray. World rank 0 talks, the other workers of its group follow the same commands.

Commands (dicts, by "kind"):
    enter {trial, index}   train this trial; its evaluation number `index` (trained ones, from 0) is asked for
    allow {trial, index}   the evaluation `index` of a running trial is asked for
    cancel {trial}         drop the trial; its files stay as they are
    look                   ask the link whether the node will be taken away (trainers/preemption.py)
    stop                   end
Events:
    row {trial, index, row, last}    an evaluation; it is on disk. last: the trial is finished with it
    end {trial, status, reason}      the trial ended (finished, diverged or failed); status.json says so
    preempted {deadline}             the node will be taken away at that UNIX time: no trial must come any more
    back {trial}                     the trial was saved and let go, in the middle of a rung or not
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from trainers.comm import Comm
from trainers.credentials import masked
from trainers.integrity import GateError
from trainers.mirror import forget
from trainers.paths import TrialPaths
from trainers.preemption import Notice
from trainers.recorder import Recorder
from trainers.replay import Memory, Replay
from trainers.runs import Run
from trainers.sft_trainer import Station, TrialSpec


class Link(Protocol):
    """What a server hears and says."""

    def commands(self, *, idle: bool) -> list[dict[str, Any]]:
        """What was asked since the last call; waits a little where the server has nothing to do."""
        ...

    def tell(self, event: dict[str, Any]) -> None:
        """Sends an event; need not wait."""
        ...

    def deadline(self) -> float | None:
        """When the group's node will be taken away (UNIX time); None: nobody said so. Called on every
        worker at once."""
        ...


@dataclass(eq=False)
class Member:
    """A trial in the pack."""

    spec: TrialSpec
    run: Run
    recorder: Recorder
    allowed: int

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def next_index(self) -> int:
        """Number of the evaluation that comes next."""
        return self.recorder.num_trained_rows


class PackServer:
    """Serves trials on the workers of one group.

    Args:
        station: makes the station for a pack key; tests give their own.
    """

    def __init__(
        self, link: Link, comm: Comm, make_station: Callable[[TrialSpec, Comm], Station]
    ) -> None:
        self.link, self.comm, self.make_station = link, comm, make_station
        self.station: Station | None = None
        self.members: dict[str, Member] = {}
        self.notice: Notice | None = None
        self.memory: Memory | None = None
        """Set where forwards are to be done again after a death."""
        self.replay: Replay | None = None
        self.stands = False
        """Whether what is done again waits for an evaluation to be asked for."""

    def serve(self) -> None:
        """Runs until the command `stop`."""
        while True:
            active = [m.run for m in self.members.values() if m.run.status == "running"]
            for command in self.comm.share(self._heard(idle=not active or self.stands)):
                if command["kind"] == "stop":
                    return
                self._obey(command)
            self._advance()
            self._heed()

    def _heard(self, *, idle: bool) -> list[dict[str, Any]]:
        return self.link.commands(idle=idle) if self.comm.world_rank == 0 else []

    def _tell(self, event: dict[str, Any]) -> None:
        if self.comm.world_rank == 0:
            self.link.tell(event)

    def _obey(self, command: dict[str, Any]) -> None:
        if command["kind"] == "enter":
            self._enter(command["trial"], command["index"])
        elif command["kind"] == "look":
            self._look()
        elif (member := self.members.get(command["trial"])) is None:
            return  # it ended while the command was on its way
        elif command["kind"] == "allow":
            member.allowed = max(member.allowed, command["index"])
            if member.run.status == "waiting" and member.allowed >= member.next_index:
                member.run.status = "running"
                self._evaluate(member)
        else:
            self._leave(member)

    def _enter(self, trial: dict[str, Any], index: int) -> None:
        spec = TrialSpec.from_dict(trial)
        if spec.name in self.members:
            return
        if self.notice is not None:  # it was given before the notice was heard
            self._tell({"kind": "back", "trial": spec.name})
            return
        try:
            station = self._station_for(spec)
            run, recorder = station.enter(spec, lambda row: True)
        except ValueError as error:
            self._fail(spec, error)
            return
        # A newcomer would lead every forward until it had caught up with the others.
        run.rows_done = min((m.run.rows_done for m in self.members.values()), default=0.0)
        member = self.members[spec.name] = Member(spec, run, recorder, index)
        if self.memory is not None:
            self.memory.enter(trial, run)
        for number, row in enumerate(recorder.trained_rows):
            self._tell_row(member, number, row)
        if run.status == "running" and run.examples == 0:
            self._recorded(member)  # the untouched base: nobody asks for it
        elif run.status == "running" and run.is_due:  # it was saved while it waited to be asked
            self._arrive(member)
        self._conclude(member)

    def _station_for(self, spec: TrialSpec) -> Station:
        if self.station is None or not self.station.serves(spec):
            assert not self.members, f"{spec.name} cannot share the pack of {list(self.members)}"
            if self.station is not None:
                self.station.close()
            previous, self.station = self.station, None
            self.station = (
                previous.changed_to(spec) if previous else self.make_station(spec, self.comm)
            )
        return self.station

    def _fail(self, spec: TrialSpec, error: Exception) -> None:
        if self.comm.world_rank == 0:
            Recorder.write_failure(TrialPaths(spec.folder), error, 0, 0)
        forget(spec.folder)
        reason = masked(str(error))
        self._tell({"kind": "end", "trial": spec.name, "status": "failed", "reason": reason})

    def _advance(self) -> None:
        runs = {m.run: m for m in self.members.values() if m.run.status == "running"}
        if not runs:
            return
        for run in self._forward(list(runs)):
            self._arrive(runs[run])
        for member in runs.values():
            self._conclude(member)

    def _forward(self, active: list[Run]) -> list[Run]:
        """The next forward: one that is to be done again, or a new one."""
        assert self.station is not None
        if self.memory is not None:
            self.station.trainer.watch = self.memory
            if not self.memory.has_begun:
                self.replay = self.memory.begin(self.station)
        if self.replay is None:
            return self.station.trainer.advance(active)
        due = self.replay.step({name: member.run for name, member in self.members.items()})
        self.stands = due is None
        if not self.replay.forwards:
            self.replay.end()
            self.replay = None
        return due or []

    def _arrive(self, member: Member) -> None:
        """A run stands at an evaluation."""
        if member.allowed >= member.next_index:
            self._evaluate(member)
        else:
            member.run.status = "waiting"

    def _evaluate(self, member: Member) -> None:
        """Evaluates, writes, and tells; what a scheduler sees is on disk."""
        index = member.next_index
        self._recorded(member)
        if self.memory is not None:
            self.memory.compact({m.name: m.recorder.saved_steps for m in self.members.values()})
        if member.run.status not in ("diverged", "failed"):
            self._tell_row(member, index, member.recorder.rows[-1])
        self._conclude(member)

    def _recorded(self, member: Member) -> None:
        """Evaluates and writes; a save that does not pass the gate fails this member alone."""
        assert self.station is not None
        try:
            self.station.trainer.evaluate(member.run, member.recorder)
        except GateError as error:
            member.recorder.fail(member.run, error)

    def _tell_row(self, member: Member, index: int, row: dict[str, Any]) -> None:
        last = row["examples"] >= member.spec.num_examples
        if last:
            member.recorder.finish(member.run)
        self._tell({"kind": "row", "trial": member.name, "index": index, "row": row, "last": last})

    def _conclude(self, member: Member) -> None:
        """Lets a run go that has ended."""
        run = member.run
        if run.status in ("running", "waiting") or member.name not in self.members:
            return
        member.recorder.finish(run)
        self._leave(member)
        self._tell(
            {"kind": "end", "trial": member.name, "status": run.status, "reason": run.reason}
        )

    def _leave(self, member: Member) -> None:
        assert self.station is not None
        del self.members[member.name]
        if self.memory is not None:
            self.memory.leave(member.run)
        if self.notice is not None:
            self.notice.unsaved.discard(member.name)
        self.station.leave(member.run)
        forget(member.spec.folder)

    def _look(self) -> None:
        if (deadline := self.link.deadline()) is None:
            return
        if self.notice is None:
            self.notice = Notice(deadline, self.members)
            self._tell({"kind": "preempted", "deadline": deadline})
        self.notice.deadline = deadline
        if self.comm.share(self.notice.must_leave()):
            self.notice.leave(self.members)

    def _heed(self) -> None:
        """Saves, and in the end gives back, the members that stand between two global batches."""
        if self.notice is None:
            return
        for member in list(self.members.values()):
            if member.name in self.notice.unsaved and member.run.share is None:
                self._save(member, self.notice)

    def _save(self, member: Member, notice: Notice) -> None:
        try:
            if not notice.is_saved(member.name, member.run.steps):
                member.recorder.save(member.run)
        except GateError as error:
            member.recorder.fail(member.run, error)
        self._conclude(member)
        notice.saved(member.name, member.run.steps)
        if notice.leaving and member.name in self.members:
            self._leave(member)
            self._tell({"kind": "back", "trial": member.name})
