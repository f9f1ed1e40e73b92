"""Searchers, asked as Tune asks them: order, admission, seeds, and what TPE learns from."""

import math
import statistics
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from ray import cloudpickle
from ray.tune.search import Searcher

from orchestration.config import make_config
from orchestration.planning import Plan, make_plan
from orchestration.searchers import ListSearcher, OptunaSearcher
from search_spaces.candidate import Candidate, grid_candidates, trial_name
from search_spaces.domains import Choice, TargetDomain
from search_spaces.pruner import prune
from trainers.metrics import DIVERGED_LOSS

COMMON = {"workers": {"num_workers": 1}}
OPTIMUM = 1e-4
LEARNING_RATES = {"low": 1e-6, "high": 1e-1, "num": 6}


@pytest.fixture
def planned(workplace, base) -> Callable[..., Plan]:
    """A plan of the shipped base: 15,000 bits need rank 2 on attn (rank 1 holds 10,240)."""

    def plan(**values) -> Plan:
        given = {"dataset_tokens": 15_000, "search": "optuna", "num_candidates": 1} | values
        return make_plan(make_config({"model": str(base)} | given, "test"))

    return plan


@pytest.fixture
def line(planned) -> Plan:
    """One dimension: the learning rate, log-uniform over five decades."""
    return planned(learning_rate=LEARNING_RATES, lora_rank=8, global_batch_size=16)


def make_trial(candidate: Candidate) -> dict:
    return {"name": trial_name(candidate), "candidate": candidate.to_dict()}


def searcher_of(plan: Plan, num_candidates: int, seed: int = 0, **given) -> OptunaSearcher:
    return OptunaSearcher(
        plan.space, plan.domains, num_candidates, seed, make_trial, COMMON, **given
    )


def candidate_of(suggestion: dict) -> Candidate:
    return Candidate.from_dict(suggestion["trial"]["candidate"])


def distance(candidate: Candidate) -> float:
    """Decades between its learning rate and the optimum."""
    return abs(math.log10(candidate.learning_rate / OPTIMUM))


def report(searcher: Searcher, trial_id: str, losses: list[float], error: bool = False) -> None:
    """A trial from its first result to its end, as Tune tells a searcher: the result that stops a
    trial comes with its end alone."""
    results = [
        {"eval_loss": loss, "examples": 10 * step, "training_iteration": step}
        for step, loss in enumerate(losses, 1)
    ]
    for found in results[:-1]:
        searcher.on_trial_result(trial_id, found)
    searcher.on_trial_complete(trial_id, None if error else results[-1], error=error)


def search(
    searcher: Searcher, loss: Callable[[Candidate], float] = distance, number: int = 0
) -> list[Candidate]:
    """The candidates of a whole search, one at a time; each ends at its loss."""
    found = []
    while (suggestion := searcher.suggest(f"tune{number}")) != Searcher.FINISHED:
        found.append(candidate_of(suggestion))
        report(searcher, f"tune{number}", [9.0, loss(found[-1])])
        number += 1
    return found


def median_distance(candidates: list[Candidate]) -> float:
    return statistics.median(map(distance, candidates))


# ---- a list


def test_list_searcher_suggests_each_trial_once_in_order_then_finishes():
    trials = [{"name": name} for name in ("c", "a", "b")]
    searcher = ListSearcher(trials, COMMON)
    found = []
    for number in range(3):
        found.append(searcher.suggest(f"tune{number}"))
        searcher.on_trial_complete(f"tune{number}", None, error=number == 1)
    assert found == [{"trial": trial, **COMMON} for trial in trials]
    assert [searcher.suggest("more"), searcher.suggest("more")] == [Searcher.FINISHED] * 2


def test_list_searcher_of_nothing_finishes_at_once():
    assert ListSearcher([], {}).suggest("tune0") == Searcher.FINISHED


def test_list_searcher_asked_to_save_leaves_no_file_and_takes_none(tmp_path):
    searcher = ListSearcher([{"name": "a"}], COMMON)
    searcher.save_to_dir(str(tmp_path), "session")  # as Tune asks
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "state").write_bytes(cloudpickle.dumps({"_num_suggested": 1}))
    with pytest.raises(
        ValueError, match="from its own files, never from Ray Tune's; use `tenfold resume`"
    ):
        searcher.restore(str(tmp_path / "state"))
    assert searcher.suggest("tune0") == {"trial": {"name": "a"}, **COMMON}


