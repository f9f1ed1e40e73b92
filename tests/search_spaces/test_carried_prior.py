"""A small optimum at another width: hand computations, planted parabolas, and this project's own studies."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from search_spaces.architecture import ModelShape
from search_spaces.candidate import Candidate
from search_spaces.carried_prior import (
    ONE_SEED_DECADES,
    carried_prior,
    confirmation_rates,
    small_optimum,
    width_factors,
)
from search_spaces.priors import LearningRatePrior, learning_rate_prior
from search_spaces.space import build_space
from search_spaces.studies.optimum import ArmOptimum, arm_optimum
from search_spaces.studies.points import Point

STUDIES = Path(__file__).resolve().parents[2] / "docs" / "studies"
TARGET = ("attn", "mlp", "unembed")
CANDIDATE = Candidate(
    learning_rate=1e-3,
    lora_rank=16,
    lora_alpha=32.0,
    global_batch_size=16,
    target=TARGET,
    lr_schedule="constant",
    warmup=0.0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    dropout=0.0,
    seed=0,
)
BEST = math.log10(1.5e-3)
GRID = [10 ** (BEST + 0.1 + step / 4) for step in range(-4, 4)]
# log10(8192 / 1024) times how far the published exponents lie from the doctrine's 1.
UP_TO_QWEN = math.log10(8) * (1 - 0.0775)


def shape(hidden: int) -> ModelShape:
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 1000,
    }
    return ModelShape.from_config(config)


def wanted(**overrides):
    """The space of a big sweep."""
    given = {"lora_rank": 16, "global_batch_size": 16} | overrides
    return build_space(shape(8192), overrides=given)


def parabola(best: float = BEST, rates=GRID, floor: float = 2.0, **changes):
    """Runs whose losses are an exact parabola in log10 of the learning rate."""
    template = replace(CANDIDATE, **changes)
    return [
        (replace(template, learning_rate=r), floor + 0.3 * (math.log10(r) - best) ** 2)
        for r in rates
    ]


def optimum_of(runs, space=None, hidden: int = 1024):
    return small_optimum(runs, space or wanted(), where="runs/small", hidden_size=hidden)


# The small optimum


def test_small_optimum_of_an_exact_parabola_is_its_lowest_point():
    found = optimum_of(parabola())
    assert found.log10_lr == pytest.approx(BEST, abs=1e-6)
    assert found.low < BEST < found.high
    assert (found.num_rates, found.num_seeds, found.lora_ranks) == (8, 1, (16,))
    # One seed says nothing of the noise: what the assumption says is there at least.
    assert BEST - found.low > ONE_SEED_DECADES
    assert found.high - BEST > ONE_SEED_DECADES


def test_small_optimum_of_two_seeds_is_that_of_the_studies_fit():
    runs = [*parabola(), *parabola(seed=1, floor=2.1, best=BEST + 0.04)]
    points = [
        Point(learning_rate=candidate.learning_rate, seed=candidate.seed, loss=loss)
        for candidate, loss in runs
    ]
    expected, found = arm_optimum(points), optimum_of(runs)
    assert isinstance(expected, ArmOptimum)
    assert found.log10_lr == pytest.approx(expected.log10_lr, abs=1e-12)
    assert 10**found.low == pytest.approx(expected.low)
    assert 10**found.high == pytest.approx(expected.high)


def test_small_optimum_of_several_ranks_is_their_mean_and_holds_all_their_intervals():
    low, high = parabola(BEST - 0.1, lora_rank=4, floor=2.5), parabola(BEST + 0.2, lora_rank=64)
    on_the_edge = parabola(BEST + 2, lora_rank=1)  # says nothing
    found = optimum_of([*on_the_edge, *low, *high])
    assert found.log10_lr == pytest.approx(BEST + 0.05, abs=1e-6)
    assert found.lora_ranks == (4, 64)
    assert found.low == pytest.approx(optimum_of(low).low)
    assert found.high == pytest.approx(optimum_of(high).high)
    with pytest.raises(ValueError, match=r"rank 1: the best point, .* is the highest"):
        optimum_of(on_the_edge)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"lora_alpha": 8.0}, ("alpha 8", 0.3)),
        ({"lora_alpha": 16.0}, ("lowest loss", 0.0)),  # neither: the better one
        ({"global_batch_size": 60}, ("batch 64", 0.2)),
        ({"target": "attn"}, ("attn", 0.1)),
    ],
)
def test_small_optimum_is_of_the_runs_most_like_the_big_sweep(overrides, expected):
    _, shift = expected
    runs = [
        *parabola(),
        *parabola(BEST + 0.3, lora_alpha=8.0, floor=2.2),
        *parabola(BEST + 0.2, global_batch_size=64, floor=2.2),
        *parabola(BEST + 0.1, target=("attn",), floor=2.2),
    ]
    assert optimum_of(runs, wanted(**overrides)).log10_lr == pytest.approx(BEST + shift, abs=1e-6)
    full = [(replace(c, full_finetune=True, lora_rank=0), 0.1) for c, _ in parabola()]
    assert optimum_of([*full, *parabola()]).lora_ranks == (16,)  # another arm altogether


def diverging_above(limit: float):
    return [
        (c, loss if math.log10(c.learning_rate) < limit else math.inf) for c, loss in parabola()
    ]


def noise_alone():
    """Two seeds that agree on nothing, the lowest of their mean inside the grid."""
    losses = (
        (2.02, 1.99, 2.01, 2.0, 1.98, 2.02, 2.0, 2.01),
        (1.98, 2.02, 2.0, 1.97, 2.01, 2.0, 2.02, 1.99),
    )
    return [
        (replace(c, seed=seed), loss)
        for seed, row in enumerate(losses)
        for (c, _), loss in zip(parabola(), row, strict=True)
    ]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "must hold finished LoRA trials, holds none"),
        (parabola(rates=GRID[3:5]), r"at least 3 learning rates .*, holds 1\.06e-03, 1\.89e-03; run"),
        (diverging_above(BEST - 0.6), r"at least 3 learning rates .* holds 1\.89e-04, 3\.36e-04; run"),
        (parabola(rates=GRID[:4]), r"point, 0\.00106, is the highest .*; extend its learning_rate above 1\.06e-03"),
        (parabola(rates=GRID[4:]), r"point, 0\.00189, is the lowest .*; extend its learning_rate below 1\.89e-03"),
        (diverging_above(BEST + 0.05), r"beside a diverged .* above 1\.06e-03 \(but below 1\.89e-03, which"),
        (noise_alone(), "flat: .*; run more learning rates"),
    ],
)  # fmt: skip
def test_small_optimum_that_is_none_is_refused_in_one_line(runs, message):
    with pytest.raises(ValueError, match=f"^lr_prior from runs/small: .*{message}") as error:
        optimum_of(runs)
    assert "\n" not in str(error.value)


# Carrying it


def test_width_factors_from_1024_to_8192_by_hand():
    assert width_factors(1024, 8192) == pytest.approx(
        {"doctrine": 1 / 8, "tinker llama": 8**-0.781, "tinker qwen": 8**-0.0775}
    )
    assert set(width_factors(4096, 4096).values()) == {1.0}


def test_carried_prior_from_1024_to_8192_is_the_hand_computation():
    found = optimum_of(parabola())
    prior = carried_prior(found, 8192, wanted())
    assert prior.lora == pytest.approx(1.5e-3 / 8, rel=1e-5)
    assert prior.full_ft == pytest.approx(1.5e-4 / 8, rel=1e-5)
    low, high = prior.interval
    assert math.log10(prior.lora / low) == pytest.approx(found.log10_lr - found.low)
    above = math.hypot(found.high - found.log10_lr, UP_TO_QWEN)
    assert math.log10(high / prior.lora) == pytest.approx(above)
    assert above == pytest.approx(0.85, abs=0.02)


def test_carried_prior_to_a_smaller_width_turns_the_sides_round():
    found = optimum_of(parabola(), hidden=8192)
    prior = carried_prior(found, 1024, wanted())
    assert prior.lora == pytest.approx(1.5e-3 * 8, rel=1e-5)
    low, high = prior.interval
    below = math.hypot(found.log10_lr - found.low, UP_TO_QWEN)
    assert math.log10(prior.lora / low) == pytest.approx(below)
    assert math.log10(high / prior.lora) == pytest.approx(found.high - found.log10_lr)


def test_carried_prior_at_the_same_width_is_the_measurement():
    found = optimum_of(parabola())
    prior = carried_prior(found, 1024, wanted())
    assert prior.interval == pytest.approx((10**found.low, 10**found.high))
    assert prior.lora == pytest.approx(1.5e-3, rel=1e-5)


def test_carried_prior_source_says_where_it_is_from_and_what_was_not_measured():
    space = wanted(lora_rank=[16, 256], lora_alpha=16.0, global_batch_size=[16, 64])
    source = carried_prior(optimum_of(parabola(), space), 8192, space).source
    for part in ("hidden 1024 in runs/small: 0.0015", "rank 16, alpha 32, batch 16", "x 0.125"):
        assert part in source
    assert "NOT measured there, and not corrected for: lora_rank 256; lora_alpha 16.0" in source
    assert source.endswith("global_batch_size 64")
    alike = carried_prior(optimum_of(parabola()), 8192, wanted()).source
    assert "NOT measured" not in alike


@pytest.mark.parametrize("small", ["lr-ratio-laptop", "lr-ratio-h256", "lr-ratio-h512"])
def test_carried_prior_of_this_projects_studies_covers_what_was_measured_at_1024(small):
    def measured(name: str):
        results = json.loads((STUDIES / name / "results.json").read_text())
        arm = next(arm for arm in results["arms"] if arm["label"] == "r16 alpha 32")
        runs = [
            (
                replace(CANDIDATE, learning_rate=point["learning_rate"], seed=point["seed"]),
                math.inf if point["eval_loss"] is None else point["eval_loss"],
            )
            for point in arm["points"]
        ]
        return optimum_of(runs, hidden=results["model"]["hidden_size"])

    found, big = measured(small), measured("lr-ratio-h1024")
    assert (found.hidden_size, big.hidden_size) == (
        {"lr-ratio-laptop": 192, "lr-ratio-h256": 256, "lr-ratio-h512": 512}[small],
        1024,
    )
    low, high = carried_prior(found, 1024, wanted()).interval
    assert low < 10**big.log10_lr < high


# The grid and the confirmation


def prior_with(interval: tuple[float, float]) -> LearningRatePrior:
    return LearningRatePrior(
        name="carried", full_ft=1e-5, lora=1e-4, extrapolated=False, source="s", interval=interval
    )


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((9e-5, 1.1e-4), (-0.75, 0.75, 7)),  # the doctrine's grid covers it
        ((1e-4 * 10**-0.75, 1e-4 * 10**0.75), (-0.75, 0.75, 7)),
        ((9e-5, 1e-4 * 10**0.7501), (-0.75, 1.0, 8)),
        ((1e-4 * 10**-1.3, 2e-4), (-1.5, 0.75, 10)),
    ],
)
def test_build_space_grid_covers_the_interval_in_whole_steps_around_the_centre(interval, expected):
    space = build_space(shape(8192), lr_prior=prior_with(interval))
    rates = space.learning_rate.values()
    below, above, num = expected
    assert len(rates) == num
    assert math.log10(rates[0] / 1e-4) == pytest.approx(below)
    assert math.log10(rates[-1] / 1e-4) == pytest.approx(above)
    assert min(abs(math.log(rate / 1e-4)) for rate in rates) < 1e-9  # the centre is on it
    assert rates[0] <= interval[0] * (1 + 1e-9)
    assert rates[-1] >= interval[1] * (1 - 1e-9)


def test_confirmation_rates_are_both_ends_and_the_middle():
    rates = confirmation_rates(prior_with((9e-5, 8.1e-4)))
    assert rates == (9e-5, 2.7e-4, 8.1e-4)
    assert confirmation_rates(learning_rate_prior(hidden_size=4096, model_type="llama")) is None


def test_learning_rate_prior_carried_and_a_known_full_ft_rate_are_two_levels():
    prior = prior_with((9e-5, 2e-4))
    assert learning_rate_prior(prior, hidden_size=1, model_type="llama") is prior
    with pytest.raises(ValueError, match=r"must not both set the level, got 1e-05; give one"):
        learning_rate_prior(prior, hidden_size=1, model_type="llama", full_ft_learning_rate=1e-5)


def test_carried_prior_of_a_variant_is_plain_loras():
    runs = [(replace(c, variant="pissa"), loss) for c, loss in parabola()]
    found = optimum_of(runs, hidden=512)
    assert found.variant == "pissa"
    plain = carried_prior(optimum_of(parabola(), hidden=512), 512, wanted())
    prior = carried_prior(found, 512, wanted())
    assert prior.lora == pytest.approx(10 * plain.lora)
    assert "pissa: x 10 for plain LoRA" in prior.source
    assert "pissa" not in plain.source
