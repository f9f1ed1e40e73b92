"""The published tulu3 sweep: optima by model and rank, edges, regrets by named sets of models."""

import csv
import math
from dataclasses import replace

import pytest

from search_spaces.studies.published import (
    SweepRun,
    ahead_depends_on_set,
    read_sweep,
    set_regrets,
    sweep_optima,
)
from search_spaces.studies.published_models import MODEL_SETS, MODELS, PublishedModel

LLAMA_8B, LLAMA_1B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"
NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
SUPER = "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16"


@pytest.fixture(scope="module")
def runs(shared):
    return read_sweep(shared / "reference" / "tulu3_lora_sweep.csv")


@pytest.fixture(scope="module")
def optima(runs):
    return {(found.model, found.lora_rank): found for found in sweep_optima(runs)}


def test_read_sweep_reads_every_run_and_refuses_a_missing_column(runs, shared):
    assert len(runs) == 386
    assert {run.lora_rank for run in runs} == {1, 2, 4, 16, 64, 128}
    with pytest.raises(ValueError, match=r"lacks \{'eval_loss'\}"):
        read_sweep(shared / "reference" / "tulu3_lora_sweep.csv", "eval_loss")


def test_sweep_optima_of_tulu3_by_hand(optima):
    # Llama-3.1-8B, rank 16: 0.5983, 0.5863, 0.5931 at 1e-4, 3e-4, 1e-3. With x = log10(LR / 3e-4)
    # at -0.4771, 0, 0.5229: slopes -0.02515 and 0.01300, curvature 0.03815; the slope at 0 is
    # -0.02515 + 0.4771 x 0.03815 = -0.00695, the lowest point at 0.00695 / 0.0763 = 0.0911.
    found = optima[LLAMA_8B, 16]
    assert found.optimum.learning_rate == pytest.approx(3e-4 * 10**0.0911, rel=2e-3)
    assert found.optimum.loss == pytest.approx(0.5863 - 0.00695**2 / (4 * 0.03815), abs=1e-5)
    assert (found.edge, found.num_learning_rates) == ("none", 4)


def test_sweep_optima_higher_ranks_of_llama_are_best_at_higher_rates(optima):
    rates = [optima[LLAMA_8B, rank].optimum.learning_rate for rank in (4, 16, 64, 128)]
    assert rates[0] < rates[1] < rates[2]
    assert all(2e-4 < rate < 1e-3 for rate in rates)


def test_sweep_optima_best_at_the_last_listed_rate_is_flagged(optima):
    # Read off the file: Llama-3.2-1B falls up to 1e-3 at every rank, gpt-oss up to 1e-4.
    assert {optima[LLAMA_1B, rank].edge for rank in (4, 16, 64, 128)} == {"high"}
    assert {optima["openai/gpt-oss-20b", rank].edge for rank in (4, 16)} == {"high"}
    assert optima[SUPER, 1].num_learning_rates == 1
    flagged = [found for found in optima.values() if found.edge != "none"]
    assert (len(optima), len(flagged)) == (90, 24)
    assert all(found.optimum.on_edge for found in flagged)
    assert not any(found.optimum.on_edge for found in optima.values() if found not in flagged)


def _planted(*losses):
    return [
        SweepRun(model="m", learning_rate=10.0 ** (k - 5), lora_rank=4, loss=loss)
        for k, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("losses", "edge"),
    [
        ((2.2, 2.0, 2.1, 3.0), "none"),
        ((2.0, 2.1, 2.2), "low"),
        ((2.2, 2.1, 2.0), "high"),
        ((2.2, 2.1, math.inf, math.inf), "high"),  # beside divergence
        ((math.inf, 2.0, 2.2), "low"),
        ((math.inf, 2.0, math.inf), "high"),  # on both sides
        ((2.2, 2.0, 2.1, math.inf), "none"),
        ((2.0,), "high"),
    ],
)
def test_sweep_optima_planted_edges_and_divergence_are_flagged(losses, edge):
    [found] = sweep_optima(_planted(*losses))
    assert found.edge == edge
    assert found.optimum.on_edge == (edge != "none")


def test_sweep_optima_one_diverged_repeat_makes_the_rate_diverged():
    runs = _planted(2.2, 2.0, 2.1)
    [found] = sweep_optima([*runs, replace(runs[2], loss=math.inf)])
    assert found.edge == "high"


