"""The best learning rate of a small model's sweep, carried to a big model with what is not known of it.

    log10 LR_big = log10 LR_small + log10(law(H_big) / law(H_small)),   law(H) = 2000 / H

with H the hidden size and the level law of the doctrine. The interval has two parts, added in quadrature
on each side (they are independent):

- the small fit's own 95% interval (studies/bend.py);
- the transfer: how far the published laws lie apart between the two widths. They are powers of H with
  exponents 1 (doctrine), 0.781 and 0.0775 (tinker, fitted on Llama and on Qwen), so between 1024 and 8192
  they differ by up to (1 - 0.0775) log10(8) = 0.83 decade, all of it above the doctrine's.

ASSUMPTION: that spread is taken for the 95% interval of the transfer; three laws are no sample. Not counted:
other data, another budget, rank and alpha. Those that differ are named in the prior's source, and nothing is
corrected for them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

from search_spaces import doctrine
from search_spaces.candidate import Candidate
from search_spaces.domains import SearchSpace
from search_spaces.priors import LearningRatePrior
from search_spaces.studies.optimum import arm_optimum
from search_spaces.studies.points import Point, Unsettled, rounded_rate
from search_spaces.variants import PLAIN, lr_factor

LEAST_RATES = 3
ONE_SEED_DECADES = 0.125
"""ASSUMPTION: what other seeds would do to an optimum that one seed measured, 95%. In 21 arms of this project's
studies the seeds' own optima scattered by 0.003 to 0.033 decade (standard deviation); with the first seed
alone the estimate moved by up to 0.126."""

Run = tuple[Candidate, float]
"""A run that ended: its candidate and its last eval_loss in nats/token, math.inf where it diverged."""


@dataclass(frozen=True, kw_only=True)
class SmallOptimum:
    """The best learning rate of a small model.

    Attributes:
        where: the folder, as the user gave it.
        hidden_size: its width, >= 1.
        log10_lr, low, high: log10 of the learning rate and of the ends of its 95% interval.
        lora_ranks: that it was measured at, ascending.
        lora_alpha, global_batch_size, target, variant: of all of them.
        num_rates, num_seeds: learning rates, and most seeds of an arm.
    """

    where: str
    hidden_size: int
    log10_lr: float
    low: float
    high: float
    lora_ranks: tuple[int, ...]
    lora_alpha: float
    global_batch_size: int
    target: tuple[str, ...]
    num_rates: int
    num_seeds: int
    variant: str = PLAIN


def small_optimum(
    runs: Sequence[Run], wanted: SearchSpace, *, where: str, hidden_size: int
) -> SmallOptimum:
    """The optimum of those runs that are most like what the big sweep will try.

    The best learning rate depends on alpha, on the batch and on the adapted layers, and little on the
    rank. So the runs of one (alpha, batch, target, variant) are taken, each rank is fitted as the studies do, and
    the optima of those that have one are averaged in log10; the interval holds all of theirs.

    Args:
        wanted: the big sweep's space; its learning rates are not looked at.

    Raises:
        ValueError: no LoRA run, fewer than 3 learning rates, or no optimum: on an edge, flat, unbounded.
    """
    alike = _most_alike([run for run in runs if not run[0].full_finetune], wanted, where)
    arms = [arm for arm in _arms(alike) if len(_rates(arm)) >= LEAST_RATES]
    if not arms:
        found = ", ".join(f"{rate:.2e}" for rate in _rates(alike)) or "none"
        raise ValueError(
            f"lr_prior from {where}: must hold at least {LEAST_RATES} learning rates of one rank that ran to "
            f"the end, holds {found}; run it with more of them, and with scheduler: fifo"
        )
    tried = [(arm, _fit(arm)) for arm in arms]
    fits = [(arm, fit) for arm, fit in tried if not isinstance(fit, Unsettled)]
    if not fits:
        arm, why = next((arm, fit) for arm, fit in tried if isinstance(fit, Unsettled))
        raise ValueError(_unsettled(why, arm, where))
    first = fits[0][0][0][0]
    return SmallOptimum(
        where=where,
        hidden_size=hidden_size,
        log10_lr=fmean(fit.log10_lr for _, fit in fits),
        low=min(fit.low for _, fit in fits),
        high=max(fit.high for _, fit in fits),
        lora_ranks=tuple(sorted({arm[0][0].lora_rank for arm, _ in fits})),
        lora_alpha=first.lora_alpha,
        global_batch_size=first.global_batch_size,
        target=first.target,
        variant=first.variant,
        num_rates=len({rate for arm, _ in fits for rate in _rates(arm)}),
        num_seeds=max(len({candidate.seed for candidate, _ in arm}) for arm, _ in fits),
    )


class _Fit(NamedTuple):
    """log10 of a rank's best learning rate and of the ends of its interval."""

    log10_lr: float
    low: float
    high: float


