"""What a sweep found, in plain words, and how sure that is. Every sentence follows from numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.choosing import choice_lines
from orchestration.effects import AXES, Level, axis_effect, seed_noise
from orchestration.lr_curves import (
    NAMES,
    RateCurve,
    axis_text,
    best_of,
    fit_dict,
    rate_curves,
    value_of,
    varied_axes,
)
from orchestration.objective import Objective
from orchestration.results import TrialRecord, objective_of_records
from orchestration.studies.axes import rate_text
from orchestration.studies.canvas import counted
from orchestration.studies.curves import interval_text, tolerance_text
from search_spaces.studies.points import Unsettled
from search_spaces.variants import PLAIN

SURE = 2 * 2**0.5
"""Differences between two trials of one seed each that lie this many standard deviations of a seed apart are beyond
what seeds do: two, of a difference."""


@dataclass(frozen=True)
class Found:
    """A sweep's trials and what is drawn from them.

    Args:
        plan: plan.json.
        best: the chosen trial.
    """

    plan: Mapping[str, Any]
    records: Sequence[TrialRecord]
    best: TrialRecord | None

    @property
    def score(self) -> Objective:
        return objective_of_records(self.records)

    @property
    def curves(self) -> list[RateCurve]:
        return rate_curves(self.records)

    @property
    def noise(self) -> float | None:
        return seed_noise(self.records)

    @property
    def second(self) -> TrialRecord | None:
        """The best of the candidates that are not the chosen one, whatever its seed."""
        if self.best is None:
            return None
        mine = self.best.but_for_seed
        return best_of(r for r in self.records if r.but_for_seed != mine)


def summary(found: Found) -> list[str]:
    """Paragraphs: the best; how sure it is; what rank and batch seem to do; what did not run to its end; what next."""
    if found.best is None or found.best.best is None:
        nothing = "No trial ended with a usable score: every one diverged, failed or was interrupted (reasons below)."
        paragraphs = [[nothing], _ends(found), _next(found)]
    else:
        sure = [*_over_base(found), *_over_second(found), *_place(found)]
        paragraphs = [_best(found), sure, _choice(found)]
        paragraphs += [_effects(found), _ends(found), _next(found)]
    return [" ".join(sentences) for sentences in paragraphs if sentences]


def described(record: TrialRecord, others: Sequence[TrialRecord]) -> str:
    """A trial by its learning rate and what the trials of a sweep differ in."""
    axes = [axis for axis in varied_axes(others) if axis != "global_batch_size"]
    if "variant" not in axes and record.settings.variant != PLAIN:
        axes.append("variant")
    parts = [axis_text(axis, value_of(record, axis)) for axis in axes]
    batch = axis_text("global_batch_size", record.candidate["global_batch_size"])
    return ", ".join(
        [*parts, f"learning_rate {rate_text(record.candidate['learning_rate'])}", batch]
    )


def _best(found: Found) -> list[str]:
    best = found.best
    assert best is not None
    assert best.best is not None
    return [
        f"Best: {described(best, found.records)}, with {found.score.key} "
        f"{found.score.text(best.best_loss)} after {after(best.best)}."
    ]


def _choice(found: Found) -> list[str]:
    """Why the best is the best, where that is not simply the best score, and what new seeds say."""
    lines = choice_lines(found.records, found.best)
    return [f"{line[0].upper()}{line[1:]}." for line in lines]


def after(row: Mapping[str, Any]) -> str:
    """How far a trial was at a row."""
    if "episodes" in row:
        return f"{row['episodes']:,} episodes of {row['examples']:,} prompts"
    return f"{row['examples']:,} examples"


def _over_base(found: Found) -> list[str]:
    best = found.best
    assert best is not None
    if best.base_loss is None:
        return ["What the untouched base scores was not measured."]
    gain, base = best.base_loss - best.best_loss, found.score.text(best.base_loss)
    if gain <= 0:
        return [
            f"This is not better than the untouched base ({base}): the learning rates are too high or too low."
        ]
    share = f", {gain / abs(best.base_loss):.1%}" if best.base_loss else ""
    return [f"That is {gain:.4f}{share} better than the untouched base ({base})."]


def _over_second(found: Found) -> list[str]:
    second = found.second
    assert found.best is not None
    if second is None:
        return ["No other candidate has a usable score to compare it with."]
    gap, noise = second.best_loss - found.best.best_loss, found.noise
    name = described(second, found.records)
    if gap < 0:
        return [
            f"{name} has a better {found.score.key}, by {-gap:.4f}: it was not what the best was chosen by."
        ]
    lead = f"The second ({name}) is {gap:.4f} behind"
    if noise is None:
        return [
            f"{lead}. One seed per candidate was run, and one seed decides nothing: differences below the noise "
            "between seeds, which nobody measured here, are no differences."
        ]
    between = f"what seeds of one candidate differ by (standard deviation {noise:.4f})"
    if gap > SURE * noise:
        return [f"{lead}, which is beyond {between}."]
    return [f"{lead}, which is within {between}: the two cannot be told apart."]


def _place(found: Found) -> list[str]:
    """Where the best lies in the grid of learning rates."""
    curve = next((c for c in found.curves if found.best in c.records), None)
    if curve is None or len({r.candidate["learning_rate"] for r in curve.records}) < 2:
        return ["One learning rate was tried there: nothing says whether it is a good one."]
    if curve.edge:
        return [
            f"Its learning rate is the {curve.edge} that was tried: the optimum may lie beyond the grid."
        ]
    where = "Its learning rate lies inside the grid"
    if isinstance(curve.optimum, Unsettled):
        return [f"{where}; where the optimum is was not fitted: {curve.optimum.reason}."]
    fit = fit_dict(curve.optimum)
    interval = interval_text(fit)
    sure = f" (95%: {interval})" if interval else " (one seed gives no interval)"
    return [
        f"{where}; the fit puts the optimum at {rate_text(fit['learning_rate'])}{sure}, and the rates from "
        f"{tolerance_text(fit)} are within {fit['tolerance_frac']:.1%} of it."
    ]


def _effects(found: Found) -> list[str]:
    sentences = [_effect(found, axis) for axis in AXES]
    return [sentence for sentence in sentences if sentence]


def _effect(found: Found, axis: str) -> str:
    """What a setting seems to do, by the best score at each of its values."""
    levels = axis_effect(found.records, axis)
    if not levels:
        return ""
    name, losses = NAMES[axis], [level.loss for level in levels]
    spread = max(losses) - min(losses)
    ends = f"{_level_text(axis, levels[0], found)} to {_level_text(axis, levels[-1], found)}"
    known = "one seed cannot say whether that is real"
    if found.noise is not None:
        beyond = "beyond" if spread > SURE * found.noise else "within"
        known = f"{beyond} what seeds differ by"
    return (
        f"Across all else, the best scores go from {ends}: {_trend(losses, name)}, {spread:.4f} between the best and "
        f"the worst ({known})."
    )


def _level_text(axis: str, level: Level, found: Found) -> str:
    return f"{found.score.text(level.loss)} at {axis_text(axis, level.value)}"


def _trend(losses: Sequence[float], name: str) -> str:
    if list(losses) == sorted(losses, reverse=True):
        return f"the larger the {name}, the better"
    if list(losses) == sorted(losses):
        return f"the smaller the {name}, the better"
    return "no order in it"


def _ends(found: Found) -> list[str]:
    """What never ran, and what did not run to its end."""
    discarded = found.plan["discarded"]
    rules = Counter(item["rule"] for item in discarded)
    why = ", ".join(f"{number} by the rule {rule}" for rule, number in sorted(rules.items()))
    sentences = []
    if discarded:
        sentences.append(
            f"{counted(len(discarded), 'candidate')} {_was(len(discarded))} discarded before any trial ({why})."
        )
    ended = Counter(record.status for record in found.records)
    told = {
        "stopped": f"{ended['stopped']} {_was(ended['stopped'])} stopped early by the scheduler",
        "diverged": f"{ended['diverged']} diverged",
        "failed": f"{ended['failed']} failed",
        "unfinished": f"{ended['unfinished']} did not end",
    }
    parts = [text for status, text in told.items() if ended[status]]
    if parts:
        sentences.append(f"Of {counted(len(found.records), 'trial')}, {', '.join(parts)}.")
    return sentences


def _was(number: int) -> str:
    return "was" if number == 1 else "were"


def _next(found: Found) -> list[str]:
    """What to do now, the most pressing alone."""
    return [f"Next: {_advice(found)}."]


def _advice(found: Found) -> str:
    best, statuses = found.best, [record.status for record in found.records]
    if "unfinished" in statuses:
        return "let it end; `tenfold resume` goes on"
    if best is None:
        if statuses and set(statuses) == {"diverged"}:
            return "lower the learning rates, by ten times at least"
        return "mend what the reasons name, and run it again"
    if best.base_loss is not None and best.best_loss >= best.base_loss:
        return "try learning rates ten times lower and ten times higher, and look at the data"
    curve = next((c for c in found.curves if best in c.records), None)
    if curve is not None and curve.edge:
        side = "higher" if curve.edge == "highest" else "lower"
        return f"extend learning_rate by two or three {side} values and run it again"
    if (advice := _rank_advice(found, best)) is not None:
        return advice
    return _seed_advice(found)


def _rank_advice(found: Found, best: TrialRecord) -> str | None:
    """To try higher ranks, where the highest is best by more than seeds are known to do."""
    levels, noise = axis_effect(found.records, "lora_rank"), found.noise
    if not levels or noise is None or levels[-1].value != best.candidate["lora_rank"]:
        return None
    if levels[-2].loss - levels[-1].loss <= SURE * noise:
        return None
    return "the highest rank is best: try higher ones"


def _seed_advice(found: Found) -> str:
    second, noise = found.second, found.noise
    assert found.best is not None
    if second is None:
        return "compare it with other learning rates before you trust it"
    if noise is None:
        return (
            "run the best and the second on other seeds (confirm: 3) before you believe their order; the adapter in "
            "best/ can be used"
        )
    if second.best_loss - found.best.best_loss <= SURE * noise:
        return "take the cheaper of the two, or run both on more seeds"
    return "nothing here asks for another run; use the adapter in best/"
