"""What a group does when it hears that its node will be taken away.

At once it saves every trial at its next step: the node may go sooner than was said. Then it trains on:
there may be no other group with room, and what it trains is not lost, as shortly before the deadline it
saves once more and gives its trials back. It does not end its workers: Ray Train would take an end
for the end of its run, or for a failure; it ends them itself at the deadline and starts the group elsewhere.
"""

import time
from collections.abc import Iterable

LEAVE_MARGIN_S = 5.0
"""Left at the deadline when all is saved and given back: two looks (broker_link.LOOK_S) and a slow disk."""


class Notice:
    """How far a group is with leaving.

    Args:
        deadline: UNIX time at which the node goes.
        members: names of the group's trials.
    """

    def __init__(self, deadline: float, members: Iterable[str]) -> None:
        self.deadline, self.unsaved = deadline, set(members)
        self.saved_steps: dict[str, int] = {}
        self.leaving = False
        self.heard_at = time.time()
        self.save_s = 0.0
        """From the notice to the last member's first save: what the last round will take too."""

    def must_leave(self) -> bool:
        """Whether the last round of saves must begin now."""
        left = self.deadline - time.time()
        return not self.leaving and left < LEAVE_MARGIN_S + 2 * self.save_s

    def leave(self, members: Iterable[str]) -> None:
        """Begins the last round."""
        self.leaving, self.unsaved = True, set(members)

    def is_saved(self, name: str, steps: int) -> bool:
        """Whether a member was saved since the notice as it is now."""
        return self.saved_steps.get(name) == steps

    def saved(self, name: str, steps: int) -> None:
        """A member's turn in this round is over."""
        self.saved_steps[name] = steps
        self.unsaved.discard(name)
        if not self.unsaved and not self.leaving:
            self.save_s = time.time() - self.heard_at
