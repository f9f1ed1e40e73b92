"""capacity: what the trials of a study say of the rule of 2 bits for each parameter."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.studies.capacity import FactTrial, Recipe
from orchestration.studies.figures import figure, series
from search_spaces import doctrine
from search_spaces.studies.stored_bits import LEAK_BITS, LoadPoint, Peak, peak_of

(LAW_EXPOSURES, RULE), (FEW_EXPOSURES, FEW_BITS) = doctrine.BITS_AT_EXPOSURES.value
FALLEN_FRAC = 0.9
"""Below this part of its peak a curve has fallen at its end."""
NUM_BOUND_POINTS = 25


@dataclass(frozen=True, kw_only=True)
class _Load:
    """One rank at one load, at the learning rate that stored most."""

    trials: tuple[FactTrial, ...]
    on_edge: bool

    @property
    def first(self) -> FactTrial:
        return self.trials[0]

    @property
    def point(self) -> LoadPoint:
        params = self.first.adapter_params
        stored = tuple((trial.stored or 0.0) / params for trial in self.trials)
        return LoadPoint(load=self.first.load, stored=stored)


def findings(trials: Sequence[FactTrial], recipe: Recipe) -> dict[str, Any]:
    """Verdict, claims, tables, figures, protocol and limits of a study's trials."""
    curves = {rank: _curve(trials, rank) for rank in sorted({trial.lora_rank for trial in trials})}
    curves = {rank: curve for rank, curve in curves.items() if curve}
    peaks = {rank: peak_of([load.point for load in curve]) for rank, curve in curves.items()}
    return {
        "verdict": _verdict(peaks, recipe),
        "claims": [_claim(rank, peak, recipe) for rank, peak in peaks.items()],
        "tables": [_loads_table(curves), _trials_table(trials)],
        "figures": [_picture(curves)] if curves else [],
        "protocol": _protocol(recipe),
        "limits": _limits(curves, recipe),
    }


def _curve(trials: Sequence[FactTrial], rank: int) -> list[_Load]:
    """The loads of a rank that have a finished trial, ascending."""
    own = [trial for trial in trials if trial.lora_rank == rank]
    loads = (_best(_where(own, "num_facts", num)) for num in sorted({t.num_facts for t in own}))
    return [load for load in loads if load is not None]


def _best(trials: Sequence[FactTrial]) -> _Load | None:
    """The learning rate with the highest mean over seeds, of those that finished most seeds."""
    done = [trial for trial in trials if trial.stored is not None]
    if not done:
        return None
    rates = sorted({trial.learning_rate for trial in trials})
    found = [_where(done, "learning_rate", rate) for rate in rates]
    best = max((group for group in found if group), key=_rating)
    edges = (rates[0], rates[-1]) if len(rates) > 1 else rates
    return _Load(trials=tuple(best), on_edge=best[0].learning_rate in edges)


def _where(trials: Iterable[FactTrial], name: str, value: Any) -> list[FactTrial]:
    return [trial for trial in trials if getattr(trial, name) == value]


def _rating(group: Sequence[FactTrial]) -> tuple[int, float]:
    return len(group), sum(trial.stored or 0.0 for trial in group) / len(group)


def _status(peak: Peak, recipe: Recipe) -> str:
    """What one rank says of the rule. Fewer exposures than the rule's cannot contradict it."""
    if peak.stored >= RULE:
        return "supported"
    return "undecided" if peak.rising or recipe.exposures < LAW_EXPOSURES else "contradicted"


