"""Variants and alpha rules: how they are written, what they scale by, and where their rates are centred."""

import json
from dataclasses import replace
from itertools import islice

import pytest

from search_spaces import doctrine, pitfalls
from search_spaces.candidate import trial_name
from search_spaces.pruner import NothingAdmittedError, cut_rank_domain, prune
from search_spaces.space import Candidate, build_space, grid_candidates, random_candidates
from search_spaces.values import parse_domain
from search_spaces.variants import RankMultiple, alpha_at, canonical, lr_factor, scale, stored_rank


def built(shape, **overrides):
    return build_space(shape, overrides=overrides)


def first(shape, **overrides) -> list[Candidate]:
    """The candidates at the centre of the grid, one batch."""
    space = built(shape, global_batch_size=16, **overrides)
    count = len(space.lora_rank.options) * len(space.lora_alpha.values())
    return list(islice(grid_candidates(space), count * len(space.variant.options)))


@pytest.mark.parametrize(
    ("rank", "plain", "root"), [(8, 4.0, 11.3137085), (64, 0.5, 4.0), (256, 0.125, 2.0)]
)
def test_scale_of_alpha_32_is_the_field_cases(rank, plain, root):
    # FIELD_CASES B18.
    assert scale(32, rank) == plain
    assert scale(32, rank, "rslora") == pytest.approx(root)
    assert scale(32, rank, "rslora+dora") == pytest.approx(root)


def test_scaled_learning_rate_falls_fourfold_where_alpha_and_rate_are_halved(tiny_llama):
    # FIELD_CASES E04: halving alpha does not ask for half the rate, or the step falls four times.
    (one,) = first(tiny_llama, lora_rank=32, lora_alpha=64, learning_rate=2e-4)
    other = replace(one, lora_alpha=32.0, learning_rate=1e-4)
    assert one.scaled_learning_rate == pytest.approx(2e-4 * 2)
    assert one.scaled_learning_rate / other.scaled_learning_rate == pytest.approx(4)
    kept = replace(other, learning_rate=4e-4)
    assert kept.scaled_learning_rate == pytest.approx(one.scaled_learning_rate)
    assert replace(one, full_finetune=True, lora_rank=0).scaled_learning_rate == 0


def test_scale_with_alpha_a_multiple_of_the_rank_is_that_at_every_rank(tiny_llama):
    # FIELD_CASES E04: fixed alpha falls as 1/r, alpha = 2r stays.
    fixed = first(tiny_llama, lora_rank=[8, 16, 32], lora_alpha=32)
    assert [c.scale for c in fixed] == [4, 2, 1]
    ruled = first(tiny_llama, lora_rank=[8, 16, 32], lora_alpha="2*rank")
    assert [(c.lora_alpha, c.scale) for c in ruled] == [(16, 2), (32, 2), (64, 2)]
    equal = first(tiny_llama, lora_rank=[8, 16, 32], lora_alpha="rank")
    assert [(c.lora_alpha, c.scale) for c in equal] == [(8, 1), (16, 1), (32, 1)]


def test_learning_rate_follows_the_published_exponents(tiny_llama):
    # docs/doctrine.md, section 1: with alpha = r as r^-0.5, with rsLoRA as r^-0.25, else constant.
    centre = build_space(tiny_llama).prior.lora

    def rates(**overrides) -> list[float]:
        return [c.learning_rate / centre for c in first(tiny_llama, **overrides)]

    ranks = [2, 32, 512]
    assert rates(lora_rank=ranks) == pytest.approx([1, 1, 1])
    assert rates(lora_rank=ranks, lora_alpha=16) == pytest.approx([1, 1, 1])
    assert rates(lora_rank=ranks, lora_alpha="rank") == pytest.approx([4, 1, 0.25])
    assert rates(lora_rank=ranks, lora_alpha="2*rank") == pytest.approx(
        [8**0.5, 0.5**0.5, 32**-0.5]
    )
    assert rates(lora_rank=[1, 16, 256], variant="rslora") == pytest.approx([1, 0.5, 0.25])
    assert rates(lora_rank=16, lora_alpha=[8, 32, 128]) == pytest.approx([2, 1, 0.5])


