"""Plans of the shipped base: counts, verdicts and budgets by hand."""

import json

import pytest
from tokenizers import Tokenizer

from orchestration.config import make_config
from orchestration.plan_json import plan_to_dict
from orchestration.planning import default_name, make_budget
from orchestration.show import show_plan
from search_spaces.pruner import NothingAdmittedError

ATTN_PER_RANK = 4 * (2 * (192 + 192) + 2 * (192 + 64))  # 4 layers: q and o, k and v
MLP_PER_RANK = 4 * 3 * (192 + 512)
ATTN_BITS = 2 * ATTN_PER_RANK


def loss_tokens(base, rows) -> int:
    """Tokens of the completions and one end token each, by the tokenizer alone."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    return sum(count(row["prompt"] + row["completion"]) - count(row["prompt"]) + 1 for row in rows)


def test_make_plan_grid_is_the_product_of_what_was_given(planned):
    plan = planned(
        lora_rank=[4, 8],
        learning_rate={"low": 1e-4, "high": 1e-2, "num": 3},
        global_batch_size=[16, 32],
        target=[["attn"], ["mlp"]],
        dropout=[0.0, 0.1],
    )
    admitted = plan.pruned.admitted
    assert len(admitted) == 2 * 3 * 2 * 2 * 2
    assert len({item["name"] for item in plan_to_dict(plan)["candidates"]}) == 48
    assert {round(c.learning_rate, 9) for c in admitted} == {0.0001, 0.001, 0.01}
    assert {(c.lora_rank, c.global_batch_size, c.target, c.dropout) for c in admitted} == {
        (rank, batch, target, dropout)
        for rank in (4, 8)
        for batch in (16, 32)
        for target in (("attn",), ("mlp",))
        for dropout in (0.0, 0.1)
    }


@pytest.mark.parametrize(
    ("tokens", "admitted", "discarded"),
    [
        (ATTN_BITS, [1, 2], []),  # 2 x params >= bits holds at equality
        (ATTN_BITS + 1, [2], [1]),
        (2 * ATTN_BITS, [2], [1]),
    ],
)
def test_make_plan_capacity_boundary_cuts_one_bit_above(planned, tokens, admitted, discarded):
    plan = planned(
        dataset_tokens=tokens,
        lora_rank=[1, 2],
        learning_rate=1e-3,
        global_batch_size=16,
        target="attn",
    )
    assert [c.lora_rank for c in plan.pruned.admitted] == admitted
    assert [item.candidate.lora_rank for item in plan.pruned.discarded] == discarded


def test_plan_to_dict_discarded_candidate_has_its_reason_and_numbers(planned):
    plan = planned(
        dataset_tokens=15_000,
        lora_rank=[1, 2],
        learning_rate=1e-3,
        global_batch_size=16,
        target="attn",
    )
    (item,) = plan_to_dict(plan)["discarded"]
    assert item["rule"] == "capacity"
    assert item["adapter_params"] == ATTN_PER_RANK == 5120
    assert item["numbers"] == {
        "lora_rank": 1,
        "adapter_params": 5120,
        "adapter_bits": 10_240,
        "dataset_bits": 15_000,
        "margin": pytest.approx(10_240 / 15_000),
        "sufficient_rank": 2,
        "max_useful_lora_rank": 64,
    }
    for part in ("UNDERCAPACITY", "rank 1", "10,240 bits", "15,000 data bits"):
        assert part in item["reason"]


def test_make_plan_advisory_policy_keeps_what_it_would_cut_and_says_so(planned):
    plan = planned(
        dataset_tokens=15_000,
        capacity_policy="advisory",
        lora_rank=[1, 2],
        learning_rate=1e-3,
        global_batch_size=16,
        target="attn",
    )
    found = plan_to_dict(plan)
    assert [c["candidate"]["lora_rank"] for c in found["candidates"]] == [1, 2]
    assert [c["candidate"]["lora_rank"] for c in found["advised"]] == [1]
    assert found["discarded"] == []


@pytest.mark.parametrize(
    "search",
    [
        {},
        {"search": "random", "num_candidates": 3},
        {"search": "optuna", "num_candidates": 3},
    ],
)
def test_make_plan_nothing_holds_the_data_raises(planned, search):
    with pytest.raises(NothingAdmittedError, match="capacity_policy: advisory"):
        planned(dataset_tokens=10**9, lora_rank=[1, 2], **search)


def test_make_plan_dataset_bits_are_the_training_rows_alone(planned, base, qa_rows):
    expected = loss_tokens(base, qa_rows(40))
    plan = planned()
    assert (plan.dataset_tokens, plan.dataset_bits) == (expected, expected)
    assert plan.audit.num_eval_loss_tokens == loss_tokens(base, qa_rows(50)[40:])


def test_make_plan_of_a_held_out_fraction_splits_the_tokens(planned, base, qa_rows):
    plan = planned(eval=0.2)
    audit = plan.audit
    assert audit.num_train_rows + audit.num_eval_rows == 40
    assert plan.dataset_bits == audit.num_train_loss_tokens
    total = loss_tokens(base, qa_rows(40))
    assert audit.num_train_loss_tokens + audit.num_eval_loss_tokens == total
    assert 0 < audit.num_eval_rows < 40


def test_make_plan_capacity_in_bits_per_token_scales_the_bits(planned):
    assert planned(dataset_tokens=1000, capacity=0.5).dataset_bits == 500
    assert planned(dataset_tokens=1001, capacity=0.5).dataset_bits == 501  # rounded up


def test_make_plan_of_packed_data_counts_steps_in_sequences_and_the_same_tokens(planned):
    plain, packed = planned(seq_len=128), planned(seq_len=128, packing=True, global_batch_size=2)
    assert packed.audit == plain.audit
    assert packed.dataset_tokens == plain.dataset_tokens
    assert plain.budget.num_examples == 40
    sequences = packed.audit.num_train_sequences
    assert sequences < 20
    assert packed.budget.num_examples == sequences
    steps = {item["steps"] for item in plan_to_dict(packed)["candidates"]}
    assert steps == {-(-sequences // 2)}


def test_make_plan_of_a_repeated_file_holds_its_bits_once(planned, base, qa_rows):
    expected = loss_tokens(base, qa_rows(40))
    plan = planned(data={planned().config.data: 3})
    assert plan.audit.num_train_loss_tokens == 3 * expected
    assert plan.dataset_tokens == plan.dataset_bits == expected
    assert plan.budget.num_examples == 120


def test_make_plan_without_data_has_no_budget(planned):
    plan = planned(dataset_tokens=1000)
    assert (plan.budget, plan.audit, plan.data_spec) == (None, None, None)
    found = plan_to_dict(plan)
    assert (found["budget"], found["data"], found["seq_len"]) == (None, None, None)
    assert {item["steps"] for item in found["candidates"]} == {None}


def random_plan(planned, **values):
    return planned(
        dataset_tokens=15_000,
        search="random",
        num_candidates=60,
        lora_rank=[1, 2, 4],
        target=[["attn"], ["mlp"]],
        **values,
    )


def test_make_plan_random_search_draws_admissible_ranks_alone(planned):
    plan = random_plan(planned)
    drawn = plan.pruned.admitted
    assert (len(drawn), len(plan.pruned.discarded)) == (60, 0)
    # 15,000 bits: rank 1 holds 10,240 on attn and 2 x 8,448 = 16,896 on mlp.
    assert 2 * MLP_PER_RANK == 16_896
    ranks = {t: {c.lora_rank for c in drawn if c.target == (t,)} for t in ("attn", "mlp")}
    assert ranks == {"attn": {2, 4}, "mlp": {1, 2, 4}}


def test_make_plan_random_search_says_which_ranks_were_cut(planned):
    found = plan_to_dict(random_plan(planned))
    assert found["cut_ranks"] == [{"target": ["attn"], "lora_ranks": [1], "sufficient_rank": 2}]
    advisory = plan_to_dict(random_plan(planned, capacity_policy="advisory"))
    assert advisory["cut_ranks"] == []


def test_make_plan_random_search_repeats_with_its_seed(planned):
    first, again, other = (random_plan(planned, seed=seed).pruned.admitted for seed in (0, 0, 1))
    assert first == again
    assert [c.learning_rate for c in first] != [c.learning_rate for c in other]


def optuna_plan(planned, num_candidates=60, **values):
    given = {"lora_rank": [1, 2, 4], "target": [["attn"], ["mlp"]]} | values
    return planned(dataset_tokens=15_000, search="optuna", num_candidates=num_candidates, **given)


def test_make_plan_optuna_draws_nothing_and_cuts_ranks_as_a_random_search(planned):
    plan = optuna_plan(planned)
    assert (plan.pruned.admitted, len(plan.pruned.discarded), plan.num_proposed) == ((), 0, 60)
    assert plan.domains == random_plan(planned).domains
    assert random_plan(planned).num_proposed == planned().num_proposed == 0
    found = plan_to_dict(plan)
    assert (found["num_proposed"], found["candidates"], found["discarded"]) == (60, [], [])
    assert found["cut_ranks"] == [{"target": ["attn"], "lora_ranks": [1], "sufficient_rank": 2}]


def test_make_plan_optuna_proposes_no_more_than_a_finite_space_holds(planned):
    # Ranks 2, 4 on attn and 1, 2, 4 on mlp; 2 rates, 2 batches.
    values = {"learning_rate": [1e-3, 1e-2], "global_batch_size": [16, 32]}
    counts = {num: optuna_plan(planned, num, **values).num_proposed for num in (19, 20, 21)}
    assert counts == {19: 19, 20: 20, 21: 20}
    assert optuna_plan(planned, 21, **values, dropout=[0.0, 0.1]).num_proposed == 21


def test_make_plan_optuna_batch_that_the_workers_cannot_share_is_refused(planned):
    assert optuna_plan(planned, global_batch_size=[16, 32], workers_per_trial=2).num_proposed == 60
    with pytest.raises(ValueError, match="17"):
        optuna_plan(planned, global_batch_size=[16, 17], workers_per_trial=2)


def test_show_plan_optuna_says_how_many_within_what(planned, capsys):
    show_plan(plan_to_dict(optuna_plan(planned)))
    lines = capsys.readouterr().out.splitlines()
    assert "60 candidates proposed by Optuna within the admitted space" in lines
    assert "  cut before any draw: lora_rank 1 on attn: the data needs 2" in lines


@pytest.mark.parametrize("num_candidates", [1, 3, 4])
def test_make_plan_num_candidates_keeps_the_centre_first(planned, num_candidates):
    # Full fine-tuning at 2e-5: the LoRA centre is 10x that. 2 ranks x 2 batches share it.
    plan = planned(
        full_ft_learning_rate=2e-5,
        lora_rank=[8, 16],
        global_batch_size=[16, 32],
        num_candidates=num_candidates,
    )
    assert len(plan.pruned.admitted) == num_candidates
    for candidate in plan.pruned.admitted:
        assert candidate.learning_rate == pytest.approx(2e-4, rel=1e-9)


def test_make_plan_num_candidates_after_the_centre_takes_the_next_nearest(planned):
    plan = planned(
        full_ft_learning_rate=2e-5,
        learning_rate=[1e-3, 2e-5, 4e-4, 2e-4],
        lora_rank=8,
        global_batch_size=16,
        num_candidates=3,
    )
    assert [c.learning_rate for c in plan.pruned.admitted] == [2e-4, 4e-4, 1e-3]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (40, 10, 10)),
        ({"epochs": 1.5}, (60, 15, 15)),
        ({"epochs": 0.01}, (1, 1, 1)),
        ({"epochs": 1.1}, (44, 11, 11)),
        ({"examples": 10}, (10, 3, 3)),  # ceil(10 / 4)
        ({"examples": 1}, (1, 1, 1)),
        ({"examples": 100, "eval_every": 30}, (100, 30, 30)),
        ({"examples": 10, "eval_every": 99}, (10, 10, 10)),
        ({"examples": 100, "grace_period": 100}, (100, 25, 100)),
        # Frequent evaluations do not shorten the grace period.
        ({"examples": 100, "eval_every": 10}, (100, 10, 25)),
    ],
)
def test_make_plan_budget_arithmetic(planned, values, expected):
    budget = planned(**values).budget
    assert (budget.num_examples, budget.eval_every, budget.grace_period) == expected


@pytest.mark.parametrize(
    ("epochs", "rows", "expected"), [(1.1, 50, 55), (0.07, 100, 7), (0.1, 3, 1), (3, 7, 21)]
)
def test_make_budget_epochs_are_the_decimal_that_was_written(planned, epochs, rows, expected):
    audit = _with_rows(planned().audit, rows)
    config = make_config({"model": "m", "data": "d", "epochs": epochs}, "test")
    assert make_budget(config, audit).num_examples == expected


def _with_rows(audit, rows: int):
    return type(audit).from_dict(audit.to_dict() | {"num_train_rows": rows})


def test_make_plan_packed_budget_counts_sequences_and_the_same_tokens(planned):
    plain, packed = planned(seq_len=64), planned(seq_len=64, packing=True)
    assert plain.budget.num_examples == 40
    assert packed.budget.num_examples == packed.audit.num_train_sequences < 20
    assert planned(seq_len=64, packing=True, epochs=2).budget.num_examples == (
        2 * packed.budget.num_examples
    )
    assert packed.dataset_bits == plain.dataset_bits


def test_make_plan_grace_period_beyond_the_budget_is_refused(planned):
    with pytest.raises(ValueError, match=r"\(10 examples\), got 11"):
        planned(examples=10, grace_period=11)


def test_plan_to_dict_steps_are_the_examples_over_the_batch_rounded_up(planned):
    found = plan_to_dict(planned(lora_rank=8, learning_rate=1e-3, global_batch_size=[16, 32, 64]))
    assert [item["steps"] for item in found["candidates"]] == [3, 2, 1]  # of 40


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"dataset_tokens": 15_000, "lora_rank": [1, 2], "target": "attn"},
        {"dataset_tokens": 15_000, "search": "random", "num_candidates": 3, "lora_rank": [1, 8]},
        {"dataset_tokens": 15_000, "search": "optuna", "num_candidates": 3, "lora_rank": [1, 8]},
    ],
)
def test_plan_to_dict_survives_strict_json(planned, values):
    found = plan_to_dict(planned(**values))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_make_plan_seq_len_default_is_the_models_context(planned):
    assert planned().data_spec.seq_len == 1024
    assert planned(seq_len=1024).data_spec.seq_len == 1024
    with pytest.raises(ValueError, match=r"\(1024 tokens\), got 1025"):
        planned(seq_len=1025)


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", "data/train.jsonl", "Llama-3.1-8B-train"),
        ("models/Llama-3.1-70B.json", None, "Llama-3.1-70B-plan"),
        ("Llama-3.1-70B/config.json", None, "Llama-3.1-70B-plan"),
        ("Qwen/Qwen2.5-0.5B", "openai/gsm8k:main", "Qwen2.5-0.5B-gsm8k-main"),
        ("base", "v1.5.csv.gz", "base-v1.5"),
        ("base", "my data/", "base-my-data"),
    ],
)
def test_default_name_keeps_what_is_no_suffix(model, data, expected):
    source = {"data": data} if data else {"dataset_tokens": 5}
    assert default_name(make_config({"model": model} | source, "test")) == expected