def test_models_widths_match_the_configs_at_hand(model_shape):
    for name, config in {
        LLAMA_1B: "Llama-3.2-1B",
        LLAMA_8B: "Llama-3.1-8B",
        "meta-llama/Llama-3.3-70B-Instruct": "Llama-3.1-70B",
        "Qwen/Qwen3-4B-Instruct-2507": "Qwen3-4B",
        "Qwen/Qwen3-8B-Base": "Qwen3-8B",
        "Qwen/Qwen3-30B-A3B-Base": "Qwen3-30B-A3B",
        "openai/gpt-oss-20b": "gpt-oss-20b",
    }.items():
        shape, model = model_shape(config), MODELS[name]
        assert (model.hidden_size, model.vocab_size) == (shape.hidden_size, shape.vocab_size)
        assert (model.model_type, model.dense) == (shape.model_type, shape.num_experts == 0)


def test_models_width_and_vocabulary_sum_to_the_published_unembedding_count(shared):
    with (shared / "reference" / "lora_params_per_rank.csv").open() as file:
        unembed = {row["model"]: int(row["unembed"]) for row in csv.DictReader(file)}
    counted = {name: model.hidden_size + model.vocab_size for name, model in MODELS.items()}
    assert counted == {name: unembed[name] for name in MODELS}


def test_model_sets_all_holds_every_model_of_the_sweep(runs):
    assert set(MODEL_SETS["all"]) == {run.model for run in runs}
    assert set(MODEL_SETS["all dense"]) | set(MODEL_SETS["all experts"]) == set(MODEL_SETS["all"])


def test_set_regrets_which_prior_is_ahead_depends_on_the_set(runs):
    found = set_regrets(runs)
    ahead = {name: one.ahead for name, one in found.items()}
    assert ahead["llama"] == ahead["qwen3 dense"] == ahead["all dense"] == "doctrine"
    assert ahead["llama from 8B"] == ahead["qwen3 experts"] == ahead["all"] == "tinker"
    assert ahead_depends_on_set(found)
    assert not ahead_depends_on_set({"llama": found["llama"], "dense": found["all dense"]})
    # The llama rows of the table in test_space_fit.py: 0.031, 0.471, 0.388, 0.146 percent.
    assert found["llama"].mean_frac["doctrine"] == pytest.approx(1.036e-2 / 4, abs=1e-5)
    assert found["llama"].mean_frac["tinker"] == pytest.approx(1.767e-2 / 4, abs=1e-5)


def test_set_regrets_models_without_width_law_or_runs_are_listed_not_guessed(runs):
    everything = set_regrets(runs)["all"]
    assert everything.left_out[SUPER] == "width not known"
    assert everything.left_out[NANO].startswith("doctrine: 7.44e-04 is outside what was run")
    assert everything.left_out["deepseek-ai/DeepSeek-V3.1"].startswith("tinker: no law")
    assert len(everything.models) + len(everything.left_out) == len(MODEL_SETS["all"])
    assert set(everything.by_model) == set(everything.models)
    alone = set_regrets(runs, priors=("doctrine",))["all"]
    assert "deepseek-ai/DeepSeek-V3.1" in alone.models


def test_set_regrets_planted_sweep_by_hand():
    # Doctrine at width 2000: 1e-3, where the loss is 2.0, the best. At width 200: 1e-2, 2.2.
    runs = [
        SweepRun(model=model, learning_rate=rate, lora_rank=4, loss=loss)
        for model in ("wide", "narrow")
        for rate, loss in ((1e-4, 2.2), (1e-3, 2.0), (1e-2, 2.2))
    ]
    models = {
        name: PublishedModel(hidden_size=width, model_type="llama", vocab_size=1, dense=True)
        for name, width in (("wide", 2000), ("narrow", 200))
    }
    sets = {"both": ("wide", "narrow"), "none": ("absent",)}
    found = set_regrets(runs, sets=sets, priors=("doctrine",), models=models)
    assert found["both"].by_model["wide"]["doctrine"] == pytest.approx(0)
    assert found["both"].by_model["narrow"]["doctrine"] == pytest.approx(0.1)
    assert found["both"].mean_frac["doctrine"] == pytest.approx(0.05)
    assert (found["none"].ahead, found["none"].mean_frac) == (None, {})
    assert found["none"].left_out == {"absent": "not in the sweep"}