# ---- Optuna: what may be proposed


def test_optuna_proposes_admitted_candidates_alone(planned):
    plan = planned(lora_rank=[1, 2, 4], target=[["attn"], ["mlp"]])
    # The lower the rank the better: the search is drawn to what was cut.
    found = search(searcher_of(plan, 300), loss=lambda candidate: candidate.lora_rank)
    assert len(set(found)) == 300
    judged = prune(found, plan.shape, plan.dataset_bits)
    assert (len(judged.admitted), len(judged.discarded)) == (300, 0)
    ranks = {t: {c.lora_rank for c in found if c.target == (t,)} for t in ("attn", "mlp")}
    assert ranks == {"attn": {2, 4}, "mlp": {1, 2, 4}}
    rates = plan.space.learning_rate
    assert all(rates.low <= c.learning_rate <= rates.high for c in found)


def test_optuna_never_proposes_a_target_without_a_rank_nor_a_cut_dropout(planned):
    plan = planned(lora_rank=[1, 2], target=[["attn"], ["mlp"], ["unembed"]], dropout=[0.0, 0.1])

    def domain(target: str, ranks: tuple[int, ...], dropouts: tuple[float, ...]) -> TargetDomain:
        return TargetDomain(
            target=(target,),
            lora_ranks=ranks,
            cut_lora_ranks=(),
            dropouts=dropouts,
            cut_dropouts=(),
            sufficient_rank=1,
        )

    domains = (
        domain("attn", (), (0.0, 0.1)),
        domain("mlp", (1, 2), (0.0,)),
        domain("unembed", (2,), (0.0, 0.1)),
    )
    found = search(searcher_of(replace(plan, domains=domains), 100))
    assert {(c.target, c.lora_rank, c.dropout) for c in found} == {
        (("mlp",), 1, 0.0),
        (("mlp",), 2, 0.0),
        (("unembed",), 2, 0.0),
        (("unembed",), 2, 0.1),
    }


def test_optuna_every_key_with_several_values_is_searched(planned):
    plan = planned(
        lora_rank=[4, 8],
        global_batch_size=[16, 32],
        lora_alpha={"low": 8, "high": 32, "num": 3},
        dropout=[0.0, 0.1],
    )
    choices = {  # sweep.yaml takes one value of each, a search space several
        "lr_schedule": ("constant", "cosine"),
        "warmup": (0.0, 0.1),
        "weight_decay": (0.0, 0.01),
        "max_grad_norm": (0.3, 1.0),
        "seed": (0, 7),
    }
    domains = {key: Choice(options=options) for key, options in choices.items()}
    found = search(searcher_of(replace(plan, space=replace(plan.space, **domains)), 60))
    given = {"lora_rank": (4, 8), "global_batch_size": (16, 32), "dropout": (0.0, 0.1)}
    for key, options in (choices | given).items():
        assert {getattr(c, key) for c in found} == set(options)
    assert len({c.lora_alpha for c in found}) > 3


KINDS = ["lora", "rslora", "dora", "pissa"]


def test_optuna_searches_variants_and_alpha_rules_each_at_its_own_rates(planned):
    plan = planned(lora_rank=[4, 8, 16], lora_alpha=["rank", "2*rank"], variant=KINDS)
    found = search(searcher_of(plan, 80))
    assert {c.variant for c in found} == set(KINDS)
    assert {(c.lora_rank, c.lora_alpha) for c in found} == {
        (rank, multiple * rank) for rank in (4, 8, 16) for multiple in (1, 2)
    }
    rates = plan.space.learning_rate
    for c in found:
        factor = plan.space.rate_factor(c.variant, c.lora_alpha, c.lora_rank)
        assert rates.low * (1 - 1e-9) <= c.learning_rate / factor <= rates.high * (1 + 1e-9)
    slow = [c.learning_rate for c in found if c.variant == "pissa"]
    assert max(slow) < 0.3 * rates.high  # 0.1, and 8^0.5 of alpha 4
    # A resumed search takes them all again, to the last bit.
    again = searcher_of(plan, 81, history=[(c, 1.0) for c in found])
    assert len(set(search(again)) - set(found)) == 1


