"""From doctrine, model shape and the user's overrides to a search space."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from search_spaces import doctrine, variants
from search_spaces.architecture import ModelShape
from search_spaces.candidate import Candidate, grid_candidates, random_candidates, trial_name
from search_spaces.capacity import Real, dataset_bits, episode_bits, sufficient_rank
from search_spaces.domains import Choice, LogUniform, Note, SearchSpace, TargetDomain
from search_spaces.priors import LearningRatePrior, learning_rate_prior
from search_spaces.values import check_keys, parse_domain, parse_targets

__all__ = [
    "Candidate",
    "Choice",
    "DatasetFacts",
    "LogUniform",
    "Note",
    "SearchSpace",
    "TargetDomain",
    "build_space",
    "grid_candidates",
    "random_candidates",
    "trial_name",
]

TENFOLD_DEFAULT = "Tenfold default"
MAX_NOTED = 200
"""Pairs of rank and alpha whose factors a note names."""
QLORA_NOTE = "QLoRA (arXiv 2305.14314) clips at 0.3"


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What a space must know of the data: its bits (>= 0), and its training examples if known."""

    bits: int
    num_examples: int | None = None

    @classmethod
    def from_tokens(
        cls,
        num_tokens: Real,
        bits_per_token: Real = doctrine.BITS_PER_TOKEN.value,
        num_examples: int | None = None,
    ) -> "DatasetFacts":
        """Facts of an SFT data set from its loss-bearing tokens of one epoch."""
        return cls(bits=dataset_bits(num_tokens, bits_per_token), num_examples=num_examples)

    @classmethod
    def from_episodes(cls, num_prompts: int, num_generations: int) -> "DatasetFacts":
        """Facts of a trial of RL, all its epochs counted: one bit for each episode, of which every prompt
        brings num_generations anew each time that it comes."""
        bits = episode_bits(num_prompts * num_generations)
        return cls(bits=bits, num_examples=num_prompts)


def build_space(
    shape: ModelShape,
    method: str = "sft",
    dataset: DatasetFacts | None = None,
    overrides: Mapping[str, object] | None = None,
    *,
    lr_prior: str | float | LearningRatePrior | None = None,
    full_ft_learning_rate: float | None = None,
    size_class: str | None = None,
) -> SearchSpace:
    """The search space of a sweep: the doctrine's, but for what the user set.

    Args:
        shape: the model.
        method: 'sft' or 'rl'.
        dataset: bits that the adapter must hold; None leaves the doctrine's ranks as they are.
        overrides: key -> scalar, list, or {low, high, num} (log-spaced). A rank given here is
            taken as given: it is not extended. Learning rates given here are taken as given by every
            variant and alpha. `target`: see `values.parse_targets`.
        lr_prior: see `priors.learning_rate_prior`.
        full_ft_learning_rate: see there.
        size_class: row of the rank table; default by parameter count.

    Raises:
        ValueError: names the key, what must hold and what was found.
    """
    doctrine.check_method(method)
    given = dict(overrides or {})
    check_keys(given)
    prior = learning_rate_prior(
        lr_prior,
        hidden_size=shape.hidden_size,
        model_type=shape.model_type,
        method=method,
        full_ft_learning_rate=full_ft_learning_rate,
    )
    notes: list[Note] = []
    domains: dict[str, Any] = {"target": _targets(shape, given, notes)}
    domains["lora_rank"], rank_notes = _default_ranks(
        shape, method, dataset, domains["target"].options, size_class
    )
    domains |= {"learning_rate": _default_learning_rates(prior, method)}
    domains |= _fixed_defaults("examples" in given)
    sources = _default_sources(shape, prior, method, size_class)
    for key in given.keys() - {"target"}:
        domains[key] = parse_domain(key, given[key])
        sources[key] = "given"
    domains["reference_alpha"] = _reference_alpha(domains["lora_alpha"], given)
    notes += [Note(key, _text(domains[key]), source) for key, source in sources.items()]
    notes += rank_notes if "lora_rank" not in given else []
    notes += _expert_notes(shape, domains["lora_rank"], domains["target"])
    _check_budget(given)
    space = SearchSpace(**domains, prior=prior, notes=tuple(notes))
    return replace(space, notes=(*space.notes, *_factor_notes(space)))


