"""What the next forward of a pack holds: whose turn it is, how many rows, who else fits beside them.

A forward holds up to a number of tokens: so many that the machine is busy, so few that what they leave
for the backward pass stays in cache (CPU) or in memory (GPU). One adapter with enough rows fills it
alone, without padding to its neighbours and with its matrices read once; small batches of many adapters
fill it together. Pure: numbers in, decision out, the same on every worker.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from trainers.batches import Share


@dataclass(frozen=True, kw_only=True)
class ForwardLimits:
    """How much one forward of a worker holds.

    Args:
        max_tokens: over all adapters, padding included; a single row may be longer.
        micro_batch_size: most rows of one adapter; None: as many as max_tokens allows.
    """

    max_tokens: int
    micro_batch_size: int | None = None

    def rows(self, width: int) -> int:
        """Most rows of a width (in tokens) of one adapter."""
        rows = max(1, self.max_tokens // max(1, width))
        return min(rows, self.micro_batch_size or rows)


class Member(Protocol):
    """What the composer must know of a run."""

    share: Share | None
    rows_done: float


M = TypeVar("M", bound=Member)


def next_forward(members: Sequence[M], limits: ForwardLimits) -> list[tuple[M, np.ndarray]]:
    """Takes the rows of the next forward from the members' shares.

    The member that got least so far leads: it gives an even part of what it has left. Others follow
    in the same order with up to as many rows, while they fit without widening the batch much.
    """
    order = sorted(members, key=lambda member: member.rows_done)
    lead = _share(order[0])
    width = lead.width
    height = even_part(len(lead), limits.rows(width))
    chosen = [order[0]]
    for member in order[1:]:
        share = _share(member)
        wide = max(width, share.width)
        if (len(chosen) + 1) * height * wide <= limits.max_tokens and 2 * len(share) > height:
            chosen.append(member)
            width = wide
    taken = []
    for member in chosen:
        member.rows_done += min(height, len(_share(member)))
        taken.append((member, _share(member).take(height)))
    return taken


def even_part(count: int, most: int) -> int:
    """Size of the parts when a count is cut into as few nearly equal parts of at most `most`."""
    return -(-count // -(-count // most))


def _share(member: Member) -> Share:
    assert member.share is not None
    return member.share