def _most_alike(runs: Sequence[Run], wanted: SearchSpace, where: str) -> list[Run]:
    """The runs of the (alpha, batch, target, variant) that comes nearest to the big sweep's; of equals, the one
    with the lowest loss."""
    groups: dict[tuple[float, int, tuple[str, ...], str], list[Run]] = {}
    for candidate, loss in runs:
        key = (
            candidate.lora_alpha,
            candidate.global_batch_size,
            candidate.target,
            candidate.variant,
        )
        groups.setdefault(key, []).append((candidate, loss))
    if not groups:
        raise ValueError(
            f"lr_prior from {where}: must hold finished LoRA trials, holds none; run the small sweep to its end"
        )

    def distance(
        key: tuple[float, int, tuple[str, ...], str],
    ) -> tuple[bool, bool, bool, float, float]:
        alpha, batch, target, variant = key
        batches = wanted.global_batch_size.options
        return (
            variant not in wanted.variant.options,
            alpha not in wanted.alphas(),
            target not in wanted.target.options,
            min(abs(math.log(batch / other)) for other in batches),
            min(loss for _, loss in groups[key]),
        )

    return groups[min(groups, key=distance)]


def _arms(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in their learning rate and seed alone."""
    arms: dict[Candidate, list[Run]] = {}
    for candidate, loss in runs:
        arms.setdefault(replace(candidate, learning_rate=1.0, seed=0), []).append((candidate, loss))
    return list(arms.values())


def _rates(runs: Sequence[Run]) -> list[float]:
    """Learning rates of the runs that did not diverge, ascending."""
    return sorted({candidate.learning_rate for candidate, loss in runs if math.isfinite(loss)})


def _fit(arm: Sequence[Run]) -> _Fit | Unsettled:
    points = [
        Point(learning_rate=candidate.learning_rate, seed=candidate.seed, loss=loss)
        for candidate, loss in arm
    ]
    noise = 0.0
    if len({point.seed for point in points}) == 1:
        # The fit wants two seeds. Without noise between them its interval is that of the misfit alone.
        points += [replace(point, seed=point.seed + 1) for point in points]
        noise = ONE_SEED_DECADES
    found = arm_optimum(points)
    if isinstance(found, Unsettled):
        return found
    middle = found.log10_lr
    below = math.hypot(middle - math.log10(found.low), noise)
    above = math.hypot(math.log10(found.high) - middle, noise)
    return _Fit(middle, middle - below, middle + above)


def _unsettled(why: Unsettled, arm: Sequence[Run], where: str) -> str:
    rates = _rates(arm)
    advice = {
        "low": f"extend its learning_rate below {rates[0]:.2e}",
        "high": f"extend its learning_rate above {rates[-1]:.2e}",
        "none": "run more learning rates, 10^0.25 apart, or more seeds",
    }[why.side]
    diverged = [candidate.learning_rate for candidate, loss in arm if not math.isfinite(loss)]
    if why.side == "high" and diverged:
        advice += f" (but below {min(diverged):.2e}, which diverged)"
    return (
        f"lr_prior from {where}: must hold an optimum inside its grid ({rates[0]:.2e} to {rates[-1]:.2e}); "
        f"rank {arm[0][0].lora_rank}: {why.reason}; {advice}"
    )


def width_factors(small_hidden: int, big_hidden: int) -> dict[str, float]:
    """What each published law multiplies a learning rate by between two widths, the doctrine's first.

    Source: doctrine.LR_LEVEL, doctrine.TINKER_EXPONENTS.
    """
    level = doctrine.full_ft_learning_rate
    factors = {"doctrine": level(big_hidden) / level(small_hidden)}
    for family in doctrine.TINKER_EXPONENTS.value:
        big, small = (
            doctrine.tinker_lora_learning_rate(hidden, family)
            for hidden in (big_hidden, small_hidden)
        )
        factors[f"tinker {family}"] = big / small
    return factors


def carried_prior(
    optimum: SmallOptimum, hidden_size: int, wanted: SearchSpace
) -> LearningRatePrior:
    """The small optimum at another width, with its interval. Formula and assumption: this module's head.

    Args:
        hidden_size: of the big model, >= 1.
        wanted: the big sweep's space, for what differs from the small one.
    """
    factors = width_factors(optimum.hidden_size, hidden_size)
    logs = {name: math.log10(factor) for name, factor in factors.items()}
    shift = logs["doctrine"]
    centre = optimum.log10_lr + shift - _variant_decades(optimum)
    below = math.hypot(optimum.log10_lr - optimum.low, shift - min(logs.values()))
    above = math.hypot(optimum.high - optimum.log10_lr, max(logs.values()) - shift)
    lora, low, high = 10**centre, 10 ** (centre - below), 10 ** (centre + above)
    return LearningRatePrior(
        name="carried",
        full_ft=lora / doctrine.LR_RATIO.value,
        lora=lora,
        extrapolated=False,
        source=_source(optimum, hidden_size, factors, (low, high), wanted),
        interval=(low, high),
    )


def _variant_decades(optimum: SmallOptimum) -> float:
    """log10 of what the optimum's variant does to a learning rate: a prior is plain LoRA's."""
    alpha = optimum.lora_alpha
    factors = [lr_factor(optimum.variant, alpha, rank, alpha) for rank in optimum.lora_ranks]
    return fmean(math.log10(factor) for factor in factors)


def _source(
    optimum: SmallOptimum,
    hidden_size: int,
    factors: dict[str, float],
    interval: tuple[float, float],
    wanted: SearchSpace,
) -> str:
    ranks = ", ".join(map(str, optimum.lora_ranks))
    low, high = 10**optimum.low, 10**optimum.high
    laws = ", ".join(f"{name} {factor:.3g}" for name, factor in factors.items())
    parts = [
        f"measured at hidden {optimum.hidden_size} in {optimum.where}: {10**optimum.log10_lr:.3g} (95% "
        f"{low:.3g} to {high:.3g}; {optimum.num_rates} learning rates, {optimum.num_seeds} seed(s), rank "
        f"{ranks}, alpha {optimum.lora_alpha:g}, batch {optimum.global_batch_size}, "
        f"{'+'.join(optimum.target)}{_variant_text(optimum)})",
        f"x {factors['doctrine']:.3g} to hidden {hidden_size}, {doctrine.LR_LEVEL.source}; interval "
        f"{interval[0]:.3g} to {interval[1]:.3g} with what the published laws leave open ({laws})",
    ]
    return "; ".join([*parts, *_differences(optimum, wanted)])


def _variant_text(optimum: SmallOptimum) -> str:
    if optimum.variant == PLAIN:
        return ""
    return f", {optimum.variant}: x {10 ** -_variant_decades(optimum):.3g} for plain LoRA"


def _differences(optimum: SmallOptimum, wanted: SearchSpace) -> list[str]:
    """What of the big sweep the small one did not try; nothing is corrected for it."""
    new = {
        "lora_rank": set(wanted.lora_rank.options) - set(optimum.lora_ranks),
        "lora_alpha": wanted.alphas() - {optimum.lora_alpha},
        "global_batch_size": set(wanted.global_batch_size.options) - {optimum.global_batch_size},
        "target": {"+".join(target) for target in wanted.target.options}
        - {"+".join(optimum.target)},
    }
    texts = [f"{key} {', '.join(map(str, sorted(v, key=_order)))}" for key, v in new.items() if v]
    return [f"NOT measured there, and not corrected for: {'; '.join(texts)}"] if texts else []


def _order(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value


def confirmation_rates(prior: LearningRatePrior) -> tuple[float, float, float] | None:
    """The three learning rates that test a carried optimum on the big model: both ends of its interval
    and the middle between them, ascending, to six digits. None for a prior without an interval.

    The middle, not the carried rate itself: where the widths lie apart that one is near an end, the
    doctrine's law being the steepest, and two of three trials would say the same.
    """
    if prior.interval is None:
        return None
    low, high = prior.interval
    return rounded_rate(low), rounded_rate(math.sqrt(low * high)), rounded_rate(high)