def _reference_alpha(alphas: Any, given: Mapping[str, object]) -> float | None:
    """The alpha that the prior is meant for: the only one, where it is a number; else the doctrine's."""
    if "learning_rate" in given:
        return None
    values = alphas.values()
    constant = len(values) == 1 and not isinstance(values[0], variants.RankMultiple)
    return float(values[0]) if constant else doctrine.ALPHA.value


def _factor_notes(space: SearchSpace) -> list[Note]:
    """What the learning rates are multiplied by for variants, and for alphas that are not constant."""
    notes: list[Note] = []
    num_pairs = len(space.lora_rank.options) * len(space.lora_alpha.values())
    for variant in space.variant.options:
        if num_pairs > MAX_NOTED and space.reference_alpha is not None:
            source = _factor_source(variant, space.reference_alpha)
            notes.append(
                Note(
                    "learning_rate", f"{variant}: a factor for each of {num_pairs:,} pairs", source
                )
            )
            continue
        found = {
            f"rank {rank} alpha {alpha:g}": space.rate_factor(variant, alpha, rank)
            for rank in space.lora_rank.options
            for alpha in sorted({variants.alpha_at(a, rank) for a in space.lora_alpha.values()})
        }
        if space.reference_alpha is None or set(found.values()) == {1.0}:
            continue
        texts = [f"{where} x{factor:.3g}" for where, factor in found.items()]
        text = f"x{min(found.values()):.3g}" if len(set(found.values())) == 1 else ", ".join(texts)
        source = _factor_source(variant, space.reference_alpha)
        notes.append(Note("learning_rate", f"{variant}: {text}", source))
    return notes


def _factor_source(variant: str, reference_alpha: float) -> str:
    exponent, own = doctrine.ALPHA_LR_EXPONENT, doctrine.VARIANT_LR
    text = f"(scale x rank / {reference_alpha:g})^{exponent.value:g} ({exponent.source})"
    for name in sorted(variants.parts_of(variant) & own.value.keys()):
        text += f" x {own.value[name]:g} of {name} ({own.source})"
    return text


def _targets(
    shape: ModelShape, given: Mapping[str, object], notes: list[Note]
) -> Choice[tuple[str, ...]]:
    if "target" not in given:
        target = shape.normalize_target(doctrine.TARGET.value)
        notes.append(Note("target", "+".join(target), doctrine.TARGET.source))
        return Choice(options=(target,))
    targets = [shape.normalize_target(item) for item in parse_targets(given["target"])]
    if len(set(targets)) < len(targets):
        raise ValueError(f"target must not list a target twice, got {given['target']!r}")
    notes.append(Note("target", ", ".join("+".join(target) for target in targets), "given"))
    return Choice(options=tuple(targets))


def _default_ranks(
    shape: ModelShape,
    method: str,
    dataset: DatasetFacts | None,
    targets: tuple[tuple[str, ...], ...],
    size_class: str | None,
) -> tuple[Choice[int], list[Note]]:
    """The table's ranks, extended where the data needs more, and a note for each extension."""
    low, high = doctrine.rank_range(shape.num_params, method, size_class=size_class)
    ranks, notes = set(doctrine.ranks_in_range(low, high)), list[Note]()
    for target in targets if dataset else ():
        needed = sufficient_rank(shape, cast(DatasetFacts, dataset).bits, target)
        if needed > high:
            rank = min(1 << (needed - 1).bit_length(), shape.max_useful_lora_rank(target))
            if rank > high:
                ranks.add(rank)
                notes.append(_extension_note(target, needed, high, rank))
    return Choice(options=tuple(sorted(ranks))), notes


def _extension_note(target: tuple[str, ...], needed: int, high: int, rank: int) -> Note:
    short = "" if rank >= needed else "; NOT sufficient: the largest useful rank is smaller"
    return Note(
        "lora_rank",
        f"extended to {rank} for {'+'.join(target)}: the data needs {needed}, the range ends at "
        f"{high}{short}",
        f"{doctrine.USER_DOCTRINE}: undercapacity is mended by a higher rank, a power of two, at "
        "most the smallest side of the adapted matrices",
    )


