"""`lr_prior: {from: runs/SMALL}` on folders made up here, whose losses are exact parabolas."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from orchestration.cli import main
from orchestration.config import CarriedFrom, ConfigError, load_config, make_config
from orchestration.plan_json import plan_to_dict
from orchestration.planning import make_plan
from orchestration.show import confirmation_lines, show_plan
from search_spaces.candidate import Candidate, trial_name
from tests.test_imports import HEAVY, LLAMA_70B, VERB, loaded_after
from trainers.paths import RunPaths, write_json, write_json_lines, write_state

CANDIDATE = Candidate(
    learning_rate=1e-3,
    lora_rank=16,
    lora_alpha=32.0,
    global_batch_size=16,
    target=("attn", "mlp", "unembed"),
    lr_schedule="constant",
    warmup=0.0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    dropout=0.0,
    seed=0,
)
BEST = 1.2e-3
RATES = [BEST * 10 ** (0.1 + step / 4) for step in range(-4, 4)]


def write_trial(run: RunPaths, candidate: Candidate, losses: list[float], status: str) -> None:
    paths = run.trial(trial_name(candidate))
    write_state(paths.config, {"name": paths.root.name, "candidate": candidate.to_dict()})
    rows = [
        {"examples": 100 * number, "steps": 10 * number, "eval_loss": loss}
        for number, loss in enumerate(losses)
    ]
    write_json_lines(paths.metrics, rows)
    if status != "unfinished":
        write_state(paths.status, {"status": status, "reason": "", "examples": 0, "steps": 0})


def write_study(folder: Path, **results) -> RunPaths:
    """A finished study, of hidden size 4096."""
    run = write_run(folder)
    run.plan.unlink()
    write_json(run.results, {"model": {"hidden_size": 4096}} | results)
    return run


def write_run(folder: Path, *, rates=RATES, hidden: int = 1024, method: str = "sft") -> RunPaths:
    """A finished sweep; the best loss before the end of a trial is not where it ends."""
    run = RunPaths(folder)
    write_state(run.plan, {"method": method, "model": {"hidden_size": hidden}})
    for rate in rates:
        loss = 2.0 + 0.3 * math.log10(rate / BEST) ** 2
        losses = [3.5, loss - 0.4 * math.log10(rate / 1e-5), loss]
        write_trial(run, replace(CANDIDATE, learning_rate=rate), losses, "finished")
    return run


@pytest.fixture
def small(workplace) -> RunPaths:
    return write_run(workplace / "runs" / "small")


@pytest.fixture
def planned(workplace):
    """The plan of a 70B shape for a token count."""
    write_json(workplace / "config.json", LLAMA_70B)

    def plan(**values):
        given = {"model": "config.json", "dataset_tokens": 2_000_000, "lora_rank": [128, 256]}
        given |= {"lr_prior": {"from": "runs/small"}, "global_batch_size": [16, 32]}
        return make_plan(make_config(given | values, "test"))

    return plan


def test_plan_carried_from_hidden_1024_to_8192_is_the_hand_computation(small, planned):
    plan = planned()
    prior = plan.space.prior
    assert prior.name == "carried"
    assert prior.lora == pytest.approx(BEST / 8, rel=1e-5)  # 2000 / H: 1024 / 8192
    low, high = prior.interval
    assert low < prior.lora < high
    assert math.log10(high / prior.lora) == pytest.approx(
        0.846, abs=0.02
    )  # 0.833 and the fit's own
    rates = plan.space.learning_rate.values()
    assert rates[0] <= low
    assert rates[-1] >= high
    # The carried rate comes first.
    assert plan.pruned.admitted[0].learning_rate == pytest.approx(prior.lora)
    note = next(note for note in plan.space.notes if note.key == "learning_rate")
    assert "hidden 1024 in runs/small: 0.0012" in note.source
    assert "NOT measured there, and not corrected for: lora_rank 128, 256" in note.source


def test_plan_carried_counts_what_ended_and_nothing_else(small, planned):
    expected = planned().space.prior
    # Better than everything, had they run to their ends; the edge would be theirs.
    for number, status in enumerate(("stopped", "failed", "unfinished"), 1):
        rate = BEST * 10 ** (-2 - number / 4)
        write_trial(small, replace(CANDIDATE, learning_rate=rate), [3.5, 1.0, 1.0], status)
    full = replace(CANDIDATE, full_finetune=True, lora_rank=0)
    write_trial(small, full, [3.5, 1.0, 1.0], "finished")
    assert planned().space.prior == expected
    diverged = replace(CANDIDATE, learning_rate=min(RATES, key=lambda rate: abs(rate - 2.5e-3)))
    write_trial(small, diverged, [3.5, 1.0], "diverged")
    with pytest.raises(ValueError, match=r"stands beside a diverged run; extend its learning_rate"):
        planned()


def test_plan_carried_from_a_study_reads_its_results(workplace, planned):
    write_study(workplace / "runs" / "small")
    assert planned().space.prior.lora == pytest.approx(BEST / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r"must be the folder of a sweep .* is no folder"),
        (lambda folder: folder.mkdir(parents=True), r"must be the folder of a sweep .* has neither"),
        (lambda folder: write_run(folder, rates=[]), "must hold finished LoRA trials, holds none"),
        (lambda folder: write_run(folder, rates=RATES[2:4]), r"at least 3 learning rates .* holds 4\."),
        (lambda folder: write_run(folder, rates=RATES[:4]), r"8\.50e-04\); rank 16: .*highest.*extend its"),
        (lambda folder: write_run(folder, method="rl"), "its method must be sft, is rl"),
        (lambda folder: write_study(folder, objective="eval_reward"), "its method must be sft, is rl"),
    ],
)  # fmt: skip
def test_plan_carried_from_what_has_no_optimum_is_refused_in_one_line(
    make, message, workplace, planned
):
    make(workplace / "runs" / "small")
    with pytest.raises(ValueError, match=f"^lr_prior from runs/small: .*{message}") as error:
        planned()
    assert "\n" not in str(error.value)


def test_plan_carried_beside_a_known_full_ft_rate_is_refused(small, planned):
    with pytest.raises(ValueError, match=r"must not both set the level, got 1e-05"):
        planned(full_ft_learning_rate=1e-5)


# The confirmation


def test_confirmation_is_three_trials_at_the_largest_admitted_rank_as_yaml(small, planned):
    plan = planned()
    found = plan_to_dict(plan)["confirmation"]
    low, high = plan.space.prior.interval
    expected = [low, math.sqrt(low * high), high]
    assert found["learning_rates"] == pytest.approx(expected, rel=1e-5)
    assert (found["lora_rank"], found["global_batch_size"]) == (256, 16)
    assert (found["num_trials"], found["num_examples"], found["num_tokens"]) == (3, None, None)
    values = {"model": "config.json", "dataset_tokens": 2_000_000}
    confirming = make_plan(make_config(values | yaml.safe_load(found["yaml"]), "test"))
    admitted = confirming.pruned.admitted
    assert sorted(c.learning_rate for c in admitted) == found["learning_rates"]
    assert {(c.lora_rank, c.lora_alpha, c.global_batch_size, c.target) for c in admitted} == {
        (256, 32.0, 16, ("attn", "mlp", "unembed"))
    }
    assert confirming.config.scheduler == "fifo"


def test_confirmation_of_a_search_that_draws_has_the_largest_rank_that_holds_the_data(
    small, planned
):
    plan = planned(search="optuna", num_candidates=5, lora_rank=[1, 8, 64], target="attn")
    found = plan_to_dict(plan)["confirmation"]
    assert (found["lora_rank"], found["target"]) == (64, ["attn"])
    json.dumps(found, allow_nan=False)


def test_confirmation_of_a_sweep_with_data_counts_its_tokens(workplace, write_sweep, small):
    config = load_config(write_sweep(lr_prior={"from": "runs/small"}, examples=500, eval=0.2))
    plan = make_plan(config)
    found = plan_to_dict(plan)["confirmation"]
    mean = plan.audit.num_train_tokens / plan.audit.num_train_rows
    assert found["num_examples"] == 500
    assert found["num_tokens"] == round(3 * 500 * mean)
    lines = confirmation_lines({"confirmation": found, "packs": None})
    assert f"3 trials x 500 examples, {found['num_tokens']:,} tokens in all" in lines[0]
    assert [line.strip() for line in lines[1:]] == found["yaml"].splitlines()


def test_confirmation_of_a_prior_that_was_not_carried_is_none_and_says_nothing(planned, capsys):
    plan = plan_to_dict(planned(lr_prior="doctrine"))
    assert plan["confirmation"] is None
    show_plan(plan | {"packs": None})
    assert "confirm" not in capsys.readouterr().out


# The key


def test_config_lr_prior_from_survives_resolving_and_resuming():
    config = make_config(
        {"model": "m", "dataset_tokens": 10, "lr_prior": {"from": "runs/a"}}, "test"
    )
    assert config.lr_prior == CarriedFrom.model_validate({"from": "runs/a"})
    dumped = json.loads(json.dumps(config.model_dump(mode="json")))
    assert dumped["lr_prior"] == {"from": "runs/a"}
    values = {key: value for key, value in dumped.items() if value is not None}
    assert make_config(values, "test") == config


@pytest.mark.parametrize(
    "value", [{}, {"form": "runs/a"}, {"from": ""}, {"from": 3}, {"from": "a", "to": "b"}]
)
def test_config_lr_prior_of_another_shape_is_one_line_that_shows_the_right_one(value):
    with pytest.raises(
        ConfigError, match=r"^test: lr_prior must be .*\{from: runs/NAME\}, got"
    ) as e:
        make_config({"model": "m", "dataset_tokens": 10, "lr_prior": value}, "test")
    assert "\n" not in str(e.value)


def test_plan_command_carried_prints_the_confirmation_and_imports_nothing_heavy(
    workplace, small, capsys
):
    write_json(workplace / "config.json", LLAMA_70B)
    values = {"model": "config.json", "dataset_tokens": 2_000_000}
    values |= {"lr_prior": {"from": "runs/small"}}
    (workplace / "sweep.yaml").write_text(yaml.safe_dump(values))
    assert main(["plan", "sweep.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "confirm the carried learning rate first: 3 trials, with these keys" in printed
    assert "  lora_rank: 256\n" in printed
    code = VERB.format(arguments=["plan", "sweep.yaml"])
    assert loaded_after(code, workplace) & {*HEAVY, "numpy"} == set()
