"""Which points a study runs next: decided from the files, played through without any training."""

import itertools
import math
import shutil
from pathlib import Path

import pytest

from orchestration.planning import make_plan
from orchestration.studies.agenda import Agenda, points_of, retry_failed
from orchestration.studies.arms import make_arms
from orchestration.studies.config import load_study
from search_spaces.candidate import Candidate, trial_name
from trainers.paths import RunPaths, TrialPaths, read_state, write_json_lines, write_state

WIDE = {
    "learning_rate": {"low": 1e-3, "high": 1e-1, "num": 9},
    "full_learning_rate": {"low": 1e-4, "high": 1e-2, "num": 9},
    "max_extensions": 8,
    "seeds": 3,
}


class Study:
    """A study whose trials end as a loss function says, without any training."""

    def __init__(self, folder: Path, *, sources=(), in_turn=False, **keys) -> None:
        config = load_study("lr-ratio", "smoke", None, **(WIDE | keys))
        self.run = RunPaths(folder)
        self.run.trials.mkdir(parents=True, exist_ok=True)
        self.arms = make_arms("lr-ratio", config, make_plan(config))
        self.agenda = Agenda(
            self.arms, config, self.run, self.make, sources=sources, in_turn=in_turn
        )
        self.given: list[Candidate] = []

    def make(self, candidate: Candidate) -> dict:
        name = trial_name(candidate)
        folder = str(self.run.trial(name).root)
        return {
            "name": name,
            "folder": folder,
            "candidate": candidate.to_dict(),
            "num_examples": 32,
        }

    def take(self) -> list[dict]:
        taken = self.agenda.take()
        self.given += [Candidate.from_dict(trial["candidate"]) for trial in taken]
        return taken

    def play(self, loss) -> None:
        """Runs everything to its end."""
        while taken := self.take():
            for trial in taken:
                end(trial, loss(Candidate.from_dict(trial["candidate"])))


def end(trial: dict, loss: float, status: str | None = None) -> None:
    """Writes what a worker leaves of a trial: diverged where the loss is infinite."""
    paths = TrialPaths(Path(trial["folder"]))
    status = status or ("finished" if math.isfinite(loss) else "diverged")
    row = {"examples": 32, "steps": 4, "eval_loss": loss if math.isfinite(loss) else 9.0}
    write_json_lines(paths.metrics, [row])
    write_state(paths.status, {"status": status, "reason": ""})


def valley(at: float, wall: float = math.inf):
    """A loss with its best learning rate at `at` for FullFT and 5 times that for LoRA, infinite beyond a
    wall; seeds shift it a little."""

    def loss(candidate: Candidate) -> float:
        best = at if candidate.full_finetune else 5 * at
        if candidate.learning_rate > wall * best:
            return math.inf
        return 2.0 + 0.3 * math.log10(candidate.learning_rate / best) ** 2 + 0.01 * candidate.seed

    return loss


def test_agenda_first_asks_for_the_first_seed_on_every_grid(tmp_path):
    study = Study(tmp_path)
    taken = {(c.full_finetune, c.learning_rate, c.seed) for c in (study.take(), study.given)[1]}
    assert taken == {(a.full_finetune, rate, 0) for a in study.arms for rate in a.grid}
    assert study.take() == []  # nothing more until those have ended
    assert all(study.run.trial(t).config.is_file() for t in map(trial_name, study.given))


def test_agenda_in_turn_begins_lora_when_full_fine_tuning_is_through(tmp_path):
    study = Study(tmp_path, in_turn=True)
    study.play(valley(1e-3))
    kinds = [candidate.full_finetune for candidate in study.given]
    assert kinds == sorted(kinds, reverse=True)
    assert False in kinds


def test_agenda_played_through_measures_every_seed_around_the_best(tmp_path):
    study = Study(tmp_path)
    study.play(valley(1e-3))
    assert study.agenda.is_complete()
    assert len(study.given) == len(set(study.given))
    for arm in study.arms:
        best = 1e-3 if arm.full_finetune else 5e-3
        points = points_of(arm, study.agenda.records())
        for seed in (0, 1, 2):
            own = sorted((p for p in points if p.seed == seed), key=lambda p: p.loss)
            assert abs(math.log10(own[0].learning_rate / best)) <= 0.125 + 1e-9
        assert {p.learning_rate for p in points if p.seed == 0} >= set(arm.grid)