def test_learning_rate_of_each_variant_is_its_own(tiny_llama):
    names = ["lora", "dora", "lora_plus", "pissa", "dora+pissa"]
    found = first(tiny_llama, lora_rank=16, variant=names)
    rates = {c.variant: c.learning_rate / found[0].learning_rate for c in found}
    assert rates == pytest.approx(
        {"lora": 1, "dora": 0.7, "lora_plus": 0.25, "pissa": 0.1, "dora+pissa": 0.07}
    )
    # About 0.5 to 1, and about 0.1, of LoRA's: docs/doctrine.md, section 5. LoRA+'s two rates, 16 apart, lie
    # around LoRA's.
    assert 0.5 <= doctrine.VARIANT_LR.value["dora"] <= 1
    slow = doctrine.VARIANT_LR.value["lora_plus"]
    assert slow * (slow * doctrine.LORA_PLUS_RATIO.value) == 1
    notes = build_space(tiny_llama, overrides={"variant": names}).notes
    told = [
        note for note in notes if note.key == "learning_rate" and note.value.startswith("pissa")
    ]
    assert [note.value for note in told] == ["pissa: x0.1"]
    assert told[0].source == (
        "(scale x rank / 32)^-0.5 (docs/doctrine.md, section 1) x 0.1 of pissa (docs/doctrine.md, section 5)"
    )


def test_learning_rate_that_the_user_gave_is_nobodys_to_change(tiny_llama):
    found = first(
        tiny_llama, lora_rank=[8, 64], lora_alpha="rank", variant="pissa", learning_rate=1e-3
    )
    assert {c.learning_rate for c in found} == {1e-3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("lora", "lora"), ("dora", "dora"), ("pissa+rslora", "rslora+pissa")],
)
def test_variant_is_written_in_one_way(text, expected):
    assert canonical(text) == expected
    assert parse_domain("variant", text).values() == (expected,)


@pytest.mark.parametrize("text", ["LoRA", "", "dora+dora", "lora+dora", "olora", "dora+"])
def test_variant_that_there_is_none_of_is_refused(text):
    with pytest.raises(ValueError, match=r"variant must be lora, or one or more of rslora, dora"):
        parse_domain("variant", text)


def test_variant_twice_in_another_order_is_refused():
    with pytest.raises(ValueError, match="must not list a value twice"):
        parse_domain("variant", ["dora+rslora", "rslora+dora"])


def test_alpha_rules_are_read_and_shown():
    domain = parse_domain("lora_alpha", ["rank", "2*rank", "0.5 * rank"])
    assert domain.values() == (RankMultiple(1), RankMultiple(2), RankMultiple(0.5))
    assert [str(rule) for rule in domain.values()] == ["rank", "2*rank", "0.5*rank"]
    assert [alpha_at(rule, 16) for rule in domain.values()] == [16, 32, 8]


@pytest.mark.parametrize("text", ["ranks", "rank*2", "x*rank", "0*rank", "-1*rank", "inf*rank", ""])
def test_alpha_rule_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"'rank' or a multiple such as '2\*rank', got"):
        parse_domain("lora_alpha", text)


def test_alpha_of_two_conventions_is_refused():
    # FIELD_CASES E04: mixing the two makes rank and learning rate inseparable.
    with pytest.raises(ValueError, match="lora_alpha must follow one convention"):
        parse_domain("lora_alpha", [32, "rank"])


def test_trial_name_and_dict_of_plain_lora_do_not_name_it(tiny_llama):
    (plain, dora) = first(tiny_llama, lora_rank=16, variant=["lora", "dora"])
    assert "variant" not in plain.to_dict()
    assert dora.to_dict()["variant"] == "dora"
    assert trial_name(dora).startswith("dora-r16-")
    for candidate in (plain, dora):
        assert Candidate.from_dict(json.loads(json.dumps(candidate.to_dict()))) == candidate


