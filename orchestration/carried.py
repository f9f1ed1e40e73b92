"""`lr_prior: {from: runs/SMALL}`: reads a small sweep or study, and says what to run on the big model first.
Imports neither torch nor ray."""

from typing import Any

from orchestration.config import CarriedFrom, SweepConfig, space_overrides
from orchestration.objective import method_of_study
from orchestration.planning import Budget
from orchestration.results import read_trial
from orchestration.run_folder import run_at
from orchestration.studies.agenda import MEASURED, last_loss
from orchestration.trials import known_names
from search_spaces.architecture import ModelShape
from search_spaces.candidate import Candidate
from search_spaces.carried_prior import (
    Run,
    SmallOptimum,
    carried_prior,
    confirmation_rates,
    small_optimum,
)
from search_spaces.domains import SearchSpace, TargetDomain
from search_spaces.priors import LearningRatePrior
from search_spaces.space import DatasetFacts, build_space
from search_spaces.variants import PLAIN, alpha_at
from trainers.paths import RunPaths, read_json, read_state


def prior_from(
    given: CarriedFrom, config: SweepConfig, shape: ModelShape, facts: DatasetFacts
) -> LearningRatePrior:
    """The optimum of the folder's runs at the width of the sweep's model.

    Raises:
        ValueError: no such folder, nothing in it that ended, or no optimum in it; one line.
    """
    wanted = build_space(
        shape, config.method, facts, space_overrides(config), size_class=config.size_class
    )
    return carried_prior(
        read_optimum(given.folder, config.method, wanted), shape.hidden_size, wanted
    )


def read_optimum(folder: str, method: str, wanted: SearchSpace) -> SmallOptimum:
    """The optimum of a finished sweep or study.

    Args:
        folder: runs/SMALL.
        method: of the big sweep; the small one's must be the same.
        wanted: the big sweep's space.

    Raises:
        ValueError: as `prior_from`.
    """
    run = run_at(folder)
    hidden_size, small_method = _model_facts(run, folder)
    if small_method != method:
        raise ValueError(
            f"lr_prior from {folder}: its method must be {method}, is {small_method}; the levels are apart"
        )
    return small_optimum(_runs(run), wanted, where=folder, hidden_size=hidden_size)


def _model_facts(run: RunPaths, folder: str) -> tuple[int, str]:
    """(hidden size, method) of a sweep, or of a study."""
    if run.plan.is_file():
        plan = read_state(run.plan)
        return plan["model"]["hidden_size"], plan["method"]
    if run.results.is_file():
        results = read_json(run.results)
        return results["model"]["hidden_size"], method_of_study(results)
    raise ValueError(
        f"lr_prior from {folder}: must be the folder of a sweep (plan.json) or of a study that ended "
        f"(results.json), {'has neither' if run.root.is_dir() else 'is no folder'}"
    )


def _runs(run: RunPaths) -> list[Run]:
    """The trials that ran to their end or diverged. One that a scheduler stopped saw less than the others,
    and one that failed says nothing of its learning rate."""
    records = [read_trial(run.trial(name)) for name in known_names(run)]
    return [
        (Candidate.from_dict(r.candidate), last_loss(r)) for r in records if r.status in MEASURED
    ]


def confirmation(
    space: SearchSpace,
    admitted: tuple[Candidate, ...],
    domains: tuple[TargetDomain, ...],
    budget: Budget | None,
    tokens_per_example: float | None,
) -> dict[str, Any] | None:
    """Three trials on the big model that test a carried optimum: both ends of its interval and the middle,
    at the largest admitted rank, else at the first values that the sweep would try. None where the prior
    was not carried.

    Returns:
        lora_rank, lora_alpha, global_batch_size, target, learning_rates; num_trials; num_examples of a trial
        and num_tokens of all of them (None without data); yaml: the keys that make a sweep of it.
    """
    rates = confirmation_rates(space.prior)
    if rates is None:
        return None
    rank, target = _largest(admitted, domains)
    first = next((c for c in admitted if (c.lora_rank, c.target) == (rank, target)), None)
    facts: dict[str, Any] = {
        "lora_rank": rank,
        "lora_alpha": first.lora_alpha if first else alpha_at(space.lora_alpha.values()[0], rank),
        "global_batch_size": first.global_batch_size
        if first
        else space.global_batch_size.options[0],
        "target": list(target),
        "variant": list(space.variant.options),
    }
    num_examples = budget.num_examples if budget else None
    tokens = None
    if num_examples is not None and tokens_per_example is not None:
        tokens = round(len(rates) * num_examples * tokens_per_example)
    return facts | {
        "learning_rates": list(rates),
        "num_trials": len(rates),
        "num_examples": num_examples,
        "num_tokens": tokens,
        "yaml": _yaml(facts, rates),
    }


def _largest(
    admitted: tuple[Candidate, ...], domains: tuple[TargetDomain, ...]
) -> tuple[int, tuple[str, ...]]:
    pairs = [(candidate.lora_rank, candidate.target) for candidate in admitted]
    pairs += [(max(d.lora_ranks), d.target) for d in domains if d.admissible]
    return max(pairs, key=lambda pair: pair[0])  # of equals the first, as the sweep would


def _yaml(facts: dict[str, Any], rates: tuple[float, ...]) -> str:
    """What to put over the sweep's own keys. fifo: each of so few must run to its end."""
    lines = [
        f"learning_rate: [{', '.join(f'{rate:.6g}' for rate in rates)}]",
        f"lora_rank: {facts['lora_rank']}",
        f"lora_alpha: {facts['lora_alpha']:g}",
        f"global_batch_size: {facts['global_batch_size']}",
        f"target: [{', '.join(facts['target'])}]",
        *([f"variant: {PLAIN}"] if facts["variant"] != [PLAIN] else []),
        "search: grid",
        "scheduler: fifo",
    ]
    return "\n".join(lines) + "\n"
