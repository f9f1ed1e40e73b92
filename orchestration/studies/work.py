"""A study's points on the engines: what Ray Tune is given, one batch after the other."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.search import Searcher

from orchestration.engines import Work
from orchestration.planning import Plan
from orchestration.rungs import METRIC, MODE
from orchestration.searcher_state import UnsavedSearcher
from orchestration.studies.agenda import Agenda
from orchestration.studies.arms import Arm
from orchestration.studies.config import StudyConfig
from orchestration.trials import TrialMaker, settle
from search_spaces.candidate import Candidate
from trainers.mirror import fetch_all_records
from trainers.paths import RunPaths


class StudyWork(Work):
    """What of a study is left to do. The first trial is a LoRA one where there is any: it is with adapters
    that a group measures its forward."""

    def __init__(
        self,
        arms: Sequence[Arm],
        config: StudyConfig,
        sources: Sequence[RunPaths],
        in_turn: bool,
        plan: Plan,
        maker: TrialMaker,
        run: RunPaths,
    ) -> None:
        self.agenda = Agenda(arms, config, run, maker.make, sources=sources, in_turn=in_turn)
        super().__init__(plan, maker, run)

    def look(self) -> None:
        fetch_all_records(self.run.root)
        self.seen = settle(self.run)
        self.clones = {}
        self.agenda.asked.clear()
        self.trials = self.agenda.take()

    def first_trial(self) -> dict[str, Any] | None:
        lora = (t for t in self.trials if not t["candidate"]["full_finetune"])
        if first := next(lora, None):
            return first
        if not self.trials:
            return None
        template = next((a.template for a in self.agenda.arms if not a.full_finetune), None)
        return self.maker.make(template) if template else self.trials[0]

    def control(self, *given: Any, **named: Any) -> None:
        """A study's points are fixed."""

    def searcher(self, common: dict[str, Any]) -> Any:
        return PointSearcher(self.trials, self.agenda.take, common | {"seen": self.seen})


class PointSearcher(UnsavedSearcher):
    """Suggests the trials that are known, then asks for more whenever one has ended.

    Args:
        more: the dicts of further trials; none while others must end first, and at the end.
        common: what all trials get beside their dict.
    """

    def __init__(
        self,
        trials: Sequence[dict[str, Any]],
        more: Callable[[], list[dict[str, Any]]],
        common: dict[str, Any],
    ) -> None:
        super().__init__(metric=METRIC, mode=MODE)
        self._queue, self._more, self._common = deque(trials), more, common
        self._open: set[str] = set()
        self._is_stale = False

    def suggest(self, trial_id: str) -> Any:
        if not self._queue and self._is_stale:
            self._is_stale = False
            self._queue.extend(self._more())
        if self._queue:
            self._open.add(trial_id)
            return {"trial": self._queue.popleft(), **self._common}
        return None if self._open else Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self._open.discard(trial_id)
        self._is_stale = True

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its searcher; what is asked for more holds a plan and paths.
        return {key: value for key, value in vars(self).items() if key != "_more"}


def candidates_of(arms: Sequence[Arm]) -> tuple[Candidate, ...]:
    """The LoRA candidates of all grids: what places and memory of a pack are planned for."""
    return tuple(
        arm.candidate(rate, 0) for arm in arms if not arm.full_finetune for rate in arm.grid
    )
