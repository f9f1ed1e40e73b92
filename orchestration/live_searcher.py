"""What Ray Tune is given while a sweep runs: the planned trials, and clones between them."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.search import Searcher

from orchestration.rungs import METRIC, MODE
from orchestration.searcher_state import UnsavedSearcher
from search_spaces.candidate import Candidate


class LiveSearcher(UnsavedSearcher):
    """Suggests clones as soon as there is room for them, and beside them what a searcher suggests for the plan. It
    has not finished as long as a trial runs: another may be cloned of it.

    Planned trials hold places of the workers before Tune has started them (Board.enlist), and give them up only after
    Tune has: so clones must not take the room that Tune has for those.

    Args:
        planned: ListSearcher or OptunaSearcher.
        common: what all trials get beside their dict.
        clones: those of an earlier attempt that have no end.
        most: planned trials at once.
        beside: clones at once, while the plan has more; 0: clones take the room of planned trials.
        put_ahead: is told of each new clone before Tune is.
        look: is called before the end, when a command can be obeyed for the last time.
    """

    def __init__(
        self,
        planned: Any,
        common: dict[str, Any],
        *,
        clones: Sequence[dict[str, Any]],
        most: int,
        beside: int,
        put_ahead: Callable[[dict[str, Any]], None],
        look: Callable[[], None],
    ) -> None:
        super().__init__(metric=METRIC, mode=MODE)
        self._planned, self._common = planned, common
        self._clones = deque((clone, True) for clone in clones)
        self._most, self._beside = most, beside
        self._put_ahead, self._look = put_ahead, look
        self._open: dict[str, bool] = {}
        """Tune's id of each trial that runs -> whether it is a clone."""
        self._has_finished = False

    def add(self, clone: dict[str, Any]) -> None:
        """Takes up a new clone."""
        self._clones.append((clone, False))
        self._planned.avoid(Candidate.from_dict(clone["candidate"]))

    def drop(self, name: str) -> bool:
        """Leaves out a trial that Tune was not given yet; False: it was."""
        kept = [item for item in self._clones if item[0]["name"] != name]
        was_here = len(kept) < len(self._clones)
        self._clones = deque(kept)
        return was_here or self._planned.drop(name)

    def suggest(self, trial_id: str) -> Any:
        if self._clones and self._has_room_for_clone():
            return self._next_clone(trial_id)
        if sum(not is_clone for is_clone in self._open.values()) >= self._most:
            return None
        found = Searcher.FINISHED if self._has_finished else self._planned.suggest(trial_id)
        if found != Searcher.FINISHED:
            if found is not None:
                self._open[trial_id] = False
            return found
        self._has_finished = True
        if not self._open and not self._clones:
            self._look()
        if self._clones and self._has_room_for_clone():
            return self._next_clone(trial_id)
        return None if self._open or self._clones else Searcher.FINISHED

    def _has_room_for_clone(self) -> bool:
        if self._has_finished or not self._beside:
            return len(self._open) < self._most + self._beside
        return sum(self._open.values()) < self._beside

    def _next_clone(self, trial_id: str) -> dict[str, Any]:
        clone, is_known = self._clones.popleft()
        if not is_known:
            self._put_ahead(clone)
        self._open[trial_id] = True
        return {"trial": clone, **self._common}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self._open.get(trial_id) is False:
            self._planned.on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if self._open.pop(trial_id, True) is False:
            self._planned.on_trial_complete(trial_id, result, error)

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its searcher; what is told and asked holds a pool, a plan and paths.
        return {}
