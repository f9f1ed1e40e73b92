"""Which trial of a pack kills its workers: found by halving. Pure, no Ray.

A worker's death is laid to all trials of its group, as any of them may have caused it. From the second on, those
that have not come to a new evaluation since the first are parted into two halves that never meet again; a
half that dies once more is parted again, and in the end the culprit is alone. A trial that comes to a new
evaluation is cleared, so that deaths which no trial causes (a machine's memory, a node) add up to nothing
however long a sweep runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SHARED_DEATHS = 2
"""Worker deaths that a pack shares before it is parted."""
MAX_DEATHS = 4
"""Worker deaths without a new evaluation after which a trial has failed, LONE_DEATHS of them alone. A node that
was taken away is none: see pool.PREEMPTIONS."""
LONE_DEATHS = 2


@dataclass
class Blame:
    """What is laid to one trial since its last new evaluation.

    Attributes:
        deaths: of workers that trained it.
        alone: of these, with no other trial beside it.
        cohort: trials of different cohorts may not share a group; 0: it is under no suspicion.
        how: what is known of the last death.
    """

    deaths: int = 0
    alone: int = 0
    cohort: int = 0
    how: str = ""

    @property
    def is_guilty(self) -> bool:
        return self.deaths >= MAX_DEATHS and self.alone >= LONE_DEATHS

    @property
    def reason(self) -> str:
        """Why a guilty trial has failed."""
        told = f"; the last time: {self.how}" if self.how else ""
        return f"its worker died {self.deaths} times, at last with no other trial beside it; neighbours went on{told}"

    def clear(self) -> None:
        """It came to a new evaluation."""
        self.deaths = self.alone = self.cohort = 0
        self.how = ""


def accuse(blames: Sequence[Blame], how: str, cohorts: Iterator[int]) -> None:
    """Lays a worker's death to the trials that it trained.

    Args:
        blames: of the group's trials, in their order.
        how: what is known of it.
        cohorts: gives numbers above 0 that no cohort has had.
    """
    for blame in blames:
        blame.deaths += 1
        blame.alone += len(blames) == 1
        blame.how = how
    suspects = [blame for blame in blames if blame.deaths >= SHARED_DEATHS]
    middle = (len(suspects) + 1) // 2
    for half in (suspects[:middle], suspects[middle:]):
        cohort = next(cohorts)
        for blame in half:
            blame.cohort = cohort
