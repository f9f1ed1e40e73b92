"""Search spaces: defaults, extensions, overrides."""

import itertools
import math
import random

import pytest

from search_spaces.space import Choice, DatasetFacts, LogUniform, build_space


def test_build_space_llama31_8b_has_the_doctrines_defaults(model_shape):
    space = build_space(model_shape("Llama-3.1-8B"))
    rates = space.learning_rate.values()
    assert len(rates) == 7
    assert rates[3] == pytest.approx(4.8828125e-4)
    steps = [math.log10(high / low) for low, high in itertools.pairwise(rates)]
    assert steps == pytest.approx([0.25] * 6)
    assert space.lora_rank.values() == (32, 64)
    assert space.global_batch_size.values() == (16, 32, 64)
    assert space.lora_alpha.values() == (32,)
    assert space.target.values() == (("attn", "mlp", "unembed"),)
    assert (space.lr_schedule.values(), space.epochs.values()) == (("constant",), (1,))
    assert (space.dropout.values(), space.max_grad_norm.values()) == ((0,), (1,))


def test_build_space_every_default_carries_its_source(tiny_llama):
    space = build_space(tiny_llama)
    keys = set(vars(space)) - {"prior", "notes", "reference_alpha"}
    assert {note.key for note in space.notes} == keys
    assert all(note.value and note.source for note in space.notes)
    for key, value, source in space.notes:
        assert isinstance(key, str)
        assert isinstance(value, str)
        assert isinstance(source, str)


def test_build_space_user_full_ft_rate_is_the_centre_and_covers_3x_to_15x(model_shape):
    # FIELD_CASES E05.
    space = build_space(model_shape("Llama-3.1-8B"), full_ft_learning_rate=2e-5)
    rates = space.learning_rate.values()
    assert rates[3] / 2e-5 == pytest.approx(10)
    assert min(rates) > 2e-5
    assert min(rates) <= 3 * 2e-5
    assert max(rates) >= 15 * 2e-5


def test_build_space_extrapolated_width_reaches_half_a_decade_further_down(model_shape):
    space = build_space(model_shape("Qwen3-0.6B"))
    rates = space.learning_rate.values()
    assert len(rates) == 9
    assert rates[0] == pytest.approx(space.prior.lora * 10**-1.25)
    assert rates[-1] == pytest.approx(space.prior.lora * 10**0.75)
    assert any("extrapolated" in note.source for note in space.notes)


def test_build_space_rl_grid_is_1e_6_to_1e_4(model_shape):
    space = build_space(model_shape("Llama-3.1-8B"), "rl")
    rates = space.learning_rate.values()
    assert (rates[0], rates[-1], len(rates)) == (pytest.approx(1e-6), pytest.approx(1e-4), 9)
    assert space.lora_rank.values() == (8, 16)


def test_build_space_data_beyond_the_range_extends_to_a_power_of_two(model_shape):
    shape = model_shape("Llama-3.1-8B")
    space = build_space(shape, dataset=DatasetFacts.from_tokens(1e9))
    assert space.lora_rank.values() == (32, 64, 256)  # 182 suffices
    assert any("extended to 256" in note.value for note in space.notes)
    # Exactly what rank 64 holds: nothing to extend; one bit more: 128.
    held = 2 * shape.lora_params(64)
    assert build_space(shape, dataset=DatasetFacts(bits=held)).lora_rank.values() == (32, 64)
    more = build_space(shape, dataset=DatasetFacts(bits=held + 1))
    assert more.lora_rank.values() == (32, 64, 128)


def test_build_space_extension_is_capped_at_the_largest_useful_rank(model_shape):
    space = build_space(model_shape("Llama-3.1-8B"), dataset=DatasetFacts.from_tokens(10**10))
    assert space.lora_rank.values() == (32, 64, 1024)
    assert any("NOT sufficient" in note.value for note in space.notes)


def test_build_space_given_ranks_are_not_extended(model_shape):
    space = build_space(
        model_shape("Llama-3.1-8B"), "sft", DatasetFacts.from_tokens(1e9), {"lora_rank": [8, 16]}
    )
    assert space.lora_rank.values() == (8, 16)
    assert not any("extended" in note.value for note in space.notes)


def test_build_space_moe_ranks_note_the_floor(model_shape):
    space = build_space(model_shape("Qwen3-30B-A3B"), overrides={"lora_rank": [4, 16]})
    values = [note.value for note in space.notes if note.key == "lora_rank"]
    assert any("1 per expert (floor" in value for value in values)
    assert any("16 / 8 active experts = 2 per expert" in value for value in values)
    assert space.target.values() == (("attn", "experts", "unembed"),)


