"""What a measured ratio says of each law, and what would decide what it leaves open."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from search_spaces import doctrine
from search_spaces.studies.points import Unsettled
from search_spaces.studies.ratio import Ratio
from search_spaces.studies.student import t_quantile_95

Status = Literal["supported", "contradicted", "undecided"]
NARROW_FACTOR = 10**0.5
"""An interval wider than this, high over low, supports nothing: it holds half a decade."""
DIFFERENT_FACTOR = 1.25
"""Two predictions closer than this say the same: no quarter-decade grid tells them apart."""
_MOST_SEEDS = 40


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One law beside the measurement."""

    name: str
    predicted: float
    status: Status
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """On the main claim; `would_decide` is set when it is undecided."""

    status: Status
    sentence: str
    would_decide: str | None


def judge(ratio: Ratio | Unsettled, predictions: Mapping[str, float]) -> tuple[Claim, ...]:
    """Each law against the measured ratio.

    contradicted: the interval leaves the prediction out. supported: it holds it, is narrower than
    NARROW_FACTOR, and leaves out every other prediction that differs by more than DIFFERENT_FACTOR.
    undecided: anything else.

    Args:
        ratio: of one LoRA arm.
        predictions: the ratio that each law predicts for that arm, by its name; each > 0.

    Raises:
        ValueError: a prediction <= 0.
    """
    for name, predicted in predictions.items():
        if not predicted > 0:
            raise ValueError(f"a predicted ratio must be > 0, got {predicted} of {name!r}")
    return tuple(_claim(ratio, name, predictions) for name in predictions)


def _claim(ratio: Ratio | Unsettled, name: str, predictions: Mapping[str, float]) -> Claim:
    predicted = predictions[name]
    status: Status = "undecided"
    if isinstance(ratio, Unsettled):
        why = f"there is {_measured(ratio)}"
    elif not _holds(ratio, predicted):
        status = "contradicted"
        why = f"{_measured(ratio)} leaves it out"
    elif rivals := [f"{r} ({predictions[r]:.3g})" for r in _rivals(ratio, name, predictions)]:
        why = f"{_measured(ratio)} holds it, and {', '.join(rivals)} too"
    elif ratio.high / ratio.low > NARROW_FACTOR:
        why = f"{_measured(ratio)} holds it, but is wider than a factor of {NARROW_FACTOR:.2g}"
    else:
        status = "supported"
        why = f"{_measured(ratio)} holds it, and no law that differs"
    sentence = f"{name} predicts {predicted:.3g}: {status}, {why}."
    return Claim(name=name, predicted=predicted, status=status, sentence=sentence)


def _rivals(ratio: Ratio, name: str, predictions: Mapping[str, float]) -> list[str]:
    """Other predictions inside the interval that differ from a named one."""
    return [
        other
        for other, predicted in predictions.items()
        if _differ(predicted, predictions[name]) and _holds(ratio, predicted)
    ]


def _differ(one: float, other: float) -> bool:
    return max(one / other, other / one) > DIFFERENT_FACTOR


def _measured(ratio: Ratio | Unsettled) -> str:
    if isinstance(ratio, Unsettled):
        return f"no ratio ({ratio.reason})"
    return f"the measured {ratio.estimate:.3g} (95%: {ratio.low:.3g} to {ratio.high:.3g})"


def verdict(
    claims: Iterable[Claim],
    ratio: Ratio | Unsettled,
    name_of_main: str,
    *,
    steps: int | None = None,
) -> Verdict:
    """The verdict on the main law, in one sentence, with what would decide it where it is open.

    A study of fewer seeds or steps than the doctrine asks for decides nothing.

    Args:
        claims: of `judge`.
        ratio: what they were judged by.
        name_of_main: the law in question.
        steps: optimizer steps of a run, where known.

    Raises:
        ValueError: no claim of that name.
    """
    by_name = {claim.name: claim for claim in claims}
    if name_of_main not in by_name:
        raise ValueError(f"name_of_main must be one of {sorted(by_name)}, got {name_of_main!r}")
    main = by_name[name_of_main]
    missing = _too_small(ratio, steps)
    would_decide = [*missing.values(), *_open(main, by_name, ratio)]
    status, sentence = main.status, main.sentence
    if missing:
        status = "undecided"
        sentence = (
            f"{main.name} predicts {main.predicted:.3g}: undecided, {_measured(ratio)} comes from "
            f"too small a study ({' and '.join(missing)})."
        )
    elif status == "contradicted":
        sentence += _held(by_name, ratio)
    return Verdict(
        status=status,
        sentence=sentence,
        would_decide="; ".join(would_decide) if status == "undecided" else None,
    )


