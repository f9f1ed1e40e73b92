"""method: rl in sweep.yaml: its keys, its plan, and what a report makes of its trials."""

import json
import re
from dataclasses import replace

import pytest

from orchestration.cli import main
from orchestration.config import ConfigError, local_inputs, make_config
from orchestration.objective import LOSS, REWARD, objective_of
from orchestration.plan_json import plan_to_dict
from orchestration.report import render
from orchestration.results import TrialRecord, best_trial
from orchestration.results_table import show_results
from orchestration.run import require_same_plan
from orchestration.show import show_plan
from orchestration.sweep_charts import cards
from search_spaces import doctrine
from search_spaces.architecture import ModelShape
from search_spaces.candidate import grid_candidates
from search_spaces.space import build_space
from tests.trainers.tiny import TINY_LLAMA
from trainers.paths import RunPaths, write_state

LLAMA = TINY_LLAMA | {"model_type": "llama"}
GIVEN = {"method": "rl", "reward": "exact_match"}


@pytest.fixture
def planned(planned):
    """As in conftest.py, of a sweep by rewards."""
    return lambda **values: planned(**GIVEN | values)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"reward": "exact_match"}, "reward is for method: rl, got method sft"),
        ({"num_generations": 8}, "num_generations is for method: rl"),
        ({"temperature": 0.5}, "temperature is for method: rl"),
        ({"method": "rl"}, "method: rl needs a reward"),
        (GIVEN | {"packing": True}, "packing is for method: sft"),
        (GIVEN | {"group_by_length": True}, "group_by_length is for method: sft"),
        (GIVEN | {"capacity": 2.0}, "capacity is for method: sft"),
        (GIVEN | {"dropout": 0.1}, "dropout must be 0 with method rl, got 0.1"),
        (GIVEN | {"dropout": [0.0, 0.1]}, "dropout must be 0 with method rl"),
        (GIVEN | {"strategy": "zero3"}, "method: rl needs a whole base on each worker"),
        (GIVEN | {"num_generations": 1}, "num_generations"),
        (GIVEN | {"max_completion_length": 0}, "max_completion_length"),
        (GIVEN | {"temperature": 0}, "temperature"),
        (GIVEN | {"reward": {}}, "reward must be a name, or several with weights"),
        (GIVEN | {"reward": {"exact_match": 0}}, "reward must be a name, or several with weights"),
        (GIVEN | {"reward": ["exact_match"]}, "reward must be a name, or several with weights"),
        (GIVEN | {"reward": {"exact_match": True}}, "reward must be a name, or several"),
    ],
)
def test_keys_that_contradict_the_method_are_refused(values, told):
    with pytest.raises(ConfigError, match=re.escape(told)) as error:
        make_config({"model": "m", "data": "d.jsonl"} | values, "sweep.yaml")
    assert "\n" not in str(error.value)


def test_plan_without_data_counts_episodes_of_the_prompts_it_is_given():
    values = {"model": "m", "method": "rl"}
    with pytest.raises(ConfigError, match="method: rl without data needs examples"):
        make_config(values, "sweep.yaml")
    with pytest.raises(ConfigError, match=r"dataset_tokens is for method: sft.*give examples"):
        make_config(values | {"dataset_tokens": 5}, "sweep.yaml")
    assert make_config(values | {"examples": 5}, "sweep.yaml").reward is None


def test_bits_are_one_for_each_episode(planned):
    plan = planned(num_generations=16, epochs=2.5)
    assert plan.budget.num_examples == 100
    assert plan.dataset_bits == 100 * 16
    assert plan_to_dict(plan)["rl"]["num_episodes"] == 1600
    assert planned(examples=30).dataset_bits == 30 * 8
    assert planned(data=None, eval=None, reward=None, examples=10**4).dataset_bits == 8 * 10**4


def test_ranks_without_room_for_the_episodes_are_discarded(planned):
    # rank 1 holds 2 bits of 16,832 parameters: by hand in the README's plan
    plan = planned(examples=5_000, lora_rank=[1, 2])
    assert {c.lora_rank for c in plan.pruned.admitted} == {2}
    assert {item.candidate.lora_rank for item in plan.pruned.discarded} == {1}


def test_defaults_are_the_doctrines_for_rl(planned):
    plan = planned()
    assert plan.space.prior.full_ft == doctrine.RL_FULL_FT_LR.value
    assert plan.space.prior.lora == pytest.approx(10 * doctrine.RL_FULL_FT_LR.value)
    assert {c.lora_rank for c in plan.pruned.admitted} == {4, 8}


def test_shown_plan_says_how_episodes_are_made(planned, capsys):
    show_plan(plan_to_dict(planned(reward={"exact_match": 1, "format:\\d+": 0.1})))
    text = capsys.readouterr().out
    assert "dataset: 40 prompts x 8 completions = 320 episodes a trial = 320 bits to hold" in text
    assert "1 bit per episode" in text
    assert "rewarded by 1 x exact_match, 0.1 x format:\\d+" in text
    assert "a trial: 40 prompts, evaluated every 10" in text


def test_episode_longer_than_the_context_is_refused(planned):
    with pytest.raises(ValueError, match=r"max_completion_length must leave room .* got 1020"):
        planned(max_completion_length=1020)


