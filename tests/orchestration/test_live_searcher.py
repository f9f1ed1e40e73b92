"""The searcher of a sweep that takes clones, asked as Tune asks it, and what of a run is left to do with clones."""

import pytest
from ray import cloudpickle
from ray.tune.search import Searcher

from orchestration.commands import post
from orchestration.control import Control
from orchestration.engines import Work
from orchestration.live_searcher import LiveSearcher
from orchestration.progress import Progress
from orchestration.rungs import RungLedger
from orchestration.schedulers import make_scheduler
from orchestration.searchers import ListSearcher, OptunaSearcher
from search_spaces.candidate import Candidate, grid_candidates
from tests.orchestration.sweeps import candidate_dict
from tests.orchestration.written_runs import WrittenRun

FINISHED = Searcher.FINISHED


def trial(name: str) -> dict:
    return {"name": name, "candidate": candidate_dict()}


class Asked:
    """A LiveSearcher over planned trials a, b, c, ..., asked one time after the other.

    Attributes:
        ids: trial -> Tune's id of it.
    """

    def __init__(self, planned: str, *, most: int = 2, beside: int = 1, clones: str = "") -> None:
        self.put_ahead: list[str] = []
        self.late: list[str] = []
        self.ids: dict[str, str] = {}
        self.times = 0
        self.searcher = LiveSearcher(
            ListSearcher([trial(name) for name in planned], {"broker": 1}),
            {"broker": 1},
            clones=[trial(name) for name in clones],
            most=most,
            beside=beside,
            put_ahead=lambda clone: self.put_ahead.append(clone["name"]),
            look=lambda: [self.searcher.add(trial(self.late.pop())) for _ in list(self.late)],
        )

    def __call__(self) -> str | None:
        """The name of the trial that is suggested next."""
        self.times += 1
        found = self.searcher.suggest(f"tune{self.times}")
        if found is None or found == FINISHED:
            return found
        assert found["broker"] == 1
        self.ids[found["trial"]["name"]] = f"tune{self.times}"
        return found["trial"]["name"]

    def ends(self, name: str) -> None:
        self.searcher.on_trial_complete(self.ids[name], {"eval_loss": 1.0})


def test_live_searcher_without_clones_gives_the_plan_and_finishes_when_all_have_ended():
    asked = Asked("abc", most=2)
    assert [asked(), asked(), asked()] == ["a", "b", None]
    asked.ends("b")
    assert [asked(), asked()] == ["c", None]
    asked.ends("a")
    assert asked() is None  # c still runs, and may be cloned
    asked.ends("c")
    assert asked() == FINISHED


def test_live_searcher_gives_a_clone_at_once_beside_the_planned_trials():
    asked = Asked("abc", most=2, beside=1)
    assert [asked(), asked()] == ["a", "b"]
    for name in ("x", "y"):
        asked.searcher.add(trial(name))
    assert [asked(), asked()] == ["x", None]  # y would take the room of c
    assert asked.put_ahead == ["x"]
    asked.ends("a")
    assert [asked(), asked()] == ["c", None]
    asked.ends("x")
    assert asked() == "y"
    for name in ("b", "c", "y"):
        asked.ends(name)
    assert asked() == FINISHED


def test_live_searcher_of_engine_solo_gives_a_clone_the_next_room():
    asked = Asked("abc", most=1, beside=0)
    assert asked() == "a"
    asked.searcher.add(trial("x"))
    assert asked() is None
    asked.ends("a")
    assert asked() == "x"


def test_live_searcher_when_the_plan_is_through_gives_clones_all_the_room():
    asked = Asked("a", most=2, beside=1)
    assert [asked(), asked()] == ["a", None]
    for name in ("x", "y", "z"):
        asked.searcher.add(trial(name))
    assert [asked(), asked(), asked()] == ["x", "y", None]
    asked.ends("a")
    assert asked() == "z"


def test_live_searcher_takes_up_what_is_asked_in_the_last_moment():
    asked = Asked("a")
    assert asked() == "a"
    asked.late.append("x")
    asked.ends("a")
    assert asked() == "x"
    asked.ends("x")
    assert asked() == FINISHED


def test_live_searcher_goes_on_with_clones_that_workers_know_already():
    asked = Asked("a", clones="x")
    assert [asked(), asked()] == ["x", "a"]
    assert asked.put_ahead == []


def test_live_searcher_leaves_out_whom_tune_was_not_given_and_no_other():
    asked = Asked("abc", most=1, clones="xy", beside=1)
    assert [asked(), asked()] == ["x", "a"]
    assert [asked.searcher.drop(name) for name in ("a", "b", "y", "x", "none")] == [
        False,
        True,
        True,
        False,
        False,
    ]
    asked.ends("a")
    assert asked() == "c"


