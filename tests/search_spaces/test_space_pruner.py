"""The pruner: what is discarded, why, and what is left for a searcher."""

import pickle
from dataclasses import replace

import pytest

from search_spaces.capacity import sufficient_rank
from search_spaces.pruner import MEMORY, NothingAdmittedError, Verdict, cut_rank_domain, prune
from search_spaces.space import Candidate, DatasetFacts, build_space, grid_candidates

ALL_LINEAR = ("attn", "mlp")


def _candidate(**changes):
    base = Candidate(
        learning_rate=1e-3,
        lora_rank=8,
        lora_alpha=32,
        global_batch_size=16,
        target=ALL_LINEAR,
        lr_schedule="constant",
        warmup=0,
        weight_decay=0,
        max_grad_norm=1,
        dropout=0,
        seed=0,
    )
    return replace(base, **changes)


def test_prune_tiny_llama_boundary_keeps_exact_fit(tiny_llama):
    # FIELD_CASES E01.
    eight, four = _candidate(), _candidate(lora_rank=4)
    result = prune([eight, four], tiny_llama, 32_768)
    assert result.admitted == (eight,)
    [cut] = result.discarded
    assert (cut.candidate, cut.rule) == (four, "capacity")
    assert cut.numbers["adapter_params"] == 8192
    assert cut.numbers["adapter_bits"] == 16_384
    assert cut.numbers["dataset_bits"] == 32_768
    assert cut.numbers["sufficient_rank"] == 8
    assert "16,384 bits" in cut.reason
    with pytest.raises(NothingAdmittedError, match="set lora_rank: 9"):
        prune([eight, four], tiny_llama, 32_769)


def test_prune_nothing_can_hold_the_data_raises_with_numbers(tiny_llama):
    # FIELD_CASES E03: 10^9 tokens on TINY.
    space = build_space(tiny_llama, dataset=DatasetFacts.from_tokens(10**9))
    with pytest.raises(NothingAdmittedError) as caught:
        prune(grid_candidates(space), tiny_llama, 10**9)
    message = str(caught.value)
    assert "capacity_policy: advisory" in message
    assert "1,000,000,000 data bits" in message
    assert f"{sufficient_rank(tiny_llama, 10**9):,}" in message
    assert "set lora_rank" not in message  # no useful rank is enough
    assert isinstance(caught.value, ValueError)


def test_prune_advisory_admits_and_says_what_would_be_cut(tiny_llama):
    candidates = [_candidate(), _candidate(lora_rank=4)]
    result = prune(candidates, tiny_llama, 10**9, policy="advisory")
    assert result.admitted == tuple(candidates)
    assert len(result.discarded) == 0
    assert [item.candidate for item in result.advised] == candidates


def test_prune_full_finetune_is_never_cut_by_capacity(tiny_llama):
    full = _candidate(full_finetune=True, lora_rank=0)
    result = prune([full, _candidate()], tiny_llama, 10**9)
    assert result.admitted == (full,)
    assert len(result.discarded) == 1


def test_prune_dropout_on_fused_experts_is_cut(tiny_moe):
    # FIELD_CASES B06; a target without experts may have dropout.
    space = build_space(
        tiny_moe, overrides={"dropout": [0, 0.05], "target": [["attn"], ["attn", "experts"]]}
    )
    result = prune(grid_candidates(space), tiny_moe, 0)
    kept = {(c.target, c.dropout) for c in result.admitted}
    assert kept == {(("attn",), 0), (("attn",), 0.05), (("attn", "experts"), 0)}
    assert {item.rule for item in result.discarded} == {"expert_dropout"}
    assert "dropout 0.05" in result.discarded[0].reason


def test_prune_only_dropout_left_raises_also_when_advisory(tiny_moe):
    bad = _candidate(target=("experts",), dropout=0.1)
    with pytest.raises(NothingAdmittedError, match="set dropout: 0"):
        prune([bad], tiny_moe, 0, policy="advisory")


def test_prune_discarded_reads_like_a_sequence(tiny_llama):
    candidates = [_candidate(lora_rank=rank) for rank in (1, 2, 4, 8)]
    discarded = prune(candidates, tiny_llama, 32_768).discarded
    assert [item.candidate.lora_rank for item in discarded] == [1, 2, 4]
    assert [item.candidate.lora_rank for item in discarded[1:]] == [2, 4]
    assert discarded[-1].numbers["lora_rank"] == 4
    assert pickle.loads(pickle.dumps(discarded))[0] == discarded[0]


def test_prune_no_candidates_gives_an_empty_result(tiny_llama):
    result = prune([], tiny_llama, 10**9)
    assert (result.admitted, len(result.discarded), len(result.advised)) == ((), 0, 0)


def test_prune_unknown_policy_or_target_refused(tiny_llama):
    with pytest.raises(ValueError, match="capacity_policy must be 'discard' or 'advisory'"):
        prune([], tiny_llama, 1, policy="ignore")
    with pytest.raises(ValueError, match="'qproj' matches no layer"):
        prune([_candidate(target=("qproj",))], tiny_llama, 1)