def test_optuna_on_a_small_space_of_variants_proposes_each_candidate_once(planned):
    plan = planned(
        lora_rank=[4, 8], lora_alpha=["rank", "2*rank"], variant=KINDS, global_batch_size=16
    )
    few = replace(plan.space, learning_rate=Choice(options=(1e-4, 3.3e-4)))
    plan = replace(plan, space=few)
    found = search(searcher_of(plan, 100))
    assert sorted(map(trial_name, found)) == sorted(map(trial_name, grid_candidates(few)))
    assert len(found) == 2 * 2 * 2 * len(KINDS)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lora_alpha": "rank", "variant": ["dora", "pissa"]},
        {"lora_rank": [1, 2, 4], "target": "attn"},
        {"lora_rank": [1, 2, 4], "target": [["attn"], ["mlp"]]},
        {"learning_rate": [1e-2, 3e-4, 1e-3], "full_ft_learning_rate": 2e-5},
        {"learning_rate": 1e-3, "lora_rank": 8, "global_batch_size": 16},
    ],
)
def test_optuna_proposes_the_doctrines_centre_first(planned, values):
    plan = planned(**values)
    admitted = prune(grid_candidates(plan.space), plan.shape, plan.dataset_bits).admitted
    assert candidate_of(searcher_of(plan, 5).suggest("tune0")) == admitted[0]


# ---- how many, and none twice


@pytest.mark.parametrize("num_candidates", [1, 2, 30])
def test_optuna_proposes_as_many_as_asked_and_finishes(line, num_candidates):
    searcher = searcher_of(line, num_candidates)
    found = search(searcher)
    assert len(set(found)) == len(found) == num_candidates
    assert searcher.suggest("more") == Searcher.FINISHED


@pytest.mark.parametrize("num_candidates", [64, 200])
def test_optuna_on_a_small_space_proposes_each_candidate_once(planned, num_candidates):
    plan = planned(
        learning_rate=[1e-5, 1e-4, 1e-3, 1e-2],
        lora_rank=[2, 4, 8, 16],
        global_batch_size=[16, 32, 64, 128],
    )
    found = search(searcher_of(plan, num_candidates))
    assert len(found) == 64
    assert sorted(map(trial_name, found)) == sorted(map(trial_name, grid_candidates(plan.space)))


def test_optuna_with_all_trials_running_proposes_each_candidate_once(planned):
    plan = planned(learning_rate=[1e-4, 1e-3], lora_rank=[2, 4, 8], global_batch_size=[16, 32])
    searcher = searcher_of(plan, 12)
    found = {candidate_of(searcher.suggest(f"tune{number}")) for number in range(12)}
    assert found == set(grid_candidates(plan.space))
    for number in range(12):
        report(searcher, f"tune{number}", [1.0])
    assert searcher.suggest("more") == Searcher.FINISHED


def test_optuna_suggestion_is_the_trial_and_what_is_common(line):
    suggestion = searcher_of(line, 1).suggest("tune0")
    assert suggestion == {"trial": make_trial(candidate_of(suggestion)), **COMMON}


# ---- what it learns


