"""Ray Tune's schedulers, made to outlive a driver: each decision goes into a ledger, and a new
scheduler starts in the state to which the ledger's records lead."""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

from orchestration.rungs import (
    CLOCK,
    CONTINUE,
    METRIC,
    MODE,
    STOP,
    Decision,
    RungLedger,
    RungRecord,
)
from trainers.metrics import DIVERGED_LOSS


def make_scheduler(
    kind: str, grace_period: int, max_t: int, reduction_factor: int, ledger: RungLedger
) -> "RecordedScheduler":
    """Ray Tune's scheduler with examples seen as its clock, in the state that the ledger holds.

    Args:
        kind: fifo, asha or median.
        grace_period: examples that every trial sees, in [1, max_t].
        max_t: examples of a whole trial; asha stops a trial there.
        reduction_factor: of asha, >= 2.
        ledger: of this run; each new decision is appended to it.

    Raises:
        ValueError: a grace period above the budget (Ray only asserts it: under -O nothing would
            stop); a ledger that is broken, or that another scheduler wrote.
    """
    if kind == "fifo":
        return RecordedScheduler(FIFOScheduler(), ledger, max_t)
    if grace_period > max_t:
        raise ValueError(
            f"grace_period must be at most the budget ({max_t} examples), got {grace_period}"
        )
    goal: dict[str, Any] = {"time_attr": CLOCK, "metric": METRIC, "mode": MODE}
    if kind == "median":
        return RecordedScheduler(
            MedianStoppingRule(**goal, grace_period=grace_period), ledger, max_t
        )
    return RecordedScheduler(
        ASHAScheduler(
            **goal, grace_period=grace_period, max_t=max_t, reduction_factor=reduction_factor
        ),
        ledger,
        max_t,
    )


@dataclass(frozen=True)
class _NamedTrial:
    """What Ray's scheduler gets in a Tune trial's place: ASHA keys its rungs by trial_id, the median
    rule its results by the trial itself, and both must be the same trial after a restart."""

    trial_id: str


class _NobodyWaits:
    """What it gets in the controller's place. The median rule would pause a trial whenever it has too
    few results and others wait, which no ledger could repeat and our trials cannot do."""

    def get_live_trials(self) -> list[Any]:
        return []


class RecordedScheduler(FIFOScheduler):
    """A scheduler of Ray's with a memory on disk; all decisions are Ray's own.

    A result that was decided before (a retried actor, a rung repeated after a resume) gets the same
    answer and changes nothing. A trial's end reaches Ray's scheduler with its last result, in the
    same step: Tune may be later, and then the order of events would not be in the ledger.

    A trial that has used up its budget ends by itself, and Tune is not told to stop it: Tune would kill its
    actor, and Ray Train would see workers die where all is well.

    Args:
        max_t: examples of a whole trial.
    """

    def __init__(self, inner: FIFOScheduler, ledger: RungLedger, max_t: int) -> None:
        super().__init__()
        self._max_t = max_t
        self._metric = METRIC
        self.withdrawn: Container[str] = ()
        """Trials that end with their next result, whatever it is: somebody stopped them."""
        self._inner: Any = inner
        self._ledger = ledger
        self._added: set[str] = set()
        self._ended: set[str] = set()
        self._decided: dict[tuple[str, int], Decision] = {}
        self._replay(ledger.records())

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Whether Tune's metric and mode are ours."""
        return metric in (None, METRIC) and mode in (None, MODE)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._add(_name(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> Decision:
        if not _has_score(result):
            return CONTINUE
        if not math.isfinite(result[METRIC]):
            return STOP  # any comparison with NaN is false, and Ray would go on
        examples = int(result[CLOCK])
        name, loss = _name(trial), float(result[METRIC])
        decision = self._judge(name, examples, loss)
        if examples >= self._max_t:
            return CONTINUE
        if name in self.withdrawn:
            self.complete(name, examples, loss)
            return STOP
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        # Tune asks for no decision on a result that says done; it comes here alone.
        if _has_score(result) and math.isfinite(result[METRIC]):
            self.complete(_name(trial), int(result[CLOCK]), float(result[METRIC]))

    def complete(self, name: str, examples: int, loss: float) -> None:
        """A trial ended by itself, with a last result that may be known or not."""
        if self._judge(name, examples, loss) == CONTINUE:
            self._end(name, examples, loss)
            self._write(name, examples, loss, STOP)

    def debug_string(self) -> str:
        return self._inner.debug_string()

    def _judge(self, name: str, examples: int, loss: float) -> Decision:
        """The decision on a result, from memory where there is one."""
        if name in self._ended:
            return STOP
        if (name, examples) not in self._decided:
            self._write(name, examples, loss, self._decide(name, examples, loss))
        return self._decided[name, examples]

    def _decide(self, name: str, examples: int, loss: float) -> Decision:
        if loss >= DIVERGED_LOSS:
            # In a rung of two it would lift the cut-off, an interpolation, above any real loss.
            self._ended.add(name)
            self._decided[name, examples] = STOP
            return STOP
        self._add(name)
        result = {CLOCK: examples, METRIC: loss}
        decision = self._inner.on_trial_result(_NobodyWaits(), _NamedTrial(name), result)
        self._decided[name, examples] = decision
        if decision == STOP:
            self._end(name, examples, loss)
        return decision

    def _add(self, name: str) -> None:
        if name not in self._added:
            self._added.add(name)
            self._inner.on_trial_add(_NobodyWaits(), _NamedTrial(name))

    def _end(self, name: str, examples: int, loss: float) -> None:
        self._ended.add(name)
        result = {CLOCK: examples, METRIC: loss}
        self._inner.on_trial_complete(_NobodyWaits(), _NamedTrial(name), result)

    def _write(self, name: str, examples: int, loss: float, decision: Decision) -> None:
        self._ledger.append(
            RungRecord(trial=name, examples=examples, eval_loss=loss, decision=decision)
        )

    def _replay(self, records: Sequence[RungRecord]) -> None:
        for line, record in enumerate(records, 1):
            found = self._repeat(record)
            if found == record.decision:
                continue
            if self._ledger.damaged:
                self._follow(record)
            else:
                raise ValueError(
                    f"{self._ledger.path}:{line}: must be this scheduler's decision ({found}), got "
                    f"{record.decision} for {record.trial}; resume with the scheduler, grace_period, "
                    "reduction_factor, budget and Ray version that the run began with"
                )

    def _follow(self, record: RungRecord) -> None:
        """Takes a decision as it was: with a record lost, Ray's scheduler cannot come to it by itself."""
        name, examples, loss = record.trial, record.examples, record.eval_loss
        self._decided[name, examples] = record.decision
        if record.decision == STOP and name not in self._ended:
            self._end(name, examples, loss)
        elif record.decision == CONTINUE and name in self._ended:
            self._ended.discard(name)
            self._added.discard(name)
            self._add(name)

    def _repeat(self, record: RungRecord) -> str:
        """What this scheduler does on a record, in its state after all the records before."""
        name, examples, loss = record.trial, record.examples, record.eval_loss
        if name in self._ended:
            return "none, as the trial has ended"
        if (name, examples) not in self._decided:
            return self._decide(name, examples, loss)
        self._end(name, examples, loss)
        return STOP


def _has_score(result: dict[str, Any]) -> bool:
    return CLOCK in result and METRIC in result


def _name(trial: Any) -> str:
    """Our name of a Tune trial."""
    return trial.config["trial"]["name"]
