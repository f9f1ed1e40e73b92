"""A published sweep of LoRA learning rates: its optima, and what the priors lose on which models.

The sweep meant is tulu3_lora_sweep.csv of tinker-cookbook: one row per run, no full-fine-tuning
arm, diverged runs left out by its authors. An optimum is flagged at an edge wherever the best rate
is the highest that is listed: whether what is missing diverged, the file does not say.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from search_spaces.fit import Optimum, fit_log_parabola, regret
from search_spaces.priors import learning_rate_prior
from search_spaces.studies.points import Side
from search_spaces.studies.published_models import MODEL_SETS, MODELS, PublishedModel


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One row: the loss in nats/token, math.inf where a sweep lists a diverged run."""

    model: str
    learning_rate: float
    lora_rank: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class SweepOptimum:
    """The best learning rate of a model at a rank.

    Attributes:
        model: as published.
        lora_rank: of the runs.
        optimum: log-parabola through the best point and its neighbours; `on_edge` says that there
            is none, and that the best point is given.
        edge: the side on which the sweep ends or diverges at the best point: 'none' where it does
            not, 'high' where it does on both.
        num_learning_rates: how many it was tried at.
    """

    model: str
    lora_rank: int
    optimum: Optimum
    edge: Side
    num_learning_rates: int


@dataclass(frozen=True, kw_only=True)
class SetRegret:
    """Mean regrets of priors over a named set of models.

    Attributes:
        models: those that count: the same for all priors.
        mean_frac: by prior, the mean over the models; empty when no model counts.
        by_model: by model and prior, the mean over its ranks.
        left_out: models of the set that do not count, with the reason.
        ahead: the prior of the lowest mean; None when no model counts.
    """

    models: tuple[str, ...]
    mean_frac: dict[str, float]
    by_model: dict[str, dict[str, float]]
    left_out: dict[str, str]
    ahead: str | None


def read_sweep(path: Path, loss_column: str = "test_nll_nats_per_token") -> tuple[SweepRun, ...]:
    """The runs of a CSV with the columns model, learning_rate, lora_rank and a loss.

    Raises:
        ValueError: a column that is not there.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        needed = {"model", "learning_rate", "lora_rank", loss_column}
        if missing := needed - set(reader.fieldnames or ()):
            raise ValueError(f"{path} must have the columns {sorted(needed)}, lacks {missing}")
        return tuple(
            SweepRun(
                model=row["model"],
                learning_rate=float(row["learning_rate"]),
                lora_rank=int(row["lora_rank"]),
                loss=float(row[loss_column]),
            )
            for row in reader
        )


def sweep_optima(runs: Iterable[SweepRun]) -> tuple[SweepOptimum, ...]:
    """The optimum of every model and rank, by model and rank; runs at one rate are averaged."""
    return tuple(
        _optimum(model, lora_rank, points)
        for (model, lora_rank), points in sorted(_by_model_and_rank(runs).items())
    )


def _by_model_and_rank(
    runs: Iterable[SweepRun],
) -> dict[tuple[str, int], list[tuple[float, float]]]:
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for run in runs:
        found.setdefault((run.model, run.lora_rank), []).append((run.learning_rate, run.loss))
    return found


def _optimum(model: str, lora_rank: int, points: Sequence[tuple[float, float]]) -> SweepOptimum:
    optimum = fit_log_parabola(points)
    edge: Side = "none"
    if optimum.on_edge:
        higher = [run for run in points if run[0] > optimum.learning_rate * (1 + 1e-9)]
        following = [loss for rate, loss in higher if rate == min(higher)[0]]
        edge = "low" if following and all(map(math.isfinite, following)) else "high"
    return SweepOptimum(
        model=model,
        lora_rank=lora_rank,
        optimum=optimum,
        edge=edge,
        num_learning_rates=len({rate for rate, _ in points}),
    )


def set_regrets(
    runs: Iterable[SweepRun],
    *,
    sets: Mapping[str, Sequence[str]] = MODEL_SETS,
    priors: Sequence[str] = ("doctrine", "tinker"),
    models: Mapping[str, PublishedModel] = MODELS,
) -> dict[str, SetRegret]:
    """Regrets of the priors' LoRA learning rates by named sets of models.

    A model counts for all priors or for none: its width must be known, each prior must have a law
    for its family, and each prior's rate must lie within what was run at every rank. Nothing is
    guessed or extrapolated.

    Args:
        runs: a sweep.
        sets: names of models by the name of the set.
        priors: names that `learning_rate_prior` knows.
        models: width and family of each model.
    """
    cells = _by_model_and_rank(runs)
    return {name: _set_regret(cells, members, priors, models) for name, members in sets.items()}


def ahead_depends_on_set(found: Mapping[str, SetRegret]) -> bool:
    """Whether different sets of models put different priors ahead."""
    return len({one.ahead for one in found.values() if one.ahead is not None}) > 1


def _set_regret(
    cells: Mapping[tuple[str, int], list[tuple[float, float]]],
    members: Sequence[str],
    priors: Sequence[str],
    models: Mapping[str, PublishedModel],
) -> SetRegret:
    by_model: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for model in members:
        ranks = {rank: points for (name, rank), points in cells.items() if name == model}
        found = _model_regrets(ranks, models.get(model), priors)
        if isinstance(found, str):
            left_out[model] = found
        else:
            by_model[model] = found
    mean = {
        prior: sum(row[prior] for row in by_model.values()) / len(by_model)
        for prior in priors
        if by_model
    }
    return SetRegret(
        models=tuple(by_model),
        mean_frac=mean,
        by_model=by_model,
        left_out=left_out,
        ahead=min(mean, key=mean.__getitem__, default=None),
    )


def _model_regrets(
    ranks: Mapping[int, list[tuple[float, float]]],
    model: PublishedModel | None,
    priors: Sequence[str],
) -> dict[str, float] | str:
    """Mean regret over the ranks by prior, or why the model is left out."""
    if not ranks:
        return "not in the sweep"
    if model is None:
        return "width not known"
    found: dict[str, float] = {}
    for name in priors:
        try:
            prior = learning_rate_prior(
                name, hidden_size=model.hidden_size, model_type=model.model_type
            )
        except ValueError:
            return f"{name}: no law for model_type {model.model_type}"
        for rank, points in ranks.items():
            rates = [rate for rate, _ in points]
            if not min(rates) <= prior.lora <= max(rates):
                return f"{name}: {prior.lora:.2e} is outside what was run at rank {rank}"
        found[name] = sum(regret(points, prior.lora) for points in ranks.values()) / len(ranks)
    return found