def test_prune_variants_and_dropout_that_experts_cannot_have_are_cut_with_the_reason(model_shape):
    # FIELD_CASES B06: the plan for Qwen3-MoE has dropout {0}, and no trial fails for it.
    shape = model_shape("Qwen3-30B-A3B")
    names = ["lora", "rslora", "dora", "lora_plus", "pissa", "rslora+dora"]
    space = built(shape, lora_rank=64, global_batch_size=16, dropout=[0, 0.05], variant=names)
    result = prune(grid_candidates(space), shape, 1000)
    assert {c.dropout for c in result.admitted} == {0}
    assert {c.variant for c in result.admitted} == {"lora", "rslora", "lora_plus"}
    reasons = {item.rule: item.reason for item in result.discarded}
    assert "PEFT allows no dropout; set dropout: 0" in reasons["expert_dropout"]
    assert "PEFT allows no dora; set variant: lora" in reasons["expert_variant"]
    (domain,) = cut_rank_domain(space, shape, 1000)
    assert (domain.dropouts, domain.cut_dropouts) == ((0,), (0.05,))
    assert domain.variants == ("lora", "rslora", "lora_plus")
    assert domain.cut_variants == ("dora", "pissa", "rslora+dora")
    drawn = list(random_candidates(space, 50, 0, [domain]))
    assert {c.variant for c in drawn} == {"lora", "rslora", "lora_plus"}
    # Without the experts all of them can be trained.
    attention = built(shape, lora_rank=64, target="attn", variant=names, dropout=0.05)
    assert len(prune(grid_candidates(attention), shape, 1000).discarded) == 0


def test_prune_says_why_nothing_is_left_where_experts_have_no_such_variant(model_shape):
    shape = model_shape("Mixtral-8x7B")
    space = built(shape, lora_rank=64, variant="dora")
    for judge in (
        lambda: prune(grid_candidates(space), shape, 1000),
        lambda: cut_rank_domain(space, shape, 1000),
    ):
        with pytest.raises(
            NothingAdmittedError, match=r"nothing admitted: variant dora on .*experts"
        ):
            judge()


def test_random_candidates_of_one_variant_are_those_of_before(tiny_llama):
    space = build_space(tiny_llama)
    drawn = list(random_candidates(space, 20, 3))
    named = list(random_candidates(replace(space), 20, 3))
    assert drawn == named
    several = build_space(tiny_llama, overrides={"variant": ["lora", "dora"]})
    assert {c.variant for c in random_candidates(several, 20, 3)} == {"lora", "dora"}


def test_find_does_not_call_an_alpha_rule_wrong_whose_rates_are_rescaled(tiny_llama):
    def codes(alpha: object) -> set[str]:
        space = built(tiny_llama, lora_rank=[8, 16], lora_alpha=alpha)
        return {p.code for p in pitfalls.find(shape=tiny_llama, space=space)}

    assert "wrong_alpha" not in codes("2*rank") | codes("rank") | codes(32)
    assert "wrong_alpha" in codes(64)


def test_held_params_of_a_variant_are_what_it_saves(tiny_llama):
    plain = tiny_llama.lora_params(4)
    outputs = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64) + 256
    target = tiny_llama.components
    assert tiny_llama.held_params(4, target, "rslora") == plain
    assert tiny_llama.held_params(4, target, "pissa") == 2 * plain
    assert tiny_llama.held_params(4, target, "dora") == plain + outputs
    assert tiny_llama.held_params(4, target, "dora+pissa") == 2 * plain + outputs
    assert tiny_llama.trained_params(4, target, "dora+pissa") == plain + outputs
    assert (stored_rank(4, "pissa"), stored_rank(4, "dora")) == (8, 4)


def test_lr_factor_is_exactly_one_where_nothing_differs():
    assert lr_factor("lora", 32.0, 16) == 1.0
    assert lr_factor("lora", 8.0, 16, 8.0) == 1.0
