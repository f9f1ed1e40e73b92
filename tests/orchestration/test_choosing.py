"""Which trial is chosen, what new seeds say of that, and the sentences about it."""

import math
from dataclasses import replace
from typing import Any

import pytest

from orchestration.choosing import choice_lines, confirmation, repeat_names, top_two
from orchestration.config import make_config
from orchestration.results import TrialRecord, best_trial, read_trials
from tests.orchestration.sweeps import candidate_dict
from trainers.integrity import sealed_row
from trainers.metrics import Judge
from trainers.paths import RunPaths, write_state, write_text


def record(
    name: str, rate: float, *losses: float, status: str = "finished", **others: Any
) -> TrialRecord:
    """A trial with these losses after a base of 3.0."""
    keys = {key: others.pop(key) for key in ("seed", "lora_rank") if key in others}
    rows = tuple(
        {"steps": at, "examples": 16 * at, "eval_loss": loss, "eval_bits_per_byte": loss / 2}
        for at, loss in enumerate((3.0, *losses))
    )
    candidate = candidate_dict(learning_rate=rate, **keys)
    return TrialRecord(
        name=name, candidate=candidate, status=status, reason="", rows=rows, **others
    )


def chosen(records: list[TrialRecord]) -> str:
    best = best_trial(records)
    assert best is not None
    return best.name


def test_choice_within_a_tolerance_is_the_lowest_learning_rate():
    rates = {"high": (1e-2, 2.0), "middle": (3e-3, 2.009), "low": (1e-3, 2.02)}
    for tolerance, name in ((0.0, "high"), (0.005, "middle"), (0.02, "low")):
        judge = Judge(lr_tolerance=tolerance)
        records = [record(n, rate, loss, judge=judge) for n, (rate, loss) in rates.items()]
        assert chosen(records) == name
    (line,) = choice_lines(records, best_trial(records))
    assert line == (
        "low (eval_loss 2.0200) is chosen before high (2.0000): its learning rate is lower, and 2.00% were allowed"
    )


def test_choice_within_a_tolerance_of_a_score_that_is_to_be_high():
    def scored(name: str, rate: float, score: float) -> TrialRecord:
        found = record(name, rate, 2.0, judge=Judge(key="eval_score", lr_tolerance=0.1))
        rows = tuple(row | {"eval_score": score * row["steps"]} for row in found.rows)
        return replace(found, rows=rows)

    trials = [scored("high", 1e-2, 0.9), scored("middle", 3e-3, 0.82), scored("low", 1e-3, 0.8)]
    assert chosen(trials) == "middle"


CONFIRMED = [record("a", 1e-3, 2.0), record("b", 3e-3, 2.1), record("c", 1e-2, 2.5)]


def repeat(of: str, seed: int, loss: float, status: str = "finished") -> TrialRecord:
    rate = {"a": 1e-3, "b": 3e-3}[of]
    return record(f"{of}{seed}", rate, loss, status=status, seed=seed, repeats=of)


def test_choice_of_confirmed_trials_is_the_mean_over_new_seeds_at_its_best_seed():
    repeats = [repeat("a", 1, 2.4), repeat("a", 2, 2.45), repeat("b", 1, 2.0), repeat("b", 2, 2.06)]
    records = CONFIRMED + repeats
    assert chosen(records) == "b1"
    found = confirmation(records)
    assert found is not None
    assert found.names == ("b", "a")
    mean, half = found.difference
    assert mean == pytest.approx(0.395)
    assert half == pytest.approx(12.706 * 0.005, rel=1e-3)  # t of one degree of freedom
    assert found.tells_apart
    assert found.sentence == (
        "on 2 new seeds b has eval_loss 2.0300 and a 2.4250 (difference 0.3950, 95% interval 0.3315 to 0.4585): the "
        "first is better"
    )
    assert choice_lines(records, best_trial(records)) == [
        "b1 (eval_loss 2.0000) is chosen before a (2.0000): it is better in the mean over new seeds",
        found.sentence,
    ]