def _verdict(peaks: dict[int, Peak], recipe: Recipe) -> dict[str, Any]:
    if not peaks:
        return _said("undecided", "No trial has finished.", "a run to its end")
    rank, best = max(peaks.items(), key=lambda item: item[1].stored)
    sentence = (
        f"Adapters store {best.stored:.2f} bits/parameter at most (rank {rank}, {best.load:.2f} known "
        f"bits/parameter, {recipe.exposures} exposures), {best.stored / RULE:.0%} of the rule's {RULE}"
    )
    rising = [f"rank {rank}: {peak.rising}" for rank, peak in peaks.items() if peak.rising]
    if best.stored >= RULE:
        return _said("supported", f"{sentence}.", None)
    if rising:
        sentence += f"; the curve has not levelled off ({'; '.join(rising)})."
        return _said("undecided", sentence, "larger loads, at more exposures")
    if recipe.exposures < LAW_EXPOSURES:
        sentence += (
            f", where the curves have levelled off; the rule is for {LAW_EXPOSURES:,} exposures, so it is "
            "neither supported nor contradicted, but at this budget a plan cannot count on it."
        )
        return _said("measured", sentence, f"{LAW_EXPOSURES:,} exposures at the same loads")
    return _said("contradicted", f"{sentence}, where the curves have levelled off.", None)


def _said(status: str, sentence: str, would_decide: str | None) -> dict[str, Any]:
    return {"status": status, "sentence": sentence, "would_decide": would_decide}


def _claim(rank: int, peak: Peak, recipe: Recipe) -> dict[str, Any]:
    status = _status(peak, recipe)
    end = f"still rising: {peak.rising}" if peak.rising else "levelled off"
    return {
        "name": f"{RULE} bits/parameter",
        "arm": f"r{rank}",
        "predicted": float(RULE),
        "measured": peak.stored,
        "low": peak.low,
        "high": peak.high,
        "status": status,
        "sentence": f"rank {rank} stores {peak.stored:.3f} bits/parameter after {recipe.exposures} exposures "
        f"({end})",
    }


def _loads_table(curves: dict[int, list[_Load]]) -> dict[str, Any]:
    names = ("rank", "parameters", "facts", "known bits", "known bits/parameter", "learning rate")
    names += ("stored bits", "stored bits/parameter", "part of the known bits")
    names += ("base, untouched", "never shown")
    return {
        "title": "Bits stored, at the learning rate that stores most",
        "note": "Means over seeds. The last two columns must not be above 0 by more than chance: bits of "
        "the facts in the untouched base, and bits in the adapter of facts that it was never shown. What "
        "is worse than a uniform guess is negative.",
        "headers": [[name, True] for name in names],
        "rows": [_load_cells(load) for curve in curves.values() for load in curve],
    }


def _load_cells(load: _Load) -> list[str]:
    first, point = load.first, load.point
    return [
        str(first.lora_rank),
        f"{first.adapter_params:,}",
        f"{first.num_facts:,}",
        f"{first.known_bits:,.0f}",
        f"{first.load:.3f}",
        f"{first.learning_rate:.2e}" + (" (edge)" if load.on_edge else ""),
        f"{point.mean * first.adapter_params:,.0f}",
        f"{point.mean:.3f}",
        f"{point.mean / point.load:.1%}",
        _mean_text(trial.before for trial in load.trials),
        _mean_text(trial.control for trial in load.trials),
    ]


def _mean_text(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):,.0f}" if known else ""


def _trials_table(trials: Sequence[FactTrial]) -> dict[str, Any]:
    headers = [["rank", True], ["facts", True], ["learning rate", True], ["seed", True]]
    headers += [["stored bits", True], ["stored bits/parameter", True], ["end", False]]
    order = sorted(trials, key=lambda t: (t.lora_rank, t.num_facts, t.learning_rate, t.seed))
    return {
        "title": "Every trial",
        "note": None,
        "headers": headers,
        "rows": [_trial_cells(trial) for trial in order],
    }


def _trial_cells(trial: FactTrial) -> list[str]:
    stored = trial.stored
    return [
        str(trial.lora_rank),
        f"{trial.num_facts:,}",
        f"{trial.learning_rate:.2e}",
        str(trial.seed),
        "" if stored is None else f"{stored:,.0f}",
        "" if stored is None else f"{stored / trial.adapter_params:.3f}",
        f"{trial.status}: {trial.reason}" if trial.reason else trial.status,
    ]


