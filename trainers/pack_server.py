"""A warm worker: loads the base once, then trains whatever trials it is given until it is told to stop.

Trials enter and leave the running pack; the messages come over a `Link`, so that this file knows
nothing of Ray. World rank 0 talks, the other workers of its group follow the same commands.

Commands (dicts, by "kind"):
    enter {trial, index}   train this trial; its evaluation number `index` (trained ones, from 0) is asked for
    allow {trial, index}   the evaluation `index` of a running trial is asked for
    cancel {trial}         drop the trial; its files stay as they are
    stop                   end
Events:
    row {trial, index, row, last}    an evaluation; it is on disk. last: the trial is finished with it
    end {trial, status, reason}      the trial ended (finished, diverged or failed); status.json says so
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from trainers.comm import Comm
from trainers.loop import Evaluation, Run
from trainers.paths import TrialPaths, write_text
from trainers.sft_trainer import Recorder, Station, TrialSpec


class Link(Protocol):
    """What a server hears and says."""

    def commands(self, *, idle: bool) -> list[dict[str, Any]]:
        """What was asked since the last call; waits a little where the server has nothing to do."""
        ...

    def tell(self, event: dict[str, Any]) -> None:
        """Sends an event; need not wait."""
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

    def serve(self) -> None:
        """Runs until the command `stop`."""
        while True:
            active = [m.run for m in self.members.values() if m.run.status == "running"]
            for command in self.comm.share(self._heard(idle=not active)):
                if command["kind"] == "stop":
                    return
                self._obey(command)
            self._advance()

    def _heard(self, *, idle: bool) -> list[dict[str, Any]]:
        return self.link.commands(idle=idle) if self.comm.world_rank == 0 else []

    def _tell(self, event: dict[str, Any]) -> None:
        if self.comm.world_rank == 0:
            self.link.tell(event)

    def _obey(self, command: dict[str, Any]) -> None:
        if command["kind"] == "enter":
            self._enter(TrialSpec.from_dict(command["trial"]), command["index"])
        elif (member := self.members.get(command["trial"])) is None:
            return  # it ended while the command was on its way
        elif command["kind"] == "allow":
            member.allowed = max(member.allowed, command["index"])
            if member.run.status == "waiting" and member.allowed >= member.next_index:
                member.run.status = "running"
                self._evaluate(member)
        else:
            self._leave(member)

    def _enter(self, spec: TrialSpec, index: int) -> None:
        if spec.name in self.members:
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
        for number, row in enumerate(recorder.trained_rows):
            self._tell_row(member, number, row)
        if run.status == "running" and run.examples == 0:
            station.trainer.evaluate(run, recorder)  # the untouched base: nobody asks for it
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
            paths = TrialPaths(spec.folder)
            write_text(paths.error, traceback.format_exc())
            Recorder.write_status(paths, "failed", str(error), 0, 0)
        self._tell({"kind": "end", "trial": spec.name, "status": "failed", "reason": str(error)})

    def _advance(self) -> None:
        runs = {m.run: m for m in self.members.values() if m.run.status == "running"}
        if not runs:
            return
        assert self.station is not None
        for run in self.station.trainer.advance(list(runs)):
            member = runs[run]
            if member.allowed >= member.next_index:
                self._evaluate(member)
            else:
                run.status = "waiting"
        for member in runs.values():
            self._conclude(member)

    def _evaluate(self, member: Member) -> None:
        """Evaluates, writes, and tells; what a scheduler sees is on disk."""
        assert self.station is not None

        def record(run: Run, evaluation: Evaluation) -> bool:
            member.recorder(run, evaluation)
            return True

        index = member.next_index
        self.station.trainer.evaluate(member.run, record)
        if member.run.status != "diverged":
            self._tell_row(member, index, member.recorder.rows[-1])
        self._conclude(member)

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
        self.station.leave(member.run)
