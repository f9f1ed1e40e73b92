"""Groups that have fallen silent: a collective that waits for ever, a stopped process, a dead device. Pure, no Ray.

A group that works speaks to the broker at least every POLL_WAIT_S (broker_link.py) and once after each forward
or evaluation. One that does not is ended, all its workers at once, so that Ray Train starts it again; its
trials go on from their last checkpoints, and the one that causes it is found as one that kills its worker.
"""

from dataclasses import dataclass, field

HANG_S = 1800.0
"""How long a group may be silent, and how long it may load the base before it is ready. No evaluation, and no download
of a base, should take longer; torch's own limit on a collective is the same."""


@dataclass
class _Group:
    attempt: str = ""
    workers: list[tuple[str, int]] = field(default_factory=list)
    heard: float | None = None
    """When it spoke last; None: it has no workers that must speak."""
    is_ready: bool = False
    """Whether its base is loaded."""
    ended: str = ""
    """Why its workers were ended, until their death is known."""


class Silence:
    """Who spoke when.

    Args:
        hang_s: see HANG_S.
    """

    def __init__(self, hang_s: float) -> None:
        self.hang_s = hang_s
        self.groups: dict[str, _Group] = {}

    def here(self, name: str, attempt: str, node: str, pid: int) -> None:
        """A worker of a group's start (one attempt) lives there."""
        group = self.groups.setdefault(name, _Group())
        if group.attempt != attempt:
            group = self.groups[name] = _Group(attempt)
        group.workers.append((node, pid))

    def heard(self, name: str, now: float) -> None:
        """A group spoke."""
        self.groups.setdefault(name, _Group()).heard = now

    def ready(self, name: str, now: float) -> None:
        """A group has loaded its base."""
        self.heard(name, now)
        self.groups[name].is_ready = True

    def loading(self) -> list[tuple[str, int]]:
        """The workers of groups that are not ready."""
        groups = [group for group in self.groups.values() if not group.is_ready]
        return [worker for group in groups for worker in group.workers]

    def gone(self, name: str) -> str:
        """A group has no workers any more; what they were ended for, or nothing."""
        return self.groups.pop(name, _Group()).ended

    def hung(self, now: float) -> list[tuple[str, int]]:
        """The workers of groups that have been silent too long; each group is told of once."""
        found: list[tuple[str, int]] = []
        for group in self.groups.values():
            if group.heard is not None and now > group.heard + self.hang_s:
                group.heard = None
                group.ended = f"it was silent for {self.hang_s:g} s and was ended"
                found += group.workers
        return found
