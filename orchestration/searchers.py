"""Ray Tune searchers: a list in its order, and Optuna's TPE over what capacity admitted."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from orchestration.rungs import CLOCK, METRIC, MODE
from orchestration.searcher_state import UnsavedSearcher
from search_spaces.candidate import Candidate, grid_candidates, make_candidate
from search_spaces.domains import Choice, LogUniform, SearchSpace, TargetDomain
from search_spaces.variants import RankMultiple, alpha_at
from trainers.metrics import DIVERGED_LOSS

MAX_REPEATS = 20
"""Proposals in a row that may be known already, before the grid is asked for what is left."""

logger = logging.getLogger(__name__)


class ListSearcher(UnsavedSearcher):
    """Suggests {"trial": a trial's dict, **common} for each trial of a list, in its order, once.

    Args:
        trials: see `run.trial_dict`.
        common: what all trials get beside their dict.
    """

    def __init__(self, trials: list[dict[str, Any]], common: dict[str, Any]) -> None:
        super().__init__()
        self._trials = list(trials)
        self._common = common
        self._num_suggested = 0

    def suggest(self, trial_id: str) -> Any:
        if self._num_suggested == len(self._trials):
            return Searcher.FINISHED
        trial = self._trials[self._num_suggested]
        self._num_suggested += 1
        return {"trial": trial, **self._common}

    def drop(self, name: str) -> bool:
        """Leaves out a trial that was not suggested yet; False: it was, or is none of these."""
        waiting = self._trials[self._num_suggested :]
        kept = [trial for trial in waiting if trial["name"] != name]
        self._trials[self._num_suggested :] = kept
        return len(kept) < len(waiting)

    def avoid(self, candidate: Candidate) -> None:
        """A list proposes nothing."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass


@dataclass
class _Asked:
    """A trial that Optuna knows: under which id, and how far it was told."""

    inner_id: str
    examples: int = -1


class OptunaSearcher(UnsavedSearcher):
    """Ray's OptunaSearch over the admitted space. A discarded candidate cannot be proposed.

    The first proposal is the doctrine's centre, the first admitted candidate of the grid. A trial's
    score is the last eval_loss that it reported. One that failed or diverged is told as pruned: TPE
    ranks it behind all that have a score, and the loss of a diverged trial never reaches it.

    Args:
        space: of the plan.
        domains: what `pruner.cut_rank_domain` left of it.
        num_candidates: how many in all, those of `first` and `history` included.
        seed: of TPE. Equal seeds and equal answers give equal suggestions.
        make_trial: the dict of a candidate's trial (see `run.trial_dict`).
        common: what all trials get beside their dict.
        first: trials of an earlier attempt that must run before any new one; each holds "candidate".
        history: candidates that ran, with their eval_loss, or None if they failed or diverged.
        others: candidates that run beside the search, of which it learns nothing and proposes none.

    Raises:
        ValueError: a candidate of `first` or `history` is not in the admitted space.
    """

    def __init__(
        self,
        space: SearchSpace,
        domains: Sequence[TargetDomain],
        num_candidates: int,
        seed: int,
        make_trial: Callable[[Candidate], dict[str, Any]],
        common: dict[str, Any],
        first: Sequence[dict[str, Any]] = (),
        history: Sequence[tuple[Candidate, float | None]] = (),
        others: Iterable[Candidate] = (),
    ) -> None:
        super().__init__(metric=METRIC, mode=MODE)
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # else a line for every study
        self._admitted = AdmittedSpace(space, tuple(item for item in domains if item.admissible))
        storage = optuna.storages.InMemoryStorage()
        self._inner = OptunaSearch(
            space=self._admitted,
            metric=METRIC,
            mode=MODE,
            sampler=optuna.samplers.TPESampler(seed=seed),
            study_name="tenfold",
            storage=storage,
        )
        # Ray hides its study; the same storage gives another handle, to put points in its queue.
        self._study = optuna.load_study(study_name="tenfold", storage=storage)
        self._make_trial = make_trial
        self._common = common
        self._first = deque(first)
        self._num_left = num_candidates - len(first) - len(history)
        self._asked: dict[str, _Asked] = {}
        self._known = {Candidate.from_dict(trial["candidate"]) for trial in first}
        for candidate in self._known:
            self._admitted.parameters(candidate)  # refused here, not when its turn comes
        for number, (candidate, loss) in enumerate(history):
            self._tell(f"history-{number}", candidate, loss)
        self._known |= set(others)
        self._centre = next(self._admitted.grid())

    def suggest(self, trial_id: str) -> Any:
        if self._first:
            trial = self._first.popleft()
            self._asked[trial_id] = _Asked(trial_id)
            self._ask(trial_id, Candidate.from_dict(trial["candidate"]))
            return {"trial": trial, **self._common}
        candidate = self._propose(trial_id) if self._num_left > 0 else None
        if candidate is None:
            return Searcher.FINISHED
        self._num_left -= 1
        self._known.add(candidate)
        return {"trial": self._make_trial(candidate), **self._common}

    def avoid(self, candidate: Candidate) -> None:
        """Proposes a candidate no more: it runs beside the search."""
        self._known.add(candidate)

    def drop(self, name: str) -> bool:
        """Leaves out a trial of an earlier attempt that was not suggested yet; False: there is none of that name."""
        kept = deque(trial for trial in self._first if trial["name"] != name)
        was_here = len(kept) < len(self._first)
        self._first = kept
        return was_here

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        asked, loss = self._asked.get(trial_id), _score(result)
        # A retried trial repeats its reports; Optuna warns of each that it had.
        if asked and loss is not None and result.get(CLOCK, -1) > asked.examples:
            asked.examples = result[CLOCK]
            told = {METRIC: loss, "training_iteration": asked.examples}
            self._inner.on_trial_result(asked.inner_id, told)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        asked = self._asked.pop(trial_id, None)
        if asked:
            loss = None if error else _score(result or {})
            self._inner.on_trial_complete(asked.inner_id, {METRIC: loss})

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its searcher; make_trial holds a plan and whatever else its caller bound.
        return {key: value for key, value in vars(self).items() if key != "_make_trial"}

    def _ask(self, inner_id: str, candidate: Candidate | None = None) -> Candidate:
        """A candidate of Optuna's, or the given one made a trial of Optuna's."""
        if candidate is not None:
            self._study.enqueue_trial(self._admitted.parameters(candidate))
        suggestion: Any = self._inner.suggest(inner_id)
        # The given one itself: its learning rate went through a division and back.
        return candidate or suggestion["candidate"]

    def _tell(self, inner_id: str, candidate: Candidate, loss: float | None) -> None:
        self._known.add(candidate)
        self._ask(inner_id, candidate)
        self._inner.on_trial_complete(inner_id, {METRIC: _score({METRIC: loss})})

    def _propose(self, trial_id: str) -> Candidate | None:
        """A candidate that never ran, known to Optuna as this trial; None if there is none left."""
        repeats: list[str] = []
        candidate = self._ask_new(trial_id, repeats)
        for inner_id in repeats:
            # Failed trials do not count for TPE; a second score of one point would draw it there.
            self._inner.on_trial_complete(inner_id, error=True)
        if candidate is None:
            logger.warning(
                "Optuna proposed all %d candidates of the admitted space; %d more were asked for",
                len(self._known),
                self._num_left,
            )
            self._num_left = 0
        return candidate

    def _ask_new(self, trial_id: str, repeats: list[str]) -> Candidate | None:
        if self._centre not in self._known:
            self._asked[trial_id] = _Asked(trial_id)
            return self._ask(trial_id, self._centre)
        while len(repeats) < MAX_REPEATS:
            # A repeat stays open meanwhile: TPE avoids what is running.
            inner_id = f"{trial_id}.{len(repeats)}"
            candidate = self._ask(inner_id)
            if candidate not in self._known:
                self._asked[trial_id] = _Asked(inner_id)
                return candidate
            repeats.append(inner_id)
        left = next((item for item in self._admitted.grid() if item not in self._known), None)
        if left is not None:
            self._asked[trial_id] = _Asked(trial_id)
            self._ask(trial_id, left)
        return left


SHARED_FIELDS = (
    "learning_rate",
    "lora_alpha",
    "global_batch_size",
    "lr_schedule",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "seed",
)
"""Fields of a candidate whose domain is the same for every target."""


@dataclass(frozen=True)
class AdmittedSpace:
    """The admitted candidates as Optuna's define-by-run function; domains are all admissible.

    The ranks, dropouts and variants of each target are a parameter of their own, as Optuna wants one set of
    choices for a name. What has one value is no parameter. The learning rate is that of the space: a
    candidate's own is made of it by its variant and alpha.
    """

    space: SearchSpace
    domains: tuple[TargetDomain, ...]

    def __call__(self, trial: Any) -> dict[str, Any]:
        names = [_text(domain) for domain in self.domains]
        name = _suggest(trial, "target", Choice(options=tuple(names)))
        domain = self.domains[names.index(name)]
        values = {
            field: _suggest(trial, parameter, values)
            for field, (parameter, values) in self._axes(domain).items()
        }
        return {"candidate": make_candidate(self.space, target=domain.target, **values)}

    def parameters(self, candidate: Candidate) -> dict[str, Any]:
        """The values of Optuna's parameters that give a candidate.

        Raises:
            ValueError: it is not in this space.
        """
        domain = next((item for item in self.domains if item.target == candidate.target), None)
        if domain is None or not self._holds(domain, candidate):
            raise ValueError(
                f"a candidate must lie in the admitted space, got {candidate}; resume with the "
                "space that the run began with"
            )
        own, axes = self._point(candidate), self._axes(domain).items()
        values = {parameter: _choice(own[field]) for field, (parameter, _) in axes}
        return {"target": _text(domain), **values}

    def grid(self) -> Iterator[Candidate]:
        """The admitted candidates of the grid, in its order."""
        domains = {domain.target: domain for domain in self.domains}
        for candidate in grid_candidates(self.space):
            domain = domains.get(candidate.target)
            if domain and self._holds(domain, candidate):
                yield candidate

    def _axes(self, domain: TargetDomain) -> dict[str, tuple[str, LogUniform | Choice[Any]]]:
        """Field of a candidate -> name of its parameter, and its values."""
        name = _text(domain)
        return {
            "lora_rank": (f"lora_rank of {name}", Choice(options=domain.lora_ranks)),
            "dropout": (f"dropout of {name}", Choice(options=domain.dropouts)),
            "variant": (f"variant of {name}", Choice(options=domain.variants)),
            **{field: (field, getattr(self.space, field)) for field in SHARED_FIELDS},
        }

    def _holds(self, domain: TargetDomain, candidate: Candidate) -> bool:
        own = self._point(candidate)
        return all(
            values.low <= own[field] <= values.high
            if isinstance(values, LogUniform)
            else own[field] in values.options
            for field, (_, values) in self._axes(domain).items()
        )

    def _point(self, candidate: Candidate) -> dict[str, Any]:
        """The values of the space's domains that make a candidate."""
        rank, alpha = candidate.lora_rank, candidate.lora_alpha
        rules = [a for a in self.space.lora_alpha.values() if isinstance(a, RankMultiple)]
        rule = next((a for a in rules if alpha_at(a, rank) == alpha), alpha)
        factor = self.space.rate_factor(candidate.variant, alpha, rank)
        rate = _within(self.space.learning_rate, candidate.learning_rate / factor)
        own = {field: getattr(candidate, field) for field in ("lora_rank", "dropout", "variant")}
        own |= {field: getattr(candidate, field) for field in SHARED_FIELDS}
        return own | {"lora_alpha": rule, "learning_rate": rate}


ROUNDING = 1e-12
"""Relative: what a division undoes of a multiplication is not the last bit."""


def _within(values: LogUniform | Choice[Any], rate: float) -> float:
    """The rate of a domain that a rate is but for rounding."""
    known = (values.low, values.high) if isinstance(values, LogUniform) else values.options
    return next((one for one in known if math.isclose(one, rate, rel_tol=ROUNDING)), rate)


def _suggest(trial: Any, name: str, values: LogUniform | Choice[Any]) -> Any:
    if isinstance(values, LogUniform):
        if values.low == values.high:
            return values.low
        return trial.suggest_float(name, values.low, values.high, log=True)
    if len(values.options) == 1:
        return values.options[0]
    by_choice = {_choice(option): option for option in values.options}
    return by_choice[trial.suggest_categorical(name, list(by_choice))]


def _choice(value: Any) -> Any:
    """A value as Optuna takes it: it knows numbers and texts."""
    return str(value) if isinstance(value, RankMultiple) else value


def _text(domain: TargetDomain) -> str:
    return "+".join(domain.target)


def _score(result: dict[str, Any]) -> float | None:
    """The eval_loss of a result, if it has one that means something."""
    loss = result.get(METRIC)
    if loss is None or not math.isfinite(loss) or loss >= DIVERGED_LOSS:
        return None
    return float(loss)
