"""The capacity study: its facts and trials, what a trial stored, and the verdict on planted curves."""

import json
import math
from dataclasses import replace

import pytest

from orchestration.results import TrialRecord
from orchestration.studies.capacity import (
    LAPTOP,
    SMOKE,
    FactSet,
    FactTrial,
    Recipe,
    check_prepared,
    fact_trial,
)
from orchestration.studies.capacity_findings import findings
from orchestration.studies.charts import figure_chart
from search_spaces.architecture import ModelShape
from trainers.base_model import BaseSpec
from trainers.data import DataSpec, load_tokenizer, prepare_data
from trainers.data.facts import FactSpec, make_facts
from trainers.data.tokenizer import SHIPPED_MODEL
from trainers.sft_trainer import TrialSpec, train_trial

MLP_PARAMS = 4 * 3 * (192 + 512)
"""Of rank 1 on the shipped base: gate, up and down of 4 layers."""
RECIPE = Recipe(
    loads=(0.5, 1.0),
    lora_ranks=(1, 2),
    target=("mlp",),
    learning_rates=(1e-3, 3e-3),
    exposures=100,
    global_batch_size=8,
    seeds=(0, 1),
)


@pytest.fixture(scope="module")
def shape():
    return ModelShape.from_config(SHIPPED_MODEL)


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))


def test_recipe_fact_sets_hold_the_loads_and_are_shared_by_ranks(shape):
    sets = RECIPE.fact_sets(shape)
    # 8 symbols of 9 bits: a fact is 72 bits. Rank 2 at load 0.5 has the facts of rank 1 at load 1.
    expected = [round(load * 2 * MLP_PARAMS / 72) for load in (0.5, 1.0, 2.0)]
    assert [each.facts.num_facts for each in sets] == expected == [117, 235, 469]
    ranks = [sorted({c.lora_rank for c in each.candidates}) for each in sets]
    assert ranks == [[1], [1, 2], [2]]
    points = [(c.learning_rate, c.seed) for c in sets[0].candidates]
    assert points == [(1e-3, 0), (1e-3, 1), (3e-3, 0), (3e-3, 1)]
    assert [each.num_examples for each in sets] == [11_700, 23_500, 46_900]
    assert sets[0].eval_every == 2925


@pytest.mark.parametrize("recipe", [LAPTOP, SMOKE])
def test_recipe_that_ships_has_facts_that_the_shipped_base_can_be_given(recipe, shape, tmp_path):
    for each in recipe.fact_sets(shape):
        rows = make_facts(each.facts, load_tokenizer()).rows
        never_shown = make_facts(each.control, load_tokenizer()).rows
        assert len(rows) == each.facts.num_facts
        shared = zip(rows, never_shown, strict=False)
        assert all(
            a["prompt"] == b["prompt"] and a["completion"] != b["completion"] for a, b in shared
        )


def _fact_set(num_facts=16):
    facts = FactSpec(num_facts=num_facts, num_symbols=3, alphabet_size=16)
    (candidate, *_) = RECIPE.fact_sets(ModelShape.from_config(SHIPPED_MODEL))[0].candidates
    num_examples = 40 * num_facts
    return FactSet(
        facts=facts, num_examples=num_examples, eval_every=num_examples, candidates=(candidate,)
    )


def _record(fact_set, *losses, status="finished", control=9.0):
    rows = [
        {"examples": 80 * i, "steps": 10 * i, "eval_loss": loss, "retention_loss": control}
        for i, loss in enumerate(losses)
    ]
    candidate = fact_set.candidates[0].to_dict()
    return TrialRecord(name="t", candidate=candidate, status=status, reason="", rows=tuple(rows))


def test_fact_trial_counts_the_bits_of_its_last_evaluation(shape):
    fact_set = _fact_set()
    trial = fact_trial(_record(fact_set, 8.0, 0.2, 0.25), fact_set, shape)
    # 16 facts of 12 bits, and 4 loss-bearing tokens each.
    assert (trial.known_bits, trial.exposures, trial.adapter_params) == (192, 40, MLP_PARAMS)
    assert trial.stored == pytest.approx(192 - 0.25 * 64 / math.log(2))
    assert trial.before == pytest.approx(192 - 8.0 * 64 / math.log(2))
    assert trial.control == pytest.approx(192 - 9.0 * 64 / math.log(2))