def _picture(curves: dict[int, list[_Load]]) -> dict[str, Any]:
    loads = [load.first.load for curve in curves.values() for load in curve]
    return figure(
        "Bits stored for each adapter parameter",
        "known bits of the facts for each adapter parameter",
        "stored bits for each adapter parameter",
        [*(_series(rank, curve) for rank, curve in curves.items()), _bound(loads)],
        x_log=True,
        hlines=[{"y": RULE, "text": f"{RULE} bits/parameter"}],
    )


def _series(rank: int, curve: list[_Load]) -> dict[str, Any]:
    points = [load.point for load in curve]
    many = any(len(point.stored) > 1 for point in points)
    return series(
        f"rank {rank}",
        [point.load for point in points],
        [max(0.0, point.mean) for point in points],
        low=[max(0.0, min(point.stored)) for point in points] if many else None,
        high=[max(0.0, *point.stored, 0.0) for point in points] if many else None,
    )


def _bound(loads: Sequence[float]) -> dict[str, Any]:
    """stored = known, up to a little above the rule: beyond it the line would flatten the picture."""
    low = min(loads)
    high = max(low, min(max(loads), 1.2 * RULE))
    steps = [low * (high / low) ** (i / (NUM_BOUND_POINTS - 1)) for i in range(NUM_BOUND_POINTS)]
    return series("all there is to store", steps, steps, mode="lines", dash="dash")


def _protocol(recipe: Recipe) -> list[list[str]]:
    fact_bits = recipe.facts(1).known_bits
    return [
        [
            "facts",
            f"a key of {recipe.num_key_words} words, a value of {recipe.num_symbols} symbols drawn uniformly "
            f"from {recipe.alphabet_size}: {fact_bits:g} bits each. Every symbol is one token; keys say nothing "
            "of values",
        ],
        [
            "stored bits",
            "known bits less what the values cost under the model's own probabilities, over all facts and all "
            "loss-bearing tokens. The end token holds no bits, and its cost counts against what is stored",
        ],
        [
            "upper bound",
            "checked for every trial: not more than the known bits, and of facts with the same keys and other "
            f"values, which were never shown, at most {LEAK_BITS:g} bits; as much of all facts in the untouched "
            f"base (the chance of more is 2^-{LEAK_BITS:g}, unless there is a leak)",
        ],
        [
            "training",
            f"{recipe.exposures} exposures of each fact, batches of {recipe.global_batch_size}, AdamW without "
            f"weight decay, gradient norm clipped at {recipe.max_grad_norm:g}, {recipe.lr_schedule} schedule with "
            f"warm-up {recipe.warmup:g}, fp32, base frozen",
        ],
        [
            "adapters",
            f"{'+'.join(recipe.target)}, alpha {recipe.lora_alpha:g}, ranks {_list(recipe.lora_ranks)}, seeds "
            f"{_list(recipe.seeds)}",
        ],
        [
            "learning rates",
            f"{_list(recipe.learning_rates)}; at each load the one that stores most counts",
        ],
    ]


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _limits(curves: dict[int, list[_Load]], recipe: Recipe) -> list[str]:
    found = [
        "The rule was found in pretraining of all parameters of a model. Here a frozen base must lend what it "
        "can to an adapter; another base, target or number of exposures stores another number of bits.",
        "Stored bits are a lower bound: longer training or a better learning rate may store more.",
    ]
    if recipe.exposures < LAW_EXPOSURES:
        found.append(
            f"{recipe.exposures} exposures; the rule's {RULE} bits/parameter took {LAW_EXPOSURES:,}, and "
            f"{FEW_EXPOSURES} gave about {FEW_BITS}."
        )
    edges = [
        f"rank {rank} at {load.first.load:.2f} known bits/parameter"
        for rank, curve in curves.items()
        for load in curve
        if load.on_edge
    ]
    if edges:
        found.append(f"The best learning rate is at the edge of those tried: {'; '.join(edges)}.")
    found += [
        f"Rank {rank} stores less at its largest load than at a smaller one: there the training ends, not the "
        "adapter's room."
        for rank, curve in curves.items()
        if curve[-1].point.mean < FALLEN_FRAC * max(load.point.mean for load in curve)
    ]
    if len(recipe.seeds) < 2:
        found.append("One seed: differences between neighbouring points are not settled.")
    return found
