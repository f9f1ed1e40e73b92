"""Candidates: names, round trips, order and samples."""

import itertools
import math
import re
from dataclasses import fields, replace

import pytest

from search_spaces.pruner import cut_rank_domain
from search_spaces.space import (
    Candidate,
    build_space,
    grid_candidates,
    random_candidates,
    trial_name,
)

BASE = Candidate(
    learning_rate=3.1e-4,
    lora_rank=16,
    lora_alpha=32,
    global_batch_size=16,
    target=("attn", "mlp", "unembed"),
    lr_schedule="constant",
    warmup=0,
    weight_decay=0,
    max_grad_norm=1,
    dropout=0,
    seed=0,
)
CHANGED = {
    "learning_rate": 3.1000001e-4,
    "lora_rank": 17,
    "lora_alpha": 16,
    "global_batch_size": 17,
    "target": ("attn", "mlp"),
    "lr_schedule": "cosine",
    "warmup": 0.1,
    "weight_decay": 0.1,
    "max_grad_norm": 0.3,
    "dropout": 0.1,
    "seed": 1,
    "full_finetune": True,
    "variant": "dora",
}


def test_trial_name_is_readable_and_stable():
    # The hash is written down: a change of it would orphan the folders of earlier runs.
    assert trial_name(BASE) == "r16-lr3.1e-04-b16-attn+mlp+unembed-d1b5e080"
    floats = replace(BASE, lora_alpha=32.0, dropout=0.0, warmup=0.0)
    assert trial_name(floats) == trial_name(BASE)


def test_trial_name_differs_in_every_field():
    assert set(CHANGED) == {field.name for field in fields(Candidate)}
    names = {trial_name(replace(BASE, **{key: value})) for key, value in CHANGED.items()}
    assert len(names | {trial_name(BASE)}) == len(CHANGED) + 1


def test_trial_name_is_a_short_file_name():
    many = replace(BASE, target=tuple(f"attn.some/long_name_{i}" for i in range(30)))
    for candidate in (BASE, many, replace(BASE, target=("a/../b c",))):
        assert re.fullmatch(r"[A-Za-z0-9+._-]{1,100}", trial_name(candidate))


def test_candidate_dict_round_trip_is_equal():
    assert Candidate.from_dict(BASE.to_dict()) == BASE
    full = replace(BASE, full_finetune=True, lora_rank=0)
    assert Candidate.from_dict(full.to_dict()) == full
    without = {key: value for key, value in BASE.to_dict().items() if key != "full_finetune"}
    assert Candidate.from_dict(without) == BASE


@pytest.mark.parametrize(
    "change",
    [
        *({"lora_rank": 0}, {"learning_rate": math.nan}, {"target": []}, {"target": "attn"}),
        *({"extra": 1}, {"full_finetune": 1}, {"dropout": 1}),
    ],
)
def test_candidate_from_dict_unusable_values_refused(change):
    with pytest.raises(ValueError, match="must"):
        Candidate.from_dict({**BASE.to_dict(), **change})


def test_grid_candidates_hold_every_combination_centre_first(tiny_llama):
    space = build_space(tiny_llama)
    grid = list(grid_candidates(space))
    assert len(grid) == 9 * 2 * 3
    assert len({trial_name(candidate) for candidate in grid}) == len(grid)
    per_rate = 2 * 3
    centre = [candidate.learning_rate for candidate in grid[:per_rate]]
    assert centre == pytest.approx([space.prior.lora] * per_rate)
    assert grid[per_rate].learning_rate < grid[2 * per_rate].learning_rate  # of equals the lower
    distances = [abs(math.log(c.learning_rate / space.prior.lora)) for c in grid]
    assert all(a <= b + 1e-8 for a, b in itertools.pairwise(distances))


def test_grid_candidates_are_lazy(tiny_llama):
    huge = {"learning_rate": {"low": 1e-6, "high": 1e-2, "num": 1000}, "seed": list(range(100))}
    space = build_space(tiny_llama, overrides=huge)
    assert len(list(itertools.islice(grid_candidates(space), 5))) == 5


def test_random_candidates_equal_seeds_give_equal_points(tiny_llama):
    space = build_space(tiny_llama, overrides={"lora_rank": [4, 8, 16]})
    first = list(random_candidates(space, 50, seed=3))
    assert first == list(random_candidates(space, 50, seed=3))
    assert first != list(random_candidates(space, 50, seed=4))
    grid = set(space.learning_rate.values())
    assert not grid & {candidate.learning_rate for candidate in first}
    assert {candidate.lora_rank for candidate in first} == {4, 8, 16}
    assert list(random_candidates(space, 0, seed=0)) == []
    with pytest.raises(ValueError, match="num_candidates must be >= 0"):
        random_candidates(space, -1, seed=0)


def test_random_candidates_cut_domains_never_propose_what_is_cut(tiny_llama):
    overrides = {"lora_rank": [4, 8, 16], "target": [["attn"], ["attn", "mlp"]]}
    space = build_space(tiny_llama, overrides=overrides)
    domains = cut_rank_domain(space, tiny_llama, 32_768)
    drawn = {(c.target, c.lora_rank) for c in random_candidates(space, 200, 0, domains)}
    assert drawn == {(("attn", "mlp"), 8), (("attn", "mlp"), 16)}
