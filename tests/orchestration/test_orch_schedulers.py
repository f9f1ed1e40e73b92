"""Schedulers with a memory: decisions by hand, equal to Ray's own, and the same after any restart."""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

from orchestration.rungs import RungLedger, stopped_trials
from orchestration.schedulers import make_scheduler
from trainers.metrics import DIVERGED_LOSS

KINDS = ("fifo", "asha", "median")
TUNE_IDS = itertools.count()
WAITING = SimpleNamespace(get_live_trials=lambda: [SimpleNamespace(status="PENDING")])
"""A controller with a trial that waits: the median rule's reason to pause another."""


@pytest.fixture
def ledger(tmp_path: Path) -> RungLedger:
    return RungLedger(tmp_path / "rungs.jsonl")


def scheduler_of(kind: str, ledger: RungLedger, *, grace_period=1, max_t=9, reduction_factor=4):
    return make_scheduler(kind, grace_period, max_t, reduction_factor, ledger)


class TuneTrial:
    """A Tune trial of ours, with an id that no other attempt has."""

    def __init__(self, name: str) -> None:
        self.trial_id = f"tune{next(TUNE_IDS)}"
        self.config = {"trial": {"name": name}}


def result(examples: int, loss: float) -> dict:
    return {"examples": examples, "eval_loss": loss, "training_iteration": 1}


def train(scheduler, name: str, losses: list[float]) -> int:
    """Runs one trial to its end as Tune does; returns how many results it gave."""
    trial = TuneTrial(name)
    scheduler.on_trial_add(WAITING, trial)
    for examples, loss in enumerate(losses, 1):
        found = result(examples, loss)
        if scheduler.on_trial_result(WAITING, trial, found) == "STOP" or examples == len(losses):
            scheduler.on_trial_complete(WAITING, trial, found)
            return examples
    return 0


def train_all(scheduler, losses: list[float], num_results: int) -> list[int]:
    """One trial after another, each with a constant loss."""
    return [train(scheduler, f"t{i}", [loss] * num_results) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        # Alone at a rung a trial goes on, so the order decides (seen on Ray itself).
        ([9, 5, 1], [9, 9, 9]),
        ([1, 5, 9], [9, 1, 1]),
        ([1, 1, 1], [9, 9, 9]),  # not below the cut-off
        ([1], [9]),
    ],
)
def test_asha_one_at_a_time_constant_losses_depends_on_the_order(ledger, losses, expected):
    assert train_all(scheduler_of("asha", ledger), losses, 9) == expected


def test_asha_cut_off_is_the_quantile_of_what_the_rung_holds(ledger):
    # Rungs 1, 2, 4. At 1, 2.5 meets 3 and 1: their median is 2; 2 meets 3, 1 and 2.5: 2.5. At 2 the
    # last meets 3 and 1 again: it is the median itself.
    scheduler = scheduler_of("asha", ledger, max_t=4, reduction_factor=2)
    assert train_all(scheduler, [3, 1, 2.5, 2], 4) == [4, 4, 1, 4]


@pytest.mark.parametrize(
    ("order", "num_stopped"), [([1, 2, 3, 4], 3), ([4, 3, 2, 1], 0), ([2, 1, 4, 3], 2)]
)
def test_asha_in_lockstep_falling_losses_stops_by_order(ledger, order, num_stopped):
    # Rungs 1, 2. Order 2, 1, 4, 3: 4 is below the median of 2 and 1, 3 below that of 2, 1 and 4.
    scheduler = scheduler_of("asha", ledger, max_t=3, reduction_factor=2)
    trials = {number: TuneTrial(f"t{number}") for number in order}
    for trial in trials.values():
        scheduler.on_trial_add(WAITING, trial)
    for examples in (1, 2):
        for number, trial in list(trials.items()):
            found = result(examples, number - examples / 10)
            if scheduler.on_trial_result(WAITING, trial, found) == "STOP":
                scheduler.on_trial_complete(WAITING, trial, found)
                del trials[number]
    assert len(order) - len(trials) == num_stopped


