"""The arms of a study beside each other: points, optima, curves."""

import math
import statistics
from dataclasses import dataclass
from functools import cached_property

from orchestration.objective import Objective, objective_of
from orchestration.planning import Plan
from orchestration.results import TrialRecord
from orchestration.studies.agenda import points_of, records_of
from orchestration.studies.arms import Arm
from orchestration.studies.config import StudyConfig
from search_spaces.studies.optimum import ArmOptimum, arm_optimum
from search_spaces.studies.points import Point, Unsettled

Curve = list[tuple[int, float, float]]
"""(examples, mean eval_loss, standard deviation over seeds)."""


@dataclass(frozen=True)
class Comparison:
    """Everything that a conclusion is drawn from."""

    kind: str
    config: StudyConfig
    plan: Plan
    arms: tuple[Arm, ...]
    records: tuple[TrialRecord, ...]

    @property
    def full_arms(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.full_finetune]

    @property
    def lora_arms(self) -> list[Arm]:
        return [arm for arm in self.arms if not arm.full_finetune]

    @property
    def score(self) -> Objective:
        """What the arms are judged by."""
        return objective_of(self.config.method)

    @property
    def unit(self) -> str:
        """What a budget counts."""
        return "prompts" if self.config.method == "rl" else "examples"

    def full_of(self, arm: Arm) -> Arm:
        """The full-fine-tuning arm that a LoRA arm is compared with: that of its batch."""
        batch = arm.template.global_batch_size
        return next(a for a in self.full_arms if a.template.global_batch_size == batch)

    def points(self, arm: Arm) -> list[Point]:
        return points_of(arm, self.records)

    @cached_property
    def _optima(self) -> dict[str, ArmOptimum | Unsettled]:
        tolerance = self.config.tolerance_frac
        return {
            arm.label: arm_optimum(self.points(arm), tolerance_frac=tolerance) for arm in self.arms
        }

    def optimum(self, arm: Arm) -> ArmOptimum | Unsettled:
        return self._optima[arm.label]

    def curve(self, arm: Arm) -> Curve:
        """The learning curve of `best_runs`."""
        runs = self.best_runs(arm)
        return mean_curve(runs) if runs else []

    def best_runs(self, arm: Arm) -> list[TrialRecord]:
        """The seeds at the arm's best learning rate, as near as it was measured with most of them; none where the
        best lies on an edge or beside a diverged run. A best rate whose interval is not bounded has runs all the
        same: between such rates the losses hardly differ."""
        found = self.optimum(arm)
        records = [r for r in records_of(arm, self.records) if r.status == "finished"]
        if not records or (isinstance(found, Unsettled) and found.side != "none"):
            return []
        by_rate: dict[float, list[TrialRecord]] = {}
        for record in records:
            by_rate.setdefault(record.candidate["learning_rate"], []).append(record)
        most = max(len(runs) for runs in by_rate.values())
        full = {rate: runs for rate, runs in by_rate.items() if len(runs) == most}
        if isinstance(found, Unsettled):
            return min(full.values(), key=lambda runs: mean_curve(runs)[-1][1])
        return full[min(full, key=lambda rate: abs(math.log(rate / found.learning_rate)))]


def mean_curve(records: list[TrialRecord]) -> Curve:
    """Mean and spread over runs, at the evaluations that all of them have."""
    rows = [{row["examples"]: row["eval_loss"] for row in record.rows} for record in records]
    shared = sorted(set(rows[0]).intersection(*rows[1:]))
    found: Curve = []
    for examples in shared:
        losses = [row[examples] for row in rows]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        found.append((examples, statistics.fmean(losses), spread))
    return found
