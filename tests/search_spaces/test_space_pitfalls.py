"""The pitfalls, each found where it is and nowhere else."""

from dataclasses import replace

import pytest

from search_spaces.pitfalls import find
from search_spaces.space import build_space, grid_candidates


def _codes(**arguments):
    return {pitfall.code for pitfall in find(**arguments)}


def test_find_doctrine_defaults_on_enough_data_finds_nothing(model_shape):
    shape = model_shape("Llama-3.1-8B")
    space = build_space(shape)
    found = find(shape=shape, space=space, num_examples=6400, dataset_bits=10**6)
    assert found == []
    assert _codes(shape=shape, candidates=grid_candidates(space), num_examples=6400) == set()


@pytest.mark.parametrize(
    ("overrides", "codes"),
    [
        ({"target": "attn"}, {"attention_only", "missing_unembed"}),
        ({"target": "q_proj+v_proj"}, {"attention_only", "missing_unembed"}),
        ({"target": "attn+mlp"}, {"missing_unembed"}),
        ({"learning_rate": [1e-5, 1.4e-4]}, {"low_learning_rate"}),
        ({"learning_rate": [1e-5, 1.5e-4]}, set()),  # 3x of 4.88e-5 is 1.46e-4
        ({"lora_alpha": 16}, {"wrong_alpha"}),
        ({"lora_alpha": 64, "lora_rank": 64}, set()),  # alpha = rank
        ({"global_batch_size": [15, 16, 64]}, {"batch_range"}),
        ({"global_batch_size": 65}, {"batch_range"}),
        ({"dropout": 0.05}, {"dropout"}),
    ],
)
def test_find_one_override_finds_its_pitfall(model_shape, overrides, codes):
    shape = model_shape("Llama-3.1-8B")
    assert _codes(shape=shape, space=build_space(shape, overrides=overrides)) == codes


def test_find_every_pitfall_says_symptom_evidence_fix_and_source(model_shape):
    shape = model_shape("Qwen3-30B-A3B")
    overrides = {"target": [["attn"], ["attn", "experts"]], "dropout": 0.1, "lora_alpha": 8}
    overrides |= {"lora_rank": [4, 128], "global_batch_size": 256, "learning_rate": 1e-9}
    space = build_space(shape, "rl", overrides=overrides)
    found = find(shape=shape, space=space, method="rl", num_examples=10, dataset_bits=10**12)
    assert {pitfall.code for pitfall in found} == {
        *("attention_only", "missing_unembed", "missing_experts", "few_steps", "wrong_alpha"),
        *("low_learning_rate", "undercapacity", "batch_range", "dropout", "rl_rank"),
        "expert_rank_floor",
    }
    for pitfall in found:
        assert all((pitfall.symptom, pitfall.evidence, pitfall.fix, pitfall.source))
    ranks = [("error", "warning", "note").index(pitfall.severity) for pitfall in found]
    assert ranks == sorted(ranks)


def test_find_steps_at_the_threshold_are_enough(tiny_llama):
    space = build_space(tiny_llama, overrides={"global_batch_size": 16})
    assert _codes(shape=tiny_llama, space=space, num_examples=1585) == set()  # 100 steps
    assert _codes(shape=tiny_llama, space=space, num_examples=1584) == {"few_steps"}
    assert _codes(shape=tiny_llama, space=space, num_examples=1584, epochs=2) == set()
    two = build_space(tiny_llama, overrides={"global_batch_size": 16, "epochs": 2})
    assert _codes(shape=tiny_llama, space=two, num_examples=800) == set()
    budget = build_space(tiny_llama, overrides={"global_batch_size": 16, "examples": 1584})
    assert _codes(shape=tiny_llama, space=budget, num_examples=10**6) == {"few_steps"}


def test_find_undercapacity_some_or_all_adapters_differ_in_severity(tiny_llama):
    space = build_space(tiny_llama, overrides={"lora_rank": [4, 8], "target": "attn+mlp+unembed"})
    held = 2 * tiny_llama.lora_params(8)
    [some] = find(shape=tiny_llama, space=space, dataset_bits=held)
    [every] = find(shape=tiny_llama, space=space, dataset_bits=held + 1)
    assert (some.code, some.severity) == ("undercapacity", "warning")
    assert (every.code, every.severity) == ("undercapacity", "error")
    assert "raise lora_rank to 8" in some.fix


def test_find_rl_rank_64_is_fine_and_65_is_not(model_shape):
    shape = model_shape("Llama-3.1-70B")
    for rank, codes in ((64, set()), (65, {"rl_rank"})):
        space = build_space(shape, "rl", overrides={"lora_rank": rank})
        assert _codes(shape=shape, space=space, method="rl") == codes


def test_find_full_and_lora_arms_with_the_same_rates_are_flagged(tiny_llama):
    lora = list(grid_candidates(build_space(tiny_llama)))
    full = [replace(c, full_finetune=True, lora_rank=0) for c in lora]
    tenth = [replace(c, learning_rate=c.learning_rate / 10) for c in full]
    assert _codes(shape=tiny_llama, candidates=lora + full) == {"shared_learning_rate"}
    assert _codes(shape=tiny_llama, candidates=lora + tenth) == set()


def test_find_without_anything_to_judge_refused(tiny_llama):
    with pytest.raises(ValueError, match="needs a space or candidates"):
        find(shape=tiny_llama)