def test_file_of_a_reward_is_an_input_of_the_sweep(workplace, base):
    (workplace / "mine.py").write_text("def score(**_): ...")
    (workplace / "train.jsonl").write_text("{}")
    config = make_config(
        {"model": str(base), "data": "train.jsonl", "method": "rl", "reward": "mine.py:score"}, "t"
    )
    assert local_inputs(config) == ["train.jsonl", "mine.py"]


def test_run_goes_on_with_the_rewards_that_it_began_with(workplace, planned):
    file, run = workplace / "mine.py", RunPaths(workplace / "runs" / "run")
    file.write_text("def score(completions, **_): return [0.0] * len(completions)\n")
    began = planned(reward="mine.py:score")
    write_state(run.plan, plan_to_dict(began))
    require_same_plan(run, began)
    earlier = {k: v for k, v in plan_to_dict(began).items() if k not in ("task", "choice")}
    write_state(run.plan, earlier)  # of a version that knew fewer keys
    require_same_plan(run, began)
    file.write_text(file.read_text().replace("0.0", "1.0"))
    with pytest.raises(
        ValueError, match=r"must plan the same rl, .*files \{'mine\.py': '"
    ) as error:
        require_same_plan(run, planned(reward="mine.py:score"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"reward": "none_such"}, "reward must be one of exact_match"),
        ({"reward": "mine.py:missing"}, "missing must be a function, has no such name"),
        ({"reward": "mine.py:wrong"}, "must take (prompts, completions, answer)"),
        ({"reward": "format:("}, "not a regular expression"),
        ({"data": "texts.jsonl"}, "method: rl needs rows of a prompt and an answer"),
    ],
)
def test_sweep_that_cannot_be_rewarded_is_told_before_ray_starts(
    write_sweep, workplace, capsys, values, told
):
    (workplace / "mine.py").write_text("def wrong(x): ...\n")
    (workplace / "texts.jsonl").write_text(
        "".join(f'{{"text": "row {i} of text"}}\n' for i in range(60))
    )
    config = write_sweep(**(GIVEN | {"quantization": "none"} | values))
    assert main(["sweep", str(config)]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert len(err.strip().splitlines()) == 1
    assert not (workplace / "runs").exists() or not any((workplace / "runs").iterdir())


def record(name: str, rank: int, rewards: list[float]) -> TrialRecord:
    rows = [
        {
            "examples": 16 * at,
            "episodes": 128 * at,
            "steps": at,
            "eval_loss": -reward,
            "eval_reward": reward,
            "train_reward": reward if at else None,
            "kl": 0.1 * at,
            "entropy": 3.0 - at,
            "completion_length": 7.5,
            "seconds": 1.0,
        }
        for at, reward in enumerate(rewards)
    ]
    given = next(iter(grid_candidates(build_space(ModelShape.from_config(LLAMA)))))
    candidate = replace(given, learning_rate=10.0**-rank, lora_rank=rank).to_dict()
    return TrialRecord(
        name=name, candidate=candidate, status="finished", reason="", rows=tuple(rows)
    )


RECORDS = [record("high", 3, [0.1, 0.5, 0.9]), record("low", 4, [0.1, 0.3, 0.2])]


def test_best_trial_has_the_highest_reward_of_any_evaluation():
    best = best_trial(RECORDS)
    assert best is not None
    assert best.name == "high"
    assert RECORDS[1].best["eval_reward"] == 0.3
    assert (objective_of("rl"), objective_of("sft")) == (REWARD, LOSS)
    assert RECORDS[0].objective is REWARD


def test_results_table_shows_rewards_and_not_losses(tmp_path, capsys):
    show_results(RECORDS, RECORDS[0], RunPaths(tmp_path / "run"), 2)
    text = capsys.readouterr().out
    assert re.search(r"at examples +eval_reward +kl +entropy +tokens", text)
    assert re.search(r"32 +0\.9000 +0\.200 +1\.000 +7\.5", text)
    assert "eval_reward of the untouched base: 0.1000" in text
    assert "eval_loss" not in text


def test_charts_show_rewards_by_learning_rate_rank_and_episodes(planned):
    plan = json.loads(json.dumps(plan_to_dict(planned())))
    drawn = {card.heading: card.figure for card in cards(plan, RECORDS)}
    by_rate = drawn["Best eval_reward by learning rate"]
    assert sorted(y for trace in by_rate.data if trace.mode == "markers" for y in trace.y if y) == [
        0.3,
        0.9,
    ]
    assert by_rate.layout.yaxis.title.text == REWARD.title
    curves = drawn["Learning curves"]
    assert list(curves.data[0].x) == [0, 128, 256]
    assert list(curves.data[0].y) == [0.1, 0.5, 0.9]
    kl = next(figure for heading, figure in drawn.items() if heading.startswith("Divergence"))
    assert list(kl.data[1].y) == pytest.approx([0, 0.1, 0.2])


def test_report_of_rewards_names_them(planned):
    plan = json.loads(json.dumps(plan_to_dict(planned())))
    resolved = {"config": {"model": "m", "method": "rl", "reward": "exact_match"}, "versions": {}}
    page = render("run", plan, resolved, RECORDS)
    assert "with eval_reward 0.9000 after 256 episodes of 32 prompts" in page
    assert "Divergence of the policy from the base" in page
    assert "320 episodes a trial count for 320 bits: 1 bit per episode" in page
    assert "bits/byte" not in page