def test_asha_lets_a_trial_at_its_budget_end_by_itself(ledger):
    # Tune would kill the actor of a trial that it is told to stop, in the middle of its own end.
    scheduler, trial = scheduler_of("asha", ledger), TuneTrial("a")
    scheduler.on_trial_add(WAITING, trial)
    assert scheduler.on_trial_result(WAITING, trial, result(9, 1.0)) == "CONTINUE"
    assert stopped_trials(ledger.records()) == {"a"}
    scheduler.on_trial_complete(WAITING, trial, result(9, 1.0))
    assert len(ledger.records()) == 1


def test_asha_diverged_first_trial_does_not_change_what_the_others_get(ledger):
    scheduler = scheduler_of("asha", ledger)
    diverged = TuneTrial("diverged")
    scheduler.on_trial_add(WAITING, diverged)
    # A solo trial tells its divergence at its whole budget, and ends by itself.
    assert scheduler.on_trial_result(WAITING, diverged, result(9, DIVERGED_LOSS)) == "CONTINUE"
    scheduler.on_trial_complete(WAITING, diverged, result(9, DIVERGED_LOSS))
    assert ledger.records()[-1].decision == "STOP"
    assert train_all(scheduler, [1, 5, 9], 9) == [9, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_any_scheduler_ends_a_diverged_trial_and_counts_it_in_no_rung(ledger, kind):
    # Two recorded losses, 1 and 1e30, would put ASHA's interpolated cut-off above any real loss.
    scheduler = scheduler_of(kind, ledger)
    assert train(scheduler, "a", [1.0] * 9) == 9
    assert train(scheduler, "b", [DIVERGED_LOSS]) == 1
    assert ledger.records()[-1].decision == "STOP"
    assert train(scheduler, "c", [5.0] * 9) == (1 if kind == "asha" else 9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_any_scheduler_stops_at_a_loss_that_is_no_number(ledger, kind, loss):
    assert train(scheduler_of(kind, ledger), "a", [loss] * 9) == 1
    assert ledger.records() == []


def test_median_stops_what_is_worse_than_the_median_of_three_others(ledger):
    # 2.5 > median(1, 2, 3); 2 < median(1, 2, 3, 2.5), later = median(1, 2, 3); 2.2 > median(1, 2, 3, 2.5, 2).
    scheduler = scheduler_of("median", ledger, max_t=3)
    assert train_all(scheduler, [1, 2, 3, 2.5, 2, 2.2], 3) == [3, 3, 3, 1, 3, 1]


def test_median_stops_none_before_the_grace_period_ends(ledger):
    scheduler = scheduler_of("median", ledger, grace_period=2, max_t=3)
    assert train_all(scheduler, [1, 2, 3, 9], 3) == [3, 3, 3, 2]


def test_median_best_result_of_a_trial_counts_not_its_last(ledger):
    scheduler = scheduler_of("median", ledger, max_t=3)
    assert train_all(scheduler, [1, 2, 3], 3) == [3, 3, 3]
    assert train(scheduler, "rises", [1.9, 5.0, 9.0]) == 3


def test_fifo_stops_none(ledger):
    assert train_all(scheduler_of("fifo", ledger), [1, 5, 9, 50.0], 3) == [3] * 4
    assert stopped_trials(ledger.records()) == {"t0", "t1", "t2", "t3"}


def test_ledger_holds_every_decision_and_the_natural_end(ledger):
    train_all(scheduler_of("median", ledger), [1.0, 2.0], 2)
    found = [(item.trial, item.examples, item.decision) for item in ledger.records()]
    assert found == [
        ("t0", 1, "CONTINUE"),
        ("t0", 2, "CONTINUE"),
        ("t0", 2, "STOP"),
        ("t1", 1, "CONTINUE"),
        ("t1", 2, "CONTINUE"),
        ("t1", 2, "STOP"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_last_result_that_says_done_is_judged_though_tune_asks_for_no_decision(ledger, kind):
    scheduler = scheduler_of(kind, ledger)
    trial = TuneTrial("a")
    scheduler.on_trial_add(WAITING, trial)
    scheduler.on_trial_complete(WAITING, trial, result(3, 1.0) | {"done": True})
    assert stopped_trials(ledger.records()) == {"a"}
    assert scheduler_of(kind, ledger).on_trial_result(WAITING, trial, result(4, 1.0)) == "STOP"
    if kind == "asha":  # rung 1 holds a's loss
        assert train(scheduler, "b", [5.0] * 9) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_results_without_the_metric_or_the_clock_change_nothing(ledger, kind):
    scheduler = scheduler_of(kind, ledger)
    trial = TuneTrial("a")
    scheduler.on_trial_add(WAITING, trial)
    for found in ({}, {"examples": 1}, {"eval_loss": 1.0}):
        assert scheduler.on_trial_result(WAITING, trial, found) == "CONTINUE"
        scheduler.on_trial_complete(WAITING, trial, found)
    scheduler.on_trial_remove(WAITING, trial)
    scheduler.on_trial_error(WAITING, trial)
    assert ledger.records() == []
    assert train(scheduler, "a", [1.0, 1.0]) == 2


# ---- the same decisions as Ray's own, and after any restart


def own_scheduler_of_ray(kind: str):
    goal = {"time_attr": "examples", "metric": "eval_loss", "mode": "min"}
    if kind == "asha":
        return ASHAScheduler(**goal, grace_period=1, max_t=9, reduction_factor=2)
    if kind == "median":
        return MedianStoppingRule(**goal, grace_period=2)
    return FIFOScheduler()


def ours(kind: str, ledger: RungLedger):
    grace_period = 2 if kind == "median" else 1
    return scheduler_of(kind, ledger, grace_period=grace_period, reduction_factor=2)


def random_sweep(rng: random.Random) -> list[tuple[str, int, float, bool]]:
    """Results (trial, examples, loss, last) of six trials in a random order of events."""
    streams = []
    for number in range(6):
        clock = sorted(rng.sample(range(1, 10), rng.randint(1, 5)))
        losses = [rng.choice([1.0, 2.0, 50.0, rng.random() * 5]) for _ in clock]
        ends = [*[False] * (len(clock) - 1), True]
        streams.append([(f"t{number}", *row) for row in zip(clock, losses, ends, strict=True)])
    order = [number for number, stream in enumerate(streams) for _ in stream]
    rng.shuffle(order)
    iterators = [iter(stream) for stream in streams]
    return [next(iterators[number]) for number in order]


class Driver:
    """Sends the results of a sweep to a scheduler as Tune does; may die and come back."""

    def __init__(self, build: Callable[[], FIFOScheduler]) -> None:
        self.build = build
        self.decisions: dict[tuple[str, int], str] = {}
        self.running = {f"t{number}" for number in range(6)}
        self.sent: list[tuple[str, int, float]] = []
        self.restart()

    def restart(self) -> None:
        """A new scheduler, and new Tune trials for all that have not ended."""
        self.scheduler = self.build()
        self.trials = {name: TuneTrial(name) for name in sorted(self.running)}
        for trial in self.trials.values():
            self.scheduler.on_trial_add(IDLE, trial)

    def send(self, name: str, examples: int, loss: float, last: bool) -> None:
        """One result, if its trial still runs."""
        if name not in self.running:
            return
        trial, found = self.trials[name], result(examples, loss)
        decision = self.scheduler.on_trial_result(IDLE, trial, found)
        self.decisions[name, examples] = decision
        self.sent.append((name, examples, loss))
        if decision == "STOP" or last:
            self.scheduler.on_trial_complete(IDLE, trial, found)
            self.running.discard(name)

    def repeat(self, rng: random.Random) -> None:
        """Results that running trials gave before, in any order: all must be answered as then."""
        again = [row for row in self.sent if row[0] in self.running]
        for name, examples, loss in rng.sample(again, len(again)):
            answer = self.scheduler.on_trial_result(IDLE, self.trials[name], result(examples, loss))
            assert answer == self.decisions[name, examples]


IDLE = SimpleNamespace(get_live_trials=lambda: [])


def sweeps() -> Iterator[list[tuple[str, int, float, bool]]]:
    return (random_sweep(random.Random(seed)) for seed in range(12))


def decisions_of(build: Callable[[], FIFOScheduler], sweep) -> dict[tuple[str, int], str]:
    driver = Driver(build)
    for row in sweep:
        driver.send(*row)
    return driver.decisions


@pytest.mark.parametrize("kind", KINDS)
def test_decisions_are_those_of_rays_own_scheduler(tmp_path, kind):
    stops = 0
    for number, sweep in enumerate(sweeps()):
        ledger = RungLedger(tmp_path / f"{number}.jsonl")
        found = decisions_of(lambda ledger=ledger: ours(kind, ledger), sweep)
        rays = decisions_of(lambda: own_scheduler_of_ray(kind), sweep)
        # Ray stops a trial at its budget, where ours ends by itself.
        assert found == {at: "CONTINUE" if at[1] == 9 else said for at, said in rays.items()}
        stops += sum(decision == "STOP" for decision in found.values())
    assert (stops > 0) == (kind != "fifo")


@pytest.mark.parametrize("kind", KINDS)
def test_restart_after_any_result_decides_as_an_uninterrupted_sweep(tmp_path, kind):
    for number, sweep in enumerate(sweeps()):
        whole = RungLedger(tmp_path / f"{number}.jsonl")
        expected = decisions_of(lambda ledger=whole: ours(kind, ledger), sweep)
        for num_before in range(len(sweep) + 1):
            path = tmp_path / f"{number}-{num_before}.jsonl"
            driver = Driver(lambda path=path: ours(kind, RungLedger(path)))
            for row in sweep[:num_before]:
                driver.send(*row)
            with path.open("a") as file:
                file.write('{"trial": "t0", "exam')  # killed while it wrote the next
            driver.restart()
            driver.repeat(random.Random(num_before))
            for row in sweep[num_before:]:
                driver.send(*row)
            assert driver.decisions == expected
            assert RungLedger(path).records() == whole.records()


@pytest.mark.parametrize("kind", KINDS)
def test_result_seen_twice_is_answered_as_before_and_not_recorded_again(ledger, kind):
    for _ in ("an attempt", "its resume"):
        scheduler = scheduler_of(kind, ledger)
        trial = TuneTrial("a")
        scheduler.on_trial_add(WAITING, trial)
        for _ in range(3):
            assert scheduler.on_trial_result(WAITING, trial, result(2, 1.0)) == "CONTINUE"
        # A retried trial may come to another number; the first was acted on.
        assert scheduler.on_trial_result(WAITING, trial, result(2, 8.0)) == "CONTINUE"
    assert [(item.examples, item.eval_loss) for item in ledger.records()] == [(2, 1.0)]


def test_ledger_of_another_scheduler_is_refused(ledger):
    train_all(scheduler_of("asha", ledger), [1, 5], 9)
    with pytest.raises(ValueError, match=r"rungs\.jsonl:9: must be this scheduler's decision"):
        scheduler_of("fifo", ledger)


def test_ledger_that_goes_on_after_a_trials_end_is_refused(ledger):
    train_all(scheduler_of("asha", ledger), [1, 5], 9)
    ledger.append(ledger.records()[-1])
    with pytest.raises(ValueError, match=r"rungs\.jsonl:11: .*\(none, as the trial has ended\)"):
        scheduler_of("asha", ledger)


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_make_scheduler_grace_period_beyond_the_budget_is_refused(ledger, kind):
    with pytest.raises(ValueError, match=r"\(9 examples\), got 10"):
        scheduler_of(kind, ledger, grace_period=10)