@pytest.mark.parametrize("status", ["diverged", "failed", "unfinished"])
def test_fact_trial_without_an_end_stores_nothing_that_counts(status, shape):
    fact_set = _fact_set()
    trial = fact_trial(_record(fact_set, 8.0, 0.1, status=status), fact_set, shape)
    assert (trial.stored, trial.control) == (None, None)
    assert trial.before is not None


@pytest.mark.parametrize(
    ("losses", "control", "message"),
    [
        ((8.0, -0.001), 9.0, "more bits would be stored than there are"),
        ((0.5, 0.1), 9.0, "the untouched base must store at most 64 bits"),
        ((8.0, 0.1), 0.5, "t must store at most 64 bits of facts that were never shown"),
    ],
)
def test_fact_trial_that_knows_what_it_cannot_know_is_refused(losses, control, message, shape):
    fact_set = _fact_set()
    with pytest.raises(ValueError, match=message):
        fact_trial(_record(fact_set, *losses, control=control), fact_set, shape)


def test_fact_trial_of_a_real_run_stores_facts_and_none_that_it_was_not_shown(
    tmp_path, shape, cache_folder
):
    fact_set, paths = _fact_set(), [tmp_path / "facts.jsonl", tmp_path / "control.jsonl"]
    for facts, path in zip((fact_set.facts, fact_set.control), paths, strict=True):
        make_facts(facts, load_tokenizer()).write(path)
    data, control = map(str, paths)
    spec = TrialSpec(
        name="t",
        folder=tmp_path / "t",
        base=BaseSpec(model=str(SHIPPED_MODEL), quantization="none", dtype="fp32"),
        data=DataSpec(data=data, eval=data, retention=control, seq_len=32),
        candidate=replace(fact_set.candidates[0], learning_rate=3e-3),
        num_examples=fact_set.num_examples,
        eval_every=fact_set.eval_every,
    )
    check_prepared(fact_set.facts, prepare_data(spec.data).audit)
    result = train_trial(spec, lambda row: True)
    record = TrialRecord(
        name="t",
        candidate=spec.candidate.to_dict(),
        status=result.status,
        reason=result.reason,
        rows=result.rows,
    )
    trial = fact_trial(record, fact_set, shape)
    assert trial.stored is not None
    assert trial.before is not None
    assert trial.control is not None
    assert trial.before < 0 < 50 < trial.stored < trial.known_bits == 192
    assert trial.control < 0


def test_prepared_data_that_lost_a_row_are_refused(tmp_path, cache_folder):
    facts, path = FactSpec(num_facts=16, num_symbols=3, alphabet_size=16), tmp_path / "facts.jsonl"
    make_facts(facts, load_tokenizer()).write(path)
    spec = DataSpec(data=str(path), eval=str(path), seq_len=32)
    check_prepared(facts, prepare_data(spec).audit)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[0]]) + "\n")
    with pytest.raises(ValueError, match="16 facts must have num_duplicates 0, have 2"):
        check_prepared(facts, prepare_data(spec).audit)
    path.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match="16 facts must have num_train_rows 16, have 15"):
        check_prepared(facts, prepare_data(spec).audit)


def _trial(num_facts, stored_per_param, *, rank=1, rate=1e-3, seed=0, status="finished"):
    params = rank * MLP_PARAMS
    return FactTrial(
        name=f"r{rank}-{num_facts}-{rate}-{seed}",
        status=status,
        reason="",
        num_facts=num_facts,
        known_bits=72.0 * num_facts,
        exposures=100,
        lora_rank=rank,
        adapter_params=params,
        learning_rate=rate,
        seed=seed,
        before=-500.0,
        stored=stored_per_param * params if status == "finished" else None,
        control=-900.0,
    )