def test_choice_says_where_seeds_cannot_tell_two_apart():
    repeats = [repeat("a", 1, 2.0), repeat("a", 2, 2.3), repeat("b", 1, 2.2), repeat("b", 2, 2.2)]
    found = confirmation(CONFIRMED + repeats)
    assert found is not None
    assert not found.tells_apart
    assert found.sentence.endswith("they cannot be told apart")
    assert found.names == ("a", "b")


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_choice_does_not_fall_on_a_candidate_that_breaks_on_a_new_seed(status):
    repeats = [repeat("a", 1, 1.0), repeat("a", 2, 1.0, status), repeat("b", 1, 2.2)]
    records = [*CONFIRMED, *repeats, repeat("b", 2, 2.3)]
    assert chosen(records) == "b"  # whose own seed was better than the new ones
    found = confirmation(records)
    assert found is not None
    assert found.sentence.endswith("the second diverged or failed on one")
    assert math.isinf(found.difference[0])


@pytest.mark.parametrize("status", ["unfinished", "stopped"])
def test_choice_waits_for_every_new_seed(status):
    repeats = [repeat("a", 1, 2.4), repeat("b", 1, 1.9), repeat("b", 2, 2.5, status)]
    records = [*CONFIRMED, *repeats, repeat("a", 2, 2.4)]
    assert confirmation(records) is None
    assert chosen(records) == ("b1")  # by its own score, like any other


def test_top_two_are_two_candidates_not_two_seeds():
    trials = [record("a", 1e-3, 2.0), record("a'", 1e-3, 2.01, seed=1), record("b", 3e-3, 2.1)]
    assert [r.name for r in top_two(trials)] == ["a", "b"]
    assert [r.name for r in top_two(trials[:2])] == ["a"]
    assert top_two([record("a", 1e-3, 2.0, status="diverged")]) == []


def test_repeats_are_the_same_when_they_are_asked_for_again(tmp_path):
    run = RunPaths(tmp_path / "run")

    def keep(found: TrialRecord) -> None:
        paths = run.trial(found.name)
        write_state(paths.config, {"candidate": found.candidate, "repeats": found.repeats})
        write_text(paths.metrics, "".join(f"{sealed_row(row)}\n" for row in found.rows))
        write_state(paths.status, {"status": found.status, "reason": ""})

    def write(candidate, repeats):
        name = f"{repeats}-seed{candidate.seed}"
        keep(record(name, candidate.learning_rate, 2.2, seed=candidate.seed, repeats=repeats))
        return {"name": name}

    for found in CONFIRMED:
        keep(found)
    config = make_config({"model": "base", "data": "x", "confirm": 2}, "sweep.yaml")
    names = repeat_names(run, write, config)
    assert names == ["a-seed1", "b-seed1", "a-seed2", "b-seed2"]
    assert sorted(repeat_names(run, write, config)) == sorted(names)
    assert len(read_trials(run)) == 7


def test_sentences_tell_what_limits_left():
    cut = "time_budget 2h was used up"
    records = [
        record("a", 1e-3, 2.0),
        replace(record("b", 3e-3, 2.1, status="stopped"), reason=cut),
        replace(record("c", 1e-2, status="stopped"), reason=f"{cut} before it began", rows=()),
    ]
    assert choice_lines(records, best_trial(records)) == [
        "time_budget 2h was used up: 1 trials were stopped, 1 never began; best of what there is"
    ]


def test_sentences_tell_what_forgot_too_much():
    judge = Judge(max_forgetting=0.1)

    def kept(name: str, loss: float, lost: float) -> TrialRecord:
        found = record(name, 1e-3, loss, judge=judge)
        rows = tuple(row | {"retention_loss": 1.0 + lost * row["steps"]} for row in found.rows)
        return replace(found, rows=rows)

    records = [kept("good", 2.0, 0.5), kept("careful", 2.5, 0.05)]
    assert chosen(records) == "careful"
    assert choice_lines(records, best_trial(records)) == [
        "1 of 2 trials forgot more than max_forgetting 0.1 at every evaluation and cannot be chosen"
    ]