def test_optuna_same_seed_and_answers_give_the_same_suggestions(planned):
    plan = planned(lora_rank=[1, 2, 4], target=[["attn"], ["mlp"]])
    first, again, other = (search(searcher_of(plan, 25, seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_optuna_comes_nearer_to_the_optimum(line):
    found = search(searcher_of(line, 40))
    assert median_distance(found[-13:]) < 0.6 * median_distance(found[:13])


@pytest.mark.parametrize("last", [DIVERGED_LOSS, math.nan])
def test_optuna_learns_beside_trials_that_diverge(line, last):
    searcher = searcher_of(line, 40)
    found = []
    for number in range(40):
        found.append(candidate_of(searcher.suggest(f"tune{number}")))
        diverges = found[-1].learning_rate > 1e-3  # two of the five decades
        losses = [0.01, last] if diverges else [9.0, distance(found[-1])]
        report(searcher, f"tune{number}", losses)
    # Not drawn there by the 0.01 of its first report, which beats nearly all that do not diverge.
    assert median_distance(found[-13:]) < 0.6 * median_distance(found[:13])


def test_optuna_survives_trials_without_a_score_retries_and_strangers(line):
    searcher = searcher_of(line, 6)
    for number in range(5):
        searcher.suggest(f"tune{number}")
    report(searcher, "tune0", [], error=True)
    report(searcher, "tune1", [1.0, 2.0], error=True)
    searcher.on_trial_complete("tune2", {"done": True})
    searcher.on_trial_complete("tune2", {"done": True})  # again
    for _ in ("a run", "its retry"):
        searcher.on_trial_result("tune3", {"eval_loss": 1.0, "examples": 5})
        searcher.on_trial_result("tune3", {"examples": 7})
        searcher.on_trial_result("tune3", {"eval_loss": 1.0})
    searcher.on_trial_complete("tune3", {"eval_loss": 1.0})
    report(searcher, "stranger", [1.0])
    assert searcher.suggest("tune5") != Searcher.FINISHED
    assert searcher.suggest("tune6") == Searcher.FINISHED


# ---- going on after an earlier attempt


def points(plan: Plan, rates: list[float]) -> list[Candidate]:
    centre = next(grid_candidates(plan.space))
    return [replace(centre, learning_rate=rate) for rate in rates]


def test_optuna_history_counts_is_not_repeated_and_is_learned_from(line):
    rates = [1e-6, 3e-6, 1e-5, 3e-5, 5e-5, 1.1e-4, 2e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    history = [(candidate, distance(candidate)) for candidate in points(line, rates)]
    found = search(searcher_of(line, 22, history=history))
    assert len(found) == 10
    assert not set(found) & {candidate for candidate, _ in history}
    assert median_distance(found[1:]) < median_distance(search(searcher_of(line, 10))[1:]) / 2


def test_optuna_history_without_scores_is_not_repeated(planned):
    plan = planned(learning_rate=[1e-4, 1e-3, 1e-2], lora_rank=8, global_batch_size=16)
    gone = list(grid_candidates(plan.space))[:2]  # the centre is one
    history = [(gone[0], None), (gone[1], DIVERGED_LOSS)]
    found = search(searcher_of(plan, 3, history=history))
    assert found == list(grid_candidates(plan.space))[2:]


def test_optuna_history_of_everything_finishes_at_once(line):
    history = [(candidate, 1.0) for candidate in points(line, [1e-5, 1e-4])]
    assert searcher_of(line, 2, history=history).suggest("tune0") == Searcher.FINISHED


def test_optuna_first_trials_come_first_as_they_are_and_count(line):
    first = [make_trial(candidate) | {"mark": 7} for candidate in points(line, [2e-2, 3e-5])]
    searcher = searcher_of(line, 4, first=first, history=[(points(line, [1e-5])[0], 2.0)])
    found = [searcher.suggest(f"tune{number}") for number in range(4)]
    assert [item["trial"] for item in found[:2]] == first
    assert candidate_of(found[2]) == next(grid_candidates(line.space))
    assert found[3] == Searcher.FINISHED
    report(searcher, "tune1", [2.0, 1.0])


def test_optuna_learns_from_first_trials_too(line):
    rates = [1e-6, 3e-6, 1e-5, 3e-5, 5e-5, 1.1e-4, 2e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    first = [make_trial(candidate) for candidate in points(line, rates)]
    found = search(searcher_of(line, 22, first=first))[12:]
    assert median_distance(found[1:]) < median_distance(search(searcher_of(line, 10))[1:]) / 2


@pytest.mark.parametrize(
    "change", [{"lora_rank": 4}, {"target": ("attn",)}, {"learning_rate": 0.11}]
)
def test_optuna_history_or_first_trial_of_another_space_is_refused(line, change):
    stranger = replace(points(line, [1e-4])[0], **change)
    for given in ({"history": [(stranger, 1.0)]}, {"first": [make_trial(stranger)]}):
        with pytest.raises(ValueError, match="must lie in the admitted space"):
            searcher_of(line, 5, **given)


def test_optuna_bound_to_what_cannot_be_pickled_goes_into_tunes_own_state(line, tmp_path):
    lock = threading.Lock()  # cannot be pickled

    def bound(candidate: Candidate) -> dict:
        with lock:
            return make_trial(candidate)

    searcher = OptunaSearcher(line.space, line.domains, 20, 0, bound, COMMON)
    searcher.suggest("tune0")
    assert cloudpickle.dumps(searcher)  # Tune writes its searcher into tuner.pkl
    folder = tmp_path / "tune"
    folder.mkdir()
    searcher.save_to_dir(str(folder), "session")
    assert list(folder.iterdir()) == []


def test_optuna_space_of_one_point_is_proposed_once(planned):
    plan = planned(learning_rate=1e-3, lora_rank=8, global_batch_size=16)
    assert plan.space.learning_rate == Choice(options=(1e-3,))
    assert search(searcher_of(plan, 3)) == list(grid_candidates(plan.space))