def _held(claims: Mapping[str, Claim], ratio: Ratio | Unsettled) -> str:
    """Which laws the interval holds, once it leaves the main one out."""
    if isinstance(ratio, Unsettled):
        return ""
    held = [f"{c.name} ({c.predicted:.3g})" for c in claims.values() if _holds(ratio, c.predicted)]
    return f" It holds {' and '.join(held)}." if held else " It holds no other law either."


def _holds(ratio: Ratio, predicted: float) -> bool:
    return ratio.low <= predicted <= ratio.high


def _too_small(ratio: Ratio | Unsettled, steps: int | None) -> dict[str, str]:
    """What a study has too little of, and what it must have."""
    found: dict[str, str] = {}
    least, seeds = doctrine.STUDY_LEAST.value
    if steps is not None and steps < least:
        found[f"runs of {steps} steps"] = (
            f"runs of at least {least} steps (under {doctrine.SHORT_RUN_STEPS.value} the ratio is "
            f"nearer {doctrine.LR_RATIO_SHORT.value:g})"
        )
    if isinstance(ratio, Ratio) and len(ratio.by_seed) < seeds:
        found[f"{len(ratio.by_seed)} seeds"] = f"at least {seeds} seeds"
    return found


def _open(main: Claim, claims: Mapping[str, Claim], ratio: Ratio | Unsettled) -> list[str]:
    """What would decide the main claim, for all that leaves it open."""
    if isinstance(ratio, Unsettled):
        if ratio.side == "none":
            return [f"more seeds or a finer grid ({ratio.reason})"]
        return [f"a grid that reaches further {_SIDES[ratio.side]} ({ratio.reason})"]
    found: list[str] = []
    differing = [c for c in claims.values() if _differ(c.predicted, main.predicted)]
    needed = _needed_half_width(main, differing, ratio)
    if main.status == "undecided" and needed is not None:
        found.append(_more_seeds(ratio, needed))
    same = [c.name for c in claims.values() if c is not main and c not in differing]
    confused = [c.name for c in differing if _holds(ratio, c.predicted)]
    if main.status == "undecided" and (same or confused):
        found.append(
            f"a width or alpha at which {main.name} and {' and '.join([*confused, *same])} lie "
            "further apart, where they depend on it"
        )
    return found


_SIDES = {"low": "down", "high": "up, in finer steps where runs diverge"}


def _needed_half_width(main: Claim, differing: Iterable[Claim], ratio: Ratio) -> float | None:
    """Decades to each side at which the interval would decide, were the estimate to stay."""

    def distance(claim: Claim) -> float:
        return abs(math.log10(claim.predicted / ratio.estimate))

    inside = [distance(c) for c in differing if _holds(ratio, c.predicted)]
    wide = [math.log10(NARROW_FACTOR) / 2] if ratio.high / ratio.low > NARROW_FACTOR else []
    if inside and min(inside) < distance(main):
        return distance(main)  # a rival is nearer: leaving the main law out decides
    return min([*inside, *wide], default=None)


def _more_seeds(ratio: Ratio, needed: float) -> str:
    """How many seeds bring the interval to a half width, the misfit of the curve staying."""
    seeds = max(len(ratio.by_seed), 2)
    half = math.log10(ratio.high / ratio.low) / 2
    noise = math.sqrt(max(half**2 - ratio.misfit_decades**2, 0.0))
    for more in range(seeds + 1, _MOST_SEEDS + 1):
        shrunk = noise * _t_over_root(more) / _t_over_root(seeds)
        if math.hypot(shrunk, ratio.misfit_decades) < needed:
            return f"about {more} seeds instead of {len(ratio.by_seed)}"
    return (
        f"a finer grid around both optima: the interval must shrink from a factor of "
        f"{10**half:.2g} to each side to {10**needed:.2g}, which {_MOST_SEEDS} seeds on this grid "
        "would not do"
    )


def _t_over_root(seeds: int) -> float:
    """Half width of an interval by seeds, up to a constant: noise is read off three points."""
    return t_quantile_95(2 * (seeds - 1)) / math.sqrt(seeds)