LEVEL = [(117, 0.3), (235, 0.5), (469, 0.52)]
RISING = [(117, 0.3), (235, 0.5), (469, 0.9)]
OVER = [(235, 1.9), (469, 2.4), (939, 2.5)]


@pytest.mark.parametrize(
    ("curve", "exposures", "status", "said"),
    [
        (LEVEL, 100, "measured", "store 0.52 bits/parameter at most"),
        (LEVEL, 1000, "contradicted", "26% of the rule's 2"),
        (
            RISING,
            1000,
            "undecided",
            "has not levelled off (rank 1: 20% of the bits that the largest load adds",
        ),
        (OVER, 100, "supported", "store 2.50 bits/parameter"),
        ([], 100, "undecided", "No trial has finished"),
    ],
)
def test_findings_verdict_on_planted_curves(curve, exposures, status, said):
    trials = [_trial(*point) for point in curve]
    found = findings(trials, replace(RECIPE, exposures=exposures))
    assert found["verdict"]["status"] == status
    assert said in found["verdict"]["sentence"]
    assert (found["verdict"]["would_decide"] is None) == (status in ("supported", "contradicted"))


def test_findings_take_the_learning_rate_that_stores_most_in_the_mean_over_seeds():
    trials = [
        *(_trial(117, bits, rate=1e-3, seed=i) for i, bits in enumerate((0.9, 0.1))),
        *(_trial(117, bits, rate=2e-3, seed=i) for i, bits in enumerate((0.6, 0.5))),
        _trial(117, 0.8, rate=4e-3, seed=0),
        _trial(117, 0.0, rate=4e-3, seed=1, status="diverged"),
    ]
    found = findings(trials, RECIPE)
    ((cells,), every) = (table["rows"] for table in found["tables"])
    assert cells[5:8] == ["2.00e-03", f"{0.55 * MLP_PARAMS:,.0f}", "0.550"]
    assert len(every) == 6
    assert [cells[-1] for cells in every].count("diverged") == 1
    (series, _) = found["figures"][0]["series"]
    assert (series["y"], series["low"], series["high"]) == (
        [pytest.approx(0.55)],
        [pytest.approx(0.5)],
        [pytest.approx(0.6)],
    )
    assert not any("edge" in line for line in found["limits"])


def test_findings_name_a_best_learning_rate_at_the_edge():
    trials = [_trial(117, 0.2, rate=1e-3), _trial(117, 0.4, rate=2e-3)]
    found = findings(trials, RECIPE)
    assert found["tables"][0]["rows"][0][5] == "2.00e-03 (edge)"
    assert any("edge of those tried: rank 1 at 1.00 known" in line for line in found["limits"])


def test_findings_say_where_a_curve_falls_for_want_of_training():
    trials = [_trial(*point) for point in [*LEVEL, (939, 0.1)]]
    assert any("Rank 1 stores less" in line for line in findings(trials, RECIPE)["limits"])
    assert not any("stores less" in line for line in findings(trials[:-1], RECIPE)["limits"])


def test_findings_draw_each_rank_under_what_there_is_and_the_rule():
    trials = [_trial(*p, rank=rank) for rank in (1, 2) for p in [(58, -0.2), *LEVEL]]
    found = findings(trials, RECIPE)
    (figure,) = found["figures"]
    names = [series["name"] for series in figure["series"]]
    assert names == ["rank 1", "rank 2", "all there is to store"]
    assert figure["series"][0]["y"] == [0.0, *(pytest.approx(y) for _, y in LEVEL)]
    bound = figure["series"][2]
    assert bound["y"] == bound["x"]
    assert max(bound["x"]) == pytest.approx(2.4)
    assert figure["hlines"] == [{"y": 2, "text": "2 bits/parameter"}]
    assert len(figure_chart(figure).data) >= 3
    assert json.loads(json.dumps(found)) == found
    claims = found["claims"]
    assert [(c["arm"], c["predicted"]) for c in claims] == [("r1", 2.0), ("r2", 2.0)]
    assert claims[0]["measured"] == pytest.approx(0.52)
    assert (claims[0]["low"], claims[0]["high"]) == (None, None)  # one seed has no range
