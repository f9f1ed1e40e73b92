"""rl: how far reinforcement learning brings each rank and full fine-tuning, and the ratio of the best learning
rates."""

import statistics
from dataclasses import dataclass
from typing import Any

from orchestration.results import TrialRecord
from orchestration.studies import lr_ratio
from orchestration.studies.arms import Arm
from orchestration.studies.comparison import Comparison
from orchestration.studies.pictures import best_scores, learning_curves
from search_spaces.studies.student import t_quantile_95

CLAIM = "learns beyond the seeds' spread"


@dataclass(frozen=True, kw_only=True)
class Gain:
    """An arm at its best learning rate, over the seeds that ran it.

    Attributes:
        base: held-out reward of the untouched base, mean.
        rewards: of each seed at the end of the budget.
        mean: gain over the base, mean over seeds; its 95% interval (Student's t, seeds paired) is low to high.
    """

    arm: Arm
    learning_rate: float
    base: float
    rewards: list[float]
    mean: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.rewards)


def conclusion(compared: Comparison) -> dict[str, Any]:
    """Verdict, claims, tables and pictures."""
    parts = lr_ratio.conclusion(compared)
    gains = {arm.label: gain_of(compared, arm) for arm in compared.arms}
    parts["verdict"]["sentence"] = f"{_sentence(gains)} {parts['verdict']['sentence']}"
    return parts | {
        "claims": [_claim(arm.label, gains[arm.label]) for arm in compared.arms] + parts["claims"],
        "tables": [_table(gains), *parts["tables"]],
        "figures": [learning_curves(compared), best_scores(compared), *parts["figures"]],
        "limits": [
            "One task, whose reward is checked by a program: which learning rate is best, and how much a rank holds, "
            "can differ on another.",
        ],
    }


def gain_of(compared: Comparison, arm: Arm) -> Gain | None:
    """None where an arm has no best learning rate, or fewer than two seeds ran it."""
    runs = [run for run in compared.best_runs(arm) if run.base_loss is not None]
    if len(runs) < 2:
        return None
    gains = [_last(compared, run) - _base(compared, run) for run in runs]
    mean = statistics.fmean(gains)
    half = t_quantile_95(len(gains) - 1) * statistics.stdev(gains) / len(gains) ** 0.5
    return Gain(
        arm=arm,
        learning_rate=runs[0].candidate["learning_rate"],
        base=statistics.fmean(_base(compared, run) for run in runs),
        rewards=[_last(compared, run) for run in runs],
        mean=mean,
        low=mean - half,
        high=mean + half,
    )


def _last(compared: Comparison, run: TrialRecord) -> float:
    return compared.score.of(run.rows[-1]["eval_loss"])


def _base(compared: Comparison, run: TrialRecord) -> float:
    assert run.base_loss is not None
    return compared.score.of(run.base_loss)


def _sentence(gains: dict[str, Gain | None]) -> str:
    found = [
        f"{label} from {gain.base:.2f} to {statistics.fmean(gain.rewards):.2f} (seeds' spread {gain.spread:.3f})"
        for label, gain in gains.items()
        if gain
    ]
    return f"Held-out reward at the best learning rate: {', '.join(found) or 'none settled'}."


def _claim(label: str, gain: Gain | None) -> dict[str, Any]:
    if gain is None:
        status, why = "undecided", "no learning rate that is best and that two seeds ran."
    elif gain.low > 0:
        status, why = "supported", "the interval of the gain in held-out reward lies above 0."
    else:
        status = "contradicted" if gain.high < 0 else "undecided"
        why = "the interval of the gain in held-out reward does not lie above 0."
    return {
        "name": CLAIM,
        "arm": label,
        "predicted": None,
        "measured": gain and gain.mean,
        "low": gain and gain.low,
        "high": gain and gain.high,
        "status": status,
        "sentence": f"{CLAIM}: {status}, {why}",
    }


def _table(gains: dict[str, Gain | None]) -> dict[str, Any]:
    headers = [["arm", False], ["learning_rate", True], ["reward of the base", True]]
    headers += [["reward", True], ["seeds' spread", True], ["gain", True], ["95% interval", True]]
    rows = []
    for label, gain in gains.items():
        cells = ["none is best"] + [""] * 5
        if gain:
            reward = statistics.fmean(gain.rewards)
            cells = [f"{gain.learning_rate:.2e}", f"{gain.base:.3f}", f"{reward:.3f}"]
            cells += [f"{gain.spread:.3f}", f"{gain.mean:+.3f}"]
            cells += [f"{gain.low:+.3f} to {gain.high:+.3f}"]
        rows.append([label, *cells])
    return {
        "title": "Held-out reward by arm",
        "note": "At the measured learning rate next to each arm's best, at the end of the budget, mean over seeds. An "
        "interval is Student's t of the seeds' own gains.",
        "headers": headers,
        "rows": rows,
    }