def test_build_space_overrides_scalar_list_and_range(tiny_llama):
    overrides = {
        "learning_rate": {"low": 1e-5, "high": 1e-3, "num": 3},
        "lora_rank": {"low": 1, "high": 8, "num": 7},
        "global_batch_size": 8,
        "lora_alpha": [16, 32],
        "dropout": [0, 0.05],
        "examples": 500,
    }
    space = build_space(tiny_llama, overrides=overrides)
    assert space.learning_rate == LogUniform(low=1e-5, high=1e-3, num=3)
    # 1, 1.41, 2, 2.83, 4, 5.66, 8 rounded, each once.
    assert space.lora_rank.values() == (1, 2, 3, 4, 6, 8)
    assert space.global_batch_size.values() == (8,)
    assert space.lora_alpha.values() == (16, 32)
    assert (space.epochs.values(), space.examples.values()) == ((None,), (500,))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("attn+mlp", (("attn", "mlp"),)),
        (["attn", "mlp"], (("attn", "mlp"),)),  # as PEFT's target_modules: one target
        (["attn+mlp", "attn"], (("attn", "mlp"), ("attn",))),
        ([["attn"], ["mlp"]], (("attn",), ("mlp",))),
        ([["mlp", "attn"], "unembed"], (("attn", "mlp"), ("unembed",))),
        (["attn", "mlp", "experts", "unembed"], (("attn", "mlp", "unembed"),)),
        (["v_proj", "q_proj"], (("q_proj", "v_proj"),)),
    ],
)
def test_build_space_target_forms(tiny_llama, target, expected):
    assert build_space(tiny_llama, overrides={"target": target}).target.values() == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_rank", 0),
        ("lora_rank", 8.0),
        ("lora_rank", True),
        ("lora_rank", []),
        ("lora_rank", [8, 8]),
        ("lora_rank", {"low": 0, "high": 8, "num": 2}),
        ("lora_rank", {"low": 0.2, "high": 8, "num": 2}),
        ("lora_rank", {"low": 4, "high": 8}),
        ("learning_rate", -1e-4),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", "1e-4"),
        ("learning_rate", {"low": 1e-3, "high": 1e-5, "num": 3}),
        ("learning_rate", {"low": 1e-5, "high": 1e-3, "num": 1}),
        ("global_batch_size", 0),
        ("lora_alpha", 0),
        ("dropout", 1.0),
        ("warmup", -1),
        ("weight_decay", None),
        ("max_grad_norm", -0.1),
        ("seed", -1),
        ("lr_schedule", "step"),
        ("epochs", [1, 2]),
        ("examples", 0.5),
        ("target", []),
        ("target", 3),
        ("target", ["attn+mlp", "attn+mlp"]),
    ],
)
def test_build_space_unusable_override_names_the_key(tiny_llama, key, value):
    with pytest.raises(ValueError, match=f"^{key}\\b.* must"):
        build_space(tiny_llama, overrides={key: value})


def test_build_space_unknown_key_and_two_budgets_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"'lora_rnk' is not a key .* did you mean 'lora_rank'"):
        build_space(tiny_llama, overrides={"lora_rnk": 8})
    with pytest.raises(ValueError, match="epochs and examples must not both be set"):
        build_space(tiny_llama, overrides={"epochs": 1, "examples": 5})


def test_log_uniform_values_and_samples_stay_inside():
    domain = LogUniform(low=1e-5, high=1e-3, num=5)
    values = domain.values()
    assert (values[0], values[-1], len(values)) == (1e-5, 1e-3, 5)
    assert values[2] == pytest.approx(1e-4)
    rng = random.Random(0)
    samples = [domain.sample(rng) for _ in range(500)]
    assert all(1e-5 <= sample <= 1e-3 for sample in samples)
    assert 0.4 < sum(sample < 1e-4 for sample in samples) / 500 < 0.6
    assert LogUniform(low=1e-4, high=1e-4, num=1).values() == (1e-4,)


def test_domains_unusable_bounds_refused():
    for low, high, num in ((0, 1, 2), (2, 1, 2), (1, math.inf, 2), (1, 2, 0), (1, 2, 1)):
        with pytest.raises(ValueError, match="must"):
            LogUniform(low=low, high=high, num=num)
    with pytest.raises(ValueError, match="at least one option"):
        Choice(options=())
