"""The board as a Ray actor: thin trials and worker groups both find it by name."""

import asyncio
import time
from collections import Counter
from typing import Any

from orchestration.board import GROUP_WAIT_S, STOP, Board
from orchestration.rungs import BY_SCHEDULER
from orchestration.silence import HANG_S, Silence


class Broker:
    """An async actor; every waiting trial holds one call, so `max_concurrency` must exceed them.

    Calls that wait do so in slices: a caller that was told nothing asks again. Ray runs the calls of an
    async actor in any order, also those of one caller that does not wait between them.
    """

    def __init__(
        self,
        num_groups: int,
        one_run: bool,
        wait_s: float = GROUP_WAIT_S,
        hang_s: float = HANG_S,
    ) -> None:
        self.board = Board(num_groups, one_run=one_run, wait_s=wait_s)
        self.silence = Silence(hang_s)
        self.controllers: dict[str, Any] = {}
        self.num_hellos: Counter[str] = Counter()
        self.changed = asyncio.Condition()

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def row(self, trial: dict[str, Any], index: int, wait_s: float) -> dict[str, Any] | None:
        """An evaluation of a trial: see Board.answer. None: not yet, ask again.

        Raises:
            ValueError: no worker group is left.
        """
        self.board.ask(trial, index)
        self.board.expire(time.time())
        await self._notify()
        deadline = asyncio.get_running_loop().time() + wait_s
        while (answer := self.board.answer(trial["name"], index)) is None:
            if not await self._changed_before(deadline):
                return None
        return answer

    async def put_ahead(self, trial: dict[str, Any]) -> None:
        """See Board.put_ahead."""
        self.board.put_ahead(trial)
        await self._notify()

    async def cancel(self, name: str, reason: str = BY_SCHEDULER) -> None:
        """See Board.cancel."""
        self.board.cancel(name, reason)
        await self._notify()

    async def put_off(self, name: str) -> None:
        """See Board.put_off."""
        self.board.put_off(name)
        await self._notify()

    async def begin(self, group: str, attempt: str) -> bool:
        """See Board.begin."""
        self.silence.heard(group, time.monotonic())
        may = self.board.begin(group, attempt)
        await self._notify()
        return may

    async def hello(self, group: str, incarnation: str, info: dict[str, Any]) -> None:
        """See Board.hello."""
        self.board.hello(group, incarnation, info)
        self.num_hellos[group] += 1
        self.silence.ready(group, time.monotonic())
        await self._notify()

    async def here(self, group: str, attempt: str, node: str, pid: int) -> None:
        """A worker of a group lives there."""
        self.silence.here(group, attempt, node, pid)

    async def hung(self) -> list[tuple[str, int]]:
        """(node, process) of the workers that must be ended, because their group has been silent too long."""
        return self.silence.hung(time.monotonic())

    async def loading(self) -> list[tuple[str, int]]:
        """(node, process) of the workers that load their base."""
        return self.silence.loading()

    async def num_ready(self, groups: list[str]) -> int:
        """How often workers of these groups were ready, over all their starts."""
        return sum(self.num_hellos[name] for name in groups)

    async def lose(self, group: str, reason: str) -> None:
        """See Board.lose."""
        self.board.lose(group, reason)
        await self._notify()

    async def gone(
        self,
        groups: list[str],
        preempted: bool = False,
        controller: Any = None,
        deaths: dict[str, str] | None = None,
    ) -> None:
        """See Board.gone. controller: the actor that waits for room for their next workers."""
        for name in groups:
            told = self.silence.gone(name)
            known = deaths if not told or deaths is None else {**deaths, name: told}
            self.board.gone(name, time.time(), preempted=preempted, deaths=known)
            self.controllers[name] = controller
        await self._notify()

    async def waiting(self) -> dict[str, Any]:
        """Groups for whose workers Ray Train waits, with its controllers where they are known."""
        return {name: self.controllers.get(name) for name in self.board.without_workers()}

    async def tell(self, group: str, incarnation: str, number: int, event: dict[str, Any]) -> None:
        """An event of a group (see Board.hear_from); what dead workers said is dropped."""
        if self.board.is_current(group, incarnation):
            self.silence.heard(group, time.monotonic())
            self.board.hear_from(group, number, event)
            await self._notify()

    async def commands(self, group: str, incarnation: str, wait_s: float) -> list[dict[str, Any]]:
        """What a group must hear; waits until there is something. Workers whose place others have taken
        must end: nobody will tell them anything any more."""
        deadline = asyncio.get_running_loop().time() + wait_s
        if self.board.is_current(group, incarnation):
            self.silence.heard(group, time.monotonic())
        while self.board.is_current(group, incarnation):
            if taken := self.board.take_commands(group):
                return taken
            if not await self._changed_before(deadline):
                return []
        return [STOP]

    async def enlist(
        self, trials: list[tuple[dict[str, Any], int]], homes: dict[str, str] | None = None
    ) -> None:
        """See Board.enlist."""
        self.board.enlist(trials, homes)
        await self._notify()

    async def open(self, places: int) -> None:
        """See Board.open."""
        self.board.open(places)
        await self._notify()

    async def stop(self) -> None:
        """Ends every group."""
        self.board.stopping = True
        await self._notify()

    async def groups(self) -> dict[str, dict[str, Any]]:
        """Every group that said hello: its info, or {"lost": reason}."""
        self.board.expire(time.time())
        return {
            name: {"lost": group.lost} if group.lost else group.info
            for name, group in self.board.groups.items()
        }

    async def packs(self) -> dict[str, list[str]]:
        """See Board.packs."""
        return self.board.packs()

    async def deaths(self) -> dict[str, int]:
        """Worker deaths of each trial that count against it."""
        return {name: entry.blame.deaths for name, entry in self.board.entries.items()}

    async def _changed_before(self, deadline: float) -> bool:
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            return False
        try:
            async with self.changed:
                await asyncio.wait_for(self.changed.wait(), left)
        except TimeoutError:
            return False
        return True