def _default_learning_rates(prior: LearningRatePrior, method: str) -> LogUniform:
    step = doctrine.LR_GRID_STEP_DECADES.value
    above = below = doctrine.LR_GRID_DECADES.value
    if method == "rl":
        low, high = doctrine.RL_LR_GRID.value
        above = below = round(math.log10(high / low) / 2, 9)
    if prior.extrapolated:
        below += doctrine.LR_EXTRAPOLATED_DECADES.value
    if prior.interval is not None:
        low, high = prior.interval
        below = max(below, _whole_steps(math.log10(prior.lora / low), step))
        above = max(above, _whole_steps(math.log10(high / prior.lora), step))
    return LogUniform(
        low=prior.lora * 10**-below,
        high=prior.lora * 10**above,
        num=round((above + below) / step) + 1,
    )


def _whole_steps(decades: float, step: float) -> float:
    return math.ceil(round(decades / step, 9)) * step


def _fixed_defaults(budget_in_examples: bool) -> dict[str, Choice[Any]]:
    low, high = doctrine.BATCH_RANGE.value
    return {
        "global_batch_size": Choice(options=doctrine.ranks_in_range(low, high)),
        "lora_alpha": Choice(options=(doctrine.ALPHA.value,)),
        "variant": Choice(options=(variants.PLAIN,)),
        "dropout": Choice(options=(doctrine.DROPOUT.value,)),
        "lr_schedule": Choice(options=("constant",)),
        "warmup": Choice(options=(0.0,)),
        "weight_decay": Choice(options=(0.0,)),
        "max_grad_norm": Choice(options=(1.0,)),
        "seed": Choice(options=(0,)),
        "epochs": Choice(options=(None if budget_in_examples else 1.0,)),
        "examples": Choice(options=(None,)),
    }


def _default_sources(
    shape: ModelShape, prior: LearningRatePrior, method: str, size_class: str | None
) -> dict[str, str]:
    row = doctrine.size_class_of(shape.num_params, size_class)
    return {
        "learning_rate": f"centre {prior.lora:.3g}, FullFT {prior.full_ft:.3g}; {prior.source}",
        "lora_rank": f"{row.name} row, {method}, for {shape.num_params:,} parameters; "
        f"{doctrine.RANK_TABLE.source}",
        "global_batch_size": f"{doctrine.BATCH_RANGE.source}; {doctrine.BATCH_RANGE.evidence}",
        "lora_alpha": f"{doctrine.ALPHA.source}; {doctrine.ALPHA.evidence}",
        "variant": f"{TENFOLD_DEFAULT}; the LR ratio was fitted with plain LoRA",
        "dropout": f"{doctrine.DROPOUT.source}; {doctrine.DROPOUT.evidence}",
        "lr_schedule": f"{TENFOLD_DEFAULT}; the LR ratio was fitted with a constant LR",
        "warmup": TENFOLD_DEFAULT,
        "weight_decay": TENFOLD_DEFAULT,
        "max_grad_norm": f"{TENFOLD_DEFAULT}; {QLORA_NOTE}",
        "seed": TENFOLD_DEFAULT,
        "epochs": TENFOLD_DEFAULT,
        "examples": TENFOLD_DEFAULT,
    }


def _expert_notes(
    shape: ModelShape, ranks: Choice[int], targets: Choice[tuple[str, ...]]
) -> list[Note]:
    adapted = [linear for target in targets.options for linear in shape.resolve_target(target)]
    if not any(linear.component == "experts" for linear in adapted):
        return []
    return [
        Note(
            "lora_rank",
            doctrine.expert_rank_note(rank, shape.num_active_experts),
            f"{doctrine.MOE_RANK.source}; {doctrine.MOE_RANK.evidence}",
        )
        for rank in ranks.options
    ]


def _check_budget(given: Mapping[str, object]) -> None:
    if "epochs" in given and "examples" in given:
        raise ValueError(
            f"epochs and examples must not both be set, got {given['epochs']!r} and "
            f"{given['examples']!r}; give one"
        )


def _text(domain: LogUniform | Choice[Any]) -> str:
    if isinstance(domain, LogUniform):
        return f"{domain.low:.3g} to {domain.high:.3g}, {domain.num} log-spaced"
    return ", ".join("-" if option is None else f"{option}" for option in domain.options)
