"""The keys of choosing and of limits: what is refused, and what the trials are told."""

import pytest

from orchestration.choice_config import READY, judge_of, lr_tolerance, seconds_of, task_spec
from orchestration.config import ConfigError, make_config
from orchestration.plan_json import plan_to_dict
from orchestration.planning import make_plan
from orchestration.requirements import require_supported, require_trainable
from trainers import rewards

MINIMAL = {"model": "base", "data": "train.jsonl"}


def config(**keys):
    return make_config(MINIMAL | keys, "sweep.yaml")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"metric": "accuracy"}, "metric must be eval_loss, bits_per_byte, or what an answer"),
        ({"metric": {"eval_loss": 1.0}}, "metric must be eval_loss"),
        ({"metric": {"exact_match": 0}}, "metric must be a name, or several with weights"),
        ({"metric_rows": 8}, "metric_rows is for a metric of answers"),
        ({"select": "lowest"}, "select must be best, or lowest_lr_within with a percentage"),
        ({"select": "lowest_lr_within 100%"}, "percentage below 100"),
        ({"max_forgetting": 0.1}, "max_forgetting needs retention"),
        ({"confirm": 1}, "confirm must be 0 or at least 2"),
        ({"time_budget": "2"}, "time_budget must be a duration with units (90m, 2h, 1h30m, 1d)"),
        ({"time_budget": "0m"}, "time_budget must be a duration"),
        ({"max_cost": 5}, "max_cost needs price_per_gpu_hour"),
        ({"metric": "exact_match", "packing": True}, "got packing true"),
        ({"metric": "exact_match", "strategy": "zero3"}, "got strategy zero3"),
        ({"max_completion_length": 9}, "max_completion_length is for method: rl"),
        (
            {"metric": "exact_match", "method": "rl", "reward": "exact_match"},
            "metric is for method: sft",
        ),
    ],
)
def test_choice_keys_that_mean_nothing_are_refused_in_one_line(keys, said):
    with pytest.raises(ConfigError) as found:
        config(**keys)
    assert said in str(found.value)
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("90m", 5400), ("2h", 7200), ("1h30m", 5400), ("1d 1s", 86_401)]
)
def test_choice_durations_have_units(text, seconds):
    assert seconds_of(text) == seconds
    assert config(time_budget=text).time_budget == text


def test_choice_is_told_to_the_trials():
    assert judge_of(config()).key == "eval_loss"
    assert judge_of(config(metric="bits_per_byte")).key == "eval_bits_per_byte"
    asked = config(metric={"exact_match": 1, "regex:x": 0.5}, max_completion_length=9)
    assert judge_of(asked).key == "eval_score"
    spec = task_spec(asked)
    assert spec is not None
    assert vars(spec) == {
        "reward": {"exact_match": 1, "regex:x": 0.5},
        "max_completion_length": 9,
        "num_rows": 128,
    }
    assert task_spec(config(metric="bits_per_byte")) is None
    rewarded = config(method="rl", reward="exact_match")
    assert (judge_of(rewarded).key, task_spec(rewarded)) == ("eval_reward", None)
    assert lr_tolerance(config(select="lowest_lr_within 0.5%").select) == 0.005
    assert set(READY) == rewards.READY.keys()


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"method": "rl", "reward": "exact_match"},
        {"metric": {"exact_match": 1.0}, "confirm": 2, "time_budget": "1h"},
    ],
)
def test_choice_of_a_run_is_read_again_as_a_resume_reads_it(keys):
    began = config(**keys)
    saved = {k: v for k, v in began.model_dump(mode="json").items() if v is not None}
    assert make_config(saved, "runs/run") == began


def test_choice_of_a_file_is_read_before_anything_runs(workplace, base, write_rows, qa_rows):
    write_rows("train.jsonl", qa_rows(30))
    values = {"model": str(base), "data": "train.jsonl", "metric": "absent.py:score"}
    with pytest.raises(ValueError, match=r"must be in a file that is there, absent\.py is none"):
        require_supported(make_config(values, "sweep.yaml"))


def test_choice_of_answers_needs_prompts(workplace, base, write_rows):
    write_rows("train.jsonl", [{"text": f"A line, number {i}, of text."} for i in range(40)])
    values = {"model": str(base), "data": "train.jsonl", "metric": "exact_match"}
    plan = make_plan(make_config(values | {"capacity_policy": "advisory"}, "sweep.yaml"))
    with pytest.raises(ValueError, match="metric: an answer needs rows of a prompt and an answer"):
        require_trainable(plan)


def test_choice_is_in_the_plan_with_the_checksum_of_its_file(workplace, base, write_rows, qa_rows):
    write_rows("train.jsonl", qa_rows(60))
    (workplace / "mine.py").write_text("def score(completions, **others):\n    return [1.0]\n")
    values = {"model": str(base), "data": "train.jsonl", "metric": "mine.py:score", "confirm": 2}
    shown = plan_to_dict(make_plan(make_config(values, "sweep.yaml")))
    assert len(shown["task"]["files"]["mine.py"]) == 64
    assert (shown["choice"]["key"], shown["choice"]["confirm"]) == ("eval_score", 2)
    with pytest.raises(ValueError, match="max_completion_length must leave room"):
        make_plan(make_config(values | {"max_completion_length": 1_000_000}, "sweep.yaml"))
