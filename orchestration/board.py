"""Who waits for what: the bookkeeping between thin trials and warm worker groups. Pure, no Ray.

A trial asks for its evaluations one by one (number 0 is the first after training began). A group has a
number of places; a free place gets the trial that waits longest. A trial trains on while its last
result is being judged, but is evaluated again only when that is asked for, so it is never more than
one rung ahead of its scheduler.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from orchestration.entries import Entry, Group
from orchestration.rungs import BY_SCHEDULER
from orchestration.suspects import accuse

MAX_STARTS = 3
"""Starts in a row of a group that never became ready, after which it is given up."""
GROUP_WAIT_S = 600.0
"""How long a group may be without workers before it counts as lost. Clouds replace a node in two to five
minutes."""
DEADLINE_GRACE_S = 10.0
"""After the deadline of a preemption in which its workers may still speak; Ray Train ends them at it."""
STOP = {"kind": "stop"}
"""The command that ends a group's workers."""


class Board:
    """The state of a sweep between its trials and its groups.

    Args:
        num_groups: groups of the sweep; those that said nothing yet are still loading.
        one_run: whether the death of one group's worker restarts all groups (see pool.Pool).
        wait_s: see GROUP_WAIT_S.
    """

    def __init__(
        self, num_groups: int, *, one_run: bool = False, wait_s: float = GROUP_WAIT_S
    ) -> None:
        self.num_groups, self.one_run, self.wait_s = num_groups, one_run, wait_s
        self.places = 0
        self.entries: dict[str, Entry] = {}
        self.queue: list[Entry] = []
        self.groups: dict[str, Group] = {}
        self.starts: dict[str, int] = {}
        self.attempts: dict[str, str] = {}
        self.absent: dict[str, float] = {}
        """Groups without workers, and since when (UNIX time; of a leaving group, from when on)."""
        self.stopping = False
        self.cohorts = itertools.count(1)

    def enlist(
        self,
        trials: Iterable[tuple[dict[str, Any], int]],
        homes: Mapping[str, str] | None = None,
    ) -> None:
        """Puts trials into the queue in the order in which Tune will start them, each with the evaluation
        that it will ask for first. They train before their thin trials live, and in the plan's order:
        those would ask in the order in which their processes happen to start.

        Args:
            homes: trial -> its group under an earlier driver.
        """
        for trial, index in trials:
            name = trial["name"]
            if name not in self.entries:
                home = (homes or {}).get(name)
                entry = self.entries[name] = Entry(trial, index, home=home)
                self.queue.append(entry)
        self._assign()

    def put_ahead(self, trial: dict[str, Any]) -> None:
        """Puts a new trial before those that wait by the plan, behind those that were put there before it."""
        entry = self.entries[trial["name"]] = Entry(trial, 0, ahead=True)
        first = itertools.takewhile(lambda e: e.ahead or e.blame.cohort, self.queue)
        self.queue.insert(len(list(first)), entry)
        self._assign()

    # What trials say

    def ask(self, trial: dict[str, Any], index: int) -> None:
        """A trial wants its evaluation number `index`; asking again changes nothing."""
        self.enlist([(trial, index)])
        entry = self.entries[trial["name"]]
        if entry.ended is None and entry.group is None and entry not in self.queue:
            self.queue.append(entry)  # it was put off
        if index > entry.asked:
            entry.asked = index
            if entry.group is not None:
                command = {"kind": "allow", "trial": entry.name, "index": index}
                self.groups[entry.group].commands.append(command)
        self._assign()

    def answer(self, name: str, index: int) -> dict[str, Any] | None:
        """The row that was asked for ({"row", "last"}), or how the trial ended without it ({"ended",
        "row": its last one or None}); None: not yet.

        Raises:
            ValueError: no group is left that could give it.
        """
        entry = self.entries[name]
        if index in entry.rows:
            return {"row": entry.rows[index], "last": index == entry.last_index}
        if entry.ended is not None:
            last = entry.rows[max(entry.rows)] if entry.rows else None
            return {"ended": entry.ended, "row": last}
        reasons = [group.lost for group in self.groups.values() if group.lost]
        if len(reasons) == self.num_groups:
            raise ValueError(f"no worker group is left: {'; '.join(sorted(set(reasons)))}")
        return None

    def cancel(self, name: str, reason: str = BY_SCHEDULER) -> None:
        """A trial was ended from outside; its place is free at once."""
        entry = self.entries.get(name)
        if entry is not None and entry.ended is None:
            entry.ended = {"status": "stopped", "reason": reason}
            self._withdraw(entry)

    def put_off(self, name: str) -> None:
        """A trial has nobody who will ask for its next evaluation: it would hold its place for ever. It
        gives the place up, keeps its files, and waits for nothing until it is asked for again."""
        entry = self.entries.get(name)
        if entry is not None and entry.ended is None:
            self._withdraw(entry)

    # What groups say

    def begin(self, group: str, attempt: str) -> bool:
        """A group's workers start, and will load the base; False: they died of it too often, or the sweep ends.
        Those of an earlier attempt are dead: their trials need not wait for the base where others have room.

        Args:
            attempt: names the start of the Train run. The groups of one run start together, but say so in
                any order, and some die before they say it.
        """
        self.attempts[group] = attempt
        self.absent.pop(group, None)
        if group in self.groups and self.groups[group].lost:  # its node came back after all
            self.groups[group] = Group("", {})
        for name in reversed(self.groups) if self.one_run else [group]:
            self._bury(name, attempt)
        self._assign()
        if self.stopping:  # nobody waits for its base any more
            return False
        self.starts[group] = self.starts.get(group, 0) + 1
        if self.starts[group] > MAX_STARTS:
            self.lose(group, f"its workers died {MAX_STARTS} times while they loaded the base")
            return False
        return True

    def _bury(self, name: str, attempt: str) -> None:
        group = self.groups.get(name)
        if group and group.incarnation and group.attempt != attempt:
            self._replace(name, Group("", group.info))

    def hello(self, group: str, incarnation: str, info: dict[str, Any]) -> None:
        """A group is ready, at first or again after a death."""
        self.starts[group] = 0
        self._replace(group, Group(incarnation, info, self.attempts[group]))
        self._assign()

    def lose(self, group: str, reason: str) -> None:
        """A group will not come back; its trials go to others. The first reason is kept."""
        if group in self.groups and self.groups[group].lost:
            return
        self.absent.pop(group, None)
        self._replace(group, Group("", {}, lost=reason))
        self._assign()

    def gone(
        self,
        name: str,
        now: float,
        *,
        preempted: bool = False,
        deaths: Mapping[str, str] | None = None,
    ) -> None:
        """A group has no workers (yet, or any more); its trials need not wait until it has.

        Args:
            now: UNIX time.
            preempted: it lost them because its node was taken away.
            deaths: groups whose own workers died, and of what; others of the same run were ended with them.
                None: nobody knows.
        """
        self.absent[name] = min(now, self.absent.get(name, now))
        group = self.groups.get(name)
        if group and group.incarnation:
            is_innocent = preempted or (deaths is not None and name not in deaths)
            group.leaving |= is_innocent
            self._replace(name, Group("", group.info), (deaths or {}).get(name, ""))
            self._assign()

    def expire(self, now: float) -> None:
        """Gives up the groups that were without workers too long."""
        for name, since in list(self.absent.items()):
            if now > since + DEADLINE_GRACE_S:
                self.gone(name, since)
            if now > since + self.wait_s:
                self.lose(
                    name,
                    f"it was without workers for {self.wait_s:g} s (no node has room for them, or they "
                    "do not start)",
                )
                self.absent[name] = since  # Ray Train still waits for a node

    def _replace(self, name: str, group: Group, how: str = "") -> None:
        old = self.groups.get(name)
        self.groups[name] = group
        if old is None:
            return
        if not old.leaving:
            accuse([entry.blame for entry in old.trials], how, self.cohorts)
        for entry in reversed(old.trials):
            entry.group = None
            if entry.blame.is_guilty:
                entry.ended = {"status": "failed", "reason": entry.blame.reason}
            else:
                self.queue.insert(0, entry)

    def is_current(self, group: str, incarnation: str) -> bool:
        """Whether a group's message is from its living workers."""
        return group in self.groups and self.groups[group].incarnation == incarnation

    def without_workers(self) -> list[str]:
        """Groups for whose workers Ray Train waits."""
        served = {name for name, group in self.groups.items() if group.incarnation}
        return sorted(self.absent.keys() - served)

    def hear_from(self, group: str, number: int, event: dict[str, Any]) -> None:
        """Event `number` of a group's workers, counted from 0. Events may overtake each other on their way,
        and a trial's end must not be heard before its last row: what came early waits."""
        speaker = self.groups[group]
        speaker.early[number] = event
        while event := speaker.early.pop(speaker.num_heard, {}):
            speaker.num_heard += 1
            if event["kind"] == "preempted":
                speaker.leaving, self.absent[group] = True, event["deadline"]
            else:
                self.hear([event])

    def hear(self, events: Iterable[dict[str, Any]]) -> None:
        """Rows, ends and trials given back by a group (see trainers/pack_server.py)."""
        for event in events:
            entry = self.entries[event["trial"]]
            if event["kind"] == "row":
                if event["index"] not in entry.rows:
                    entry.blame.clear()
                entry.rows[event["index"]] = event["row"]
                if event["last"]:
                    entry.last_index = event["index"]
            elif event["kind"] == "back":
                self._take_back(entry)
            elif entry.ended is None:
                entry.ended = {"status": event["status"], "reason": event["reason"]}
                self._release(entry)
        self._assign()

    def take_commands(self, group: str) -> list[dict[str, Any]]:
        """What a group must hear; it is told once."""
        taken, self.groups[group].commands = self.groups[group].commands, []
        return [*taken, STOP] if self.stopping else taken

    # Places

    def packs(self) -> dict[str, list[str]]:
        """Group that is ready -> the trials that it holds, in the order in which they came."""
        ready = {name: group for name, group in self.groups.items() if group.incarnation}
        return {name: [entry.name for entry in group.trials] for name, group in ready.items()}

    def open(self, places: int) -> None:
        """Lets every group hold up to so many trials."""
        self.places = places
        self._assign()

    def _withdraw(self, entry: Entry) -> None:
        if entry.group is not None:
            self.groups[entry.group].commands.append({"kind": "cancel", "trial": entry.name})
        self._release(entry)

    def _release(self, entry: Entry) -> None:
        if entry in self.queue:
            self.queue.remove(entry)
        if entry.group is not None:
            self.groups[entry.group].trials.remove(entry)
            entry.group = None
        self._assign()

    def _take_back(self, entry: Entry) -> None:
        if entry.group is None:
            return  # it was ended or put off while it was on its way
        self._release(entry)
        self.queue.insert(0, entry)

    def _assign(self) -> None:
        self._make_room()
        for entry in list(self.queue):
            rooms = [
                (len(g.trials), name) for name, g in self.groups.items() if self._fits(entry, g)
            ]
            if self.one_run and self._comes_back(entry.home):
                continue
            if rooms:
                at_home = any(name == entry.home for _, name in rooms)
                self._give(entry, str(entry.home) if at_home else min(rooms)[1])
            elif entry.full or entry.blame.cohort:
                return  # those behind it would keep every group busy for ever

    def _comes_back(self, name: str | None) -> bool:
        """Whether a group will be ready in a moment: one of a run whose groups all start together."""
        group = self.groups.get(name or "")
        if group is None:
            return name in self.absent or name in self.attempts
        return not group.incarnation and not group.lost

    def _make_room(self) -> None:
        """Ends the wait of suspects for a group without others: the one with the fewest trials gives them up.
        They lose what they did since their last evaluation, and a pack gets its places back much sooner."""
        groups = self.groups.values()
        away = len(groups) < self.num_groups or any(
            not g.incarnation and not g.lost for g in groups
        )
        inside = [entry for group in groups for entry in group.trials]
        suspects = list(itertools.takewhile(lambda entry: entry.blame.cohort, self.queue))
        if not suspects or away or any(entry.blame.cohort for entry in inside):
            return
        open_groups = [group for group in groups if group.incarnation and not group.leaving]
        least = min(open_groups, key=lambda group: len(group.trials), default=None)
        if least is None or not self.places:
            return
        for entry in reversed(least.trials):
            least.commands.append({"kind": "cancel", "trial": entry.name})
            entry.group = None
            self.queue.insert(len(suspects), entry)
        least.trials.clear()

    def _fits(self, entry: Entry, group: Group) -> bool:
        if not group.incarnation or group.leaving or not self.places:
            return False
        if not group.trials:
            return True
        if any(one.full for one in (entry, *group.trials)):
            return False
        if any(other.blame.cohort != entry.blame.cohort for other in group.trials):
            return False
        same = group.trials[0].pack_key == entry.pack_key
        return same and len(group.trials) < self.places

    def _give(self, entry: Entry, name: str) -> None:
        self.queue.remove(entry)
        entry.group = entry.home = name
        group = self.groups[name]
        group.trials.append(entry)
        group.commands.append({"kind": "enter", "trial": entry.trial, "index": entry.asked})