def test_prune_rl_episodes_are_one_bit_each(tiny_llama):
    facts = DatasetFacts.from_episodes(4096, 8)
    assert prune([_candidate()], tiny_llama, facts.bits).admitted == (_candidate(),)


def test_cut_rank_domain_per_target_equals_pruned_grid(tiny_llama):
    overrides = {
        "lora_rank": [1, 2, 4, 8, 16, 32],
        "target": [["attn"], ["attn", "mlp"], ["attn", "mlp", "unembed"]],
        "learning_rate": 1e-3,
    }
    space = build_space(tiny_llama, overrides=overrides)
    for bits in (0, 1, 16_384, 32_768, 32_769, 50_000):
        admitted = prune(grid_candidates(space), tiny_llama, bits).admitted
        for domain in cut_rank_domain(space, tiny_llama, bits):
            ranks = {c.lora_rank for c in admitted if c.target == domain.target}
            assert set(domain.lora_ranks) == ranks
            assert set(domain.lora_ranks) | set(domain.cut_lora_ranks) == {1, 2, 4, 8, 16, 32}
            assert domain.admissible is bool(ranks)


def test_cut_rank_domain_moe_plan_has_dropout_zero(tiny_moe):
    # FIELD_CASES B06: the plan for Qwen3-MoE has dropout {0}.
    space = build_space(tiny_moe, overrides={"dropout": [0, 0.05]})
    [domain] = cut_rank_domain(space, tiny_moe, 0)
    assert (domain.dropouts, domain.cut_dropouts) == ((0,), (0.05,))


def test_cut_rank_domain_nothing_left_raises_unless_advisory(tiny_llama):
    space = build_space(tiny_llama)
    with pytest.raises(NothingAdmittedError, match="capacity_policy"):
        cut_rank_domain(space, tiny_llama, 10**9)
    [domain] = cut_rank_domain(space, tiny_llama, 10**9, policy="advisory")
    assert domain.lora_ranks == (16, 32)
    assert domain.cut_lora_ranks == ()


def test_cut_rank_domain_only_dropout_left_raises_also_when_advisory(tiny_moe):
    space = build_space(tiny_moe, overrides={"dropout": 0.05, "target": "experts"})
    with pytest.raises(NothingAdmittedError, match="set dropout: 0"):
        cut_rank_domain(space, tiny_moe, 10**9, policy="advisory")


def _no_room_above(lora_rank: int):
    """A rule from outside, as cluster/ gives: what is above a rank has no room."""

    def verdict(rank: int, target: tuple[str, ...]) -> Verdict | None:
        numbers = {"lora_rank": rank, "needed_bytes": 10 * rank, "room_bytes": 10 * lora_rank}
        text = f"rank {rank} on {'+'.join(target)} needs {10 * rank}"
        return Verdict(rule=MEMORY, reason=text, numbers=numbers) if rank > lora_rank else None

    return verdict


def test_prune_outside_rule_discards_what_capacity_admits(tiny_llama):
    no_room = _no_room_above(8)
    candidates = [_candidate(lora_rank=rank) for rank in (4, 8, 16)]
    result = prune(candidates, tiny_llama, 32_768, outside=lambda c: no_room(c.lora_rank, c.target))
    assert [c.lora_rank for c in result.admitted] == [8]
    assert [(d.candidate.lora_rank, d.rule) for d in result.discarded] == [
        (4, "capacity"),
        (16, "memory"),
    ]
    assert result.discarded[1].numbers["needed_bytes"] == 160


def test_prune_advisory_capacity_is_no_excuse_for_memory(tiny_llama):
    no_room = _no_room_above(4)
    candidates = [_candidate(lora_rank=rank) for rank in (4, 8)]
    result = prune(
        candidates,
        tiny_llama,
        10**9,
        policy="advisory",
        outside=lambda c: no_room(c.lora_rank, c.target),
    )
    assert [c.lora_rank for c in result.admitted] == [4]
    assert [d.candidate.lora_rank for d in result.advised] == [4]
    assert [(d.candidate.lora_rank, d.rule) for d in result.discarded] == [(8, "memory")]


def test_prune_nothing_has_room_raises_with_the_nearest(tiny_llama):
    no_room = _no_room_above(1)
    candidates = [_candidate(lora_rank=rank) for rank in (16, 8)]
    with pytest.raises(NothingAdmittedError, match=r"no candidate fits in memory.*rank 8 on"):
        prune(candidates, tiny_llama, 32_768, outside=lambda c: no_room(c.lora_rank, c.target))


def test_cut_rank_domain_keeps_apart_what_has_no_room(tiny_llama):
    space = build_space(tiny_llama, overrides={"lora_rank": [4, 8, 16, 32], "target": ["attn+mlp"]})
    [domain] = cut_rank_domain(space, tiny_llama, 32_768, fits=_no_room_above(16))
    assert (domain.lora_ranks, domain.cut_lora_ranks) == ((8, 16), (4,))
    assert domain.unfit_lora_ranks == (32,)
    with pytest.raises(NothingAdmittedError, match="needs 80"):
        cut_rank_domain(space, tiny_llama, 32_768, fits=_no_room_above(1))