def test_agenda_grid_that_misses_the_best_grows_until_it_is_inside(tmp_path):
    study = Study(tmp_path)
    study.play(valley(3e-5))  # FullFT's best below its grid, which begins at 1e-4
    full = study.arms[0]
    rates = sorted({p.learning_rate for p in points_of(full, study.agenda.records())})
    assert rates[0] < 3e-5 < rates[1] * 1.8
    steps = [math.log10(b / a) for a, b in itertools.pairwise(rates)]
    assert steps == pytest.approx([0.25] * len(steps), abs=1e-4)


def test_agenda_diverged_runs_are_points_with_infinite_loss(tmp_path):
    study = Study(tmp_path)
    study.play(valley(1e-3, wall=2.0))
    points = points_of(study.arms[0], study.agenda.records())
    assert {p.loss for p in points if p.learning_rate > 2e-3} == {math.inf}
    assert study.agenda.is_complete()


def test_agenda_interrupted_study_goes_on_with_what_has_no_end(tmp_path):
    first = Study(tmp_path)
    taken = first.take()
    for trial in taken[:5]:
        end(trial, valley(1e-3)(Candidate.from_dict(trial["candidate"])))
    again = Study(tmp_path)
    assert {t["name"] for t in again.take()} == {t["name"] for t in taken[5:]}


def test_agenda_interrupted_anywhere_ends_with_the_same_points(tmp_path):
    whole = Study(tmp_path / "whole")
    whole.play(valley(4e-4))
    for count in (1, 7, 20):
        parts = tmp_path / f"parts{count}"
        while True:  # a driver that dies after every `count` trials
            study = Study(parts)
            taken = study.take()
            for trial in taken[:count]:
                end(trial, valley(4e-4)(Candidate.from_dict(trial["candidate"])))
            if not taken:
                break
        found = {r.name for r in study.agenda.records()}
        assert found == {r.name for r in whole.agenda.records()}


def test_agenda_more_seeds_and_a_wider_grid_rerun_nothing(tmp_path):
    first = Study(tmp_path, seeds=2)
    first.play(valley(1e-3))
    had = set(first.given)
    more = Study(tmp_path, seeds=3, full_learning_rate={"low": 1e-5, "high": 1e-2, "num": 13})
    more.play(valley(1e-3))
    assert not had & set(more.given)
    assert {c.seed for c in more.given if not c.full_finetune} == {2}
    low = [c.learning_rate for c in more.given if c.full_finetune and c.seed == 0]
    assert sorted(low) == pytest.approx([1e-5, 1.77828e-5, 3.16228e-5, 5.62341e-5], rel=1e-5)


def test_agenda_failed_trial_is_no_point_and_is_not_asked_for_for_ever(tmp_path):
    study = Study(tmp_path)
    taken = study.take()
    for number, trial in enumerate(taken):
        candidate = Candidate.from_dict(trial["candidate"])
        end(trial, valley(1e-3)(candidate), status="failed" if number == 0 else None)
    study.play(valley(1e-3))
    failed = Candidate.from_dict(taken[0]["candidate"])
    assert study.given.count(failed) == 1
    names = [r.name for r in study.agenda.records() if r.status == "failed"]
    assert names == [taken[0]["name"]]
    assert retry_failed(study.run) == names
    assert Study(tmp_path).take()[0]["name"] == names[0]


def test_agenda_takes_equal_points_from_another_study(tmp_path):
    first = Study(tmp_path / "first", seeds=2)
    first.play(valley(1e-3))
    second = Study(tmp_path / "second", seeds=2, sources=[RunPaths(tmp_path / "first")])
    assert second.take() == []
    assert second.agenda.is_complete()
    for arm in second.arms:
        assert points_of(arm, second.agenda.records()) == points_of(arm, first.agenda.records())


def test_agenda_does_not_take_points_of_another_budget_or_without_an_end(tmp_path):
    first = Study(tmp_path / "first", seeds=1)
    taken = first.take()
    for trial in taken[:2]:
        end(trial, 2.0)
    changed = RunPaths(tmp_path / "first").trial(taken[0]["name"]).config
    write_state(changed, read_state(changed) | {"num_examples": 64})
    second = Study(tmp_path / "second", seeds=1, sources=[RunPaths(tmp_path / "first")])
    asked = {t["name"] for t in second.take()}
    assert taken[0]["name"] in asked  # another budget
    assert taken[1]["name"] not in asked
    assert taken[2]["name"] in asked  # no end
    shutil.rmtree(tmp_path)