def test_live_searcher_can_be_pickled_and_leaves_nothing():
    held = cloudpickle.loads(cloudpickle.dumps(Asked("a", clones="x").searcher))
    assert vars(held) == {}


# Optuna


def test_optuna_proposes_no_clone_and_is_told_nothing_of_it(write_sweep):
    plan = WrittenRun(search="optuna", num_candidates=3, learning_rate=[1e-3, 3e-3]).plan
    first, second = grid_candidates(plan.space)
    made: list[Candidate] = []

    def make(candidate: Candidate) -> dict:
        made.append(candidate)
        return {"name": f"p{len(made)}", "candidate": candidate.to_dict()}

    optuna = OptunaSearcher(plan.space, plan.domains, 2, 0, make, {})
    live = LiveSearcher(
        optuna, {}, clones=[], most=2, beside=1, put_ahead=lambda t: None, look=lambda: None
    )
    assert live.suggest("1")["trial"]["candidate"] == first.to_dict()
    live.add({"name": "x", "candidate": second.to_dict()})
    assert live.suggest("2")["trial"]["name"] == "x"
    live.on_trial_result("2", {"eval_loss": 1.0, "examples": 8})
    live.on_trial_complete("2", {"eval_loss": 1.0, "examples": 8})
    assert live.suggest("3") is None  # its space holds two candidates, and both are known
    assert made == [first]
    live.on_trial_complete("1", {"eval_loss": 1.0, "examples": 8})
    assert live.suggest("4") == FINISHED


# What is left of a run


def work_of(sweep: WrittenRun) -> Work:
    return Work(sweep.plan, sweep.maker, sweep.paths)


def cloned(sweep: WrittenRun, **changes: object) -> str:
    """The name of a clone of the first trial, of which a driver took note."""
    post(sweep.paths, "clone", sweep.names[0], changes)
    control = Control(sweep.paths, sweep.maker, Progress(sweep.names, 0, 64))
    control.look_now()
    return (set(work_of(sweep).clones) - set(sweep.names)).pop()


def test_what_is_left_holds_a_clone_whose_config_nobody_lived_to_write(write_sweep):
    sweep = WrittenRun()
    name = cloned(sweep, seed=3)
    config = sweep.paths.trial(name).config
    before = config.read_bytes()
    config.unlink()
    work = work_of(sweep)
    assert [trial["name"] for trial in work.trials] == [*sweep.names, name]
    assert config.read_bytes() == before
    sweep.trains(name, 3.0, status="stopped")
    for ended in sweep.names:
        sweep.trains(ended, 3.0, status="finished")
    assert work_of(sweep).trials == []


def test_what_is_left_of_a_search_that_proposes_counts_no_clone_as_proposed(write_sweep):
    sweep = WrittenRun(search="optuna", num_candidates=2, learning_rate=[1e-3, 3e-3, 1e-2])
    sweep.maker.write(next(grid_candidates(sweep.plan.space)))
    (proposed,) = [trial["name"] for trial in work_of(sweep).trials]
    sweep.names = [proposed]
    name = cloned(sweep, seed=3)  # not in the space, which has one seed
    sweep.trains(proposed, 3.0, 2.0, 2.0, 2.0, status="finished")
    work = work_of(sweep)
    assert [trial["name"] for trial in work.trials] == [name]
    searcher = work.searcher({})
    assert searcher.suggest("1")["trial"]["name"] not in (proposed, name)
    assert searcher.suggest("2") == FINISHED
    sweep.trains(name, 3.0, status="finished")
    assert work_of(sweep).first_trial() is not None


# Its scheduler


class Tuned:
    def __init__(self, name: str) -> None:
        self.config = {"trial": {"name": name}}


@pytest.mark.parametrize("kind", ["fifo", "asha", "median"])
def test_scheduler_ends_a_withdrawn_trial_at_its_next_result_and_so_does_its_replay(tmp_path, kind):
    def scheduler():
        return make_scheduler(kind, 16, 64, 4, RungLedger(tmp_path / "rungs.jsonl"))

    judge = scheduler()
    result = {"eval_loss": 1.0, "examples": 16}
    assert judge.on_trial_result(None, Tuned("a"), result) == "CONTINUE"
    judge.withdrawn = {"a"}
    assert judge.on_trial_result(None, Tuned("a"), result | {"examples": 32}) == "STOP"
    assert judge.on_trial_result(None, Tuned("b"), result) == "CONTINUE"
    last = RungLedger(tmp_path / "rungs.jsonl").records()
    assert [(r.trial, r.examples, r.decision) for r in last][-2:] == [
        ("a", 32, "STOP"),
        ("b", 16, "CONTINUE"),
    ]
    again = scheduler()  # the replay finds the decisions that were made
    assert again.on_trial_result(None, Tuned("a"), result | {"examples": 48}) == "STOP"
