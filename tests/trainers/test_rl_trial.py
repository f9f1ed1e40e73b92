"""Whole trials by rewards: what they learn and leave, on two workers, after deaths, and where a reward fails."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.trainers.deaths import Deaths, Pack, shared
from tests.trainers.links import Killed, as_command
from tests.trainers.test_trial import _work
from tests.trainers.trials import BASE, CANDIDATE, ROOT, numbers, trial
from trainers.base_model import BaseSpec
from trainers.data.tokenizer import load_tokenizer
from trainers.paths import TrialPaths, read_json, read_json_lines
from trainers.rewards import Reward
from trainers.rl_spec import RLSpec
from trainers.sampler import episode_key
from trainers.sft_trainer import TrialSpec, train_trial

TASK = ROOT / "trainers" / "assets" / "rl" / "parameters.jsonl"
FIRST_WORD = {r"regex:\A (\w+)\W": 1.0}
RL = RLSpec(reward=FIRST_WORD, num_generations=8, max_completion_length=6)
LEARNER = replace(CANDIDATE, dropout=0.0, lr_schedule="constant", warmup=0.0, global_batch_size=16)


def rl_trial(folder: Path, **changes) -> TrialSpec:
    """96 prompts of the task on the shipped base, evaluated at each third."""
    spec = trial(TASK, folder)
    data = replace(spec.data, seq_len=64, eval=0.05)
    return replace(
        spec,
        data=data,
        candidate=LEARNER,
        num_examples=96,
        eval_every=32,
        micro_batch_size=None,
        rl=RL,
        **changes,
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))


def test_trial_learns_the_task_and_its_adapter_samples_the_same_in_peft(tmp_path):
    spec = replace(rl_trial(tmp_path / "t"), num_examples=320, eval_every=160)
    result = train_trial(spec, lambda row: True)
    base, *rows = result.rows
    assert result.status == "finished"
    assert base["eval_reward"] < 0.1
    assert rows[-1]["eval_reward"] > 0.3
    assert rows[-1]["train_reward"] > rows[0]["train_reward"] > 0.05
    assert result.best is max(rows, key=lambda row: row["eval_reward"])
    assert [row["episodes"] for row in result.rows] == [0, 1280, 2560]
    assert rows[-1].keys() >= {"kl", "entropy", "completion_length", "eval_loss", "lr", "grad_norm"}
    assert not rows[-1].keys() & {"train_loss", "eval_bits_per_byte", "retention_loss"}
    assert sampled_reward(TrialPaths(spec.folder).best) > 0.25


def sampled_reward(adapter: Path) -> float:
    """Share of 60 rows that PEFT's own model, sampling by transformers' own generator, answers."""
    tokenizer = load_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    torch.manual_seed(0)
    hits = 0
    for row in map(json.loads, TASK.read_text().splitlines()[:60]):
        ids = tokenizer.encoder.encode(row["prompt"], add_special_tokens=False).ids
        prompt = torch.tensor([[*tokenizer.prefix_ids, *ids]])
        out = model.generate(prompt, do_sample=True, top_k=0, max_new_tokens=6, pad_token_id=0)
        text = tokenizer.decode(out[0, prompt.shape[1] :].tolist())
        hits += text.startswith(row["completion"]) and not text[len(row["completion"])].isalnum()
    return hits / 60


def test_trial_that_died_between_evaluations_ends_in_the_numbers_of_an_undisturbed_one(tmp_path):
    whole = train_trial(rl_trial(tmp_path / "whole"), lambda row: True)
    spec = rl_trial(tmp_path / "killed")

    def dies(row) -> bool:
        if row["examples"] == 64:
            raise Killed
        return True

    with pytest.raises(Killed):
        train_trial(spec, dies)
    again = train_trial(spec, lambda row: True)
    assert numbers(again.rows) == numbers(whole.rows)


def test_trial_on_two_workers_learns_as_one(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = rl_trial(tmp_path / "one", base=BaseSpec(model=BASE, quantization="none", dtype="fp64"))
    one = train_trial(spec, lambda row: True)
    two = replace(spec, name="two", folder=tmp_path / "two")
    mp.spawn(_work, args=(2, two, f"file://{tmp_path}/meeting"), nprocs=2)
    rows = read_json_lines(two.folder / "metrics.jsonl")
    assert len(rows) == len(one.rows) == 4
    for row, expected in zip(rows, one.rows, strict=True):
        for key in ("eval_reward", "train_reward", "completion_length", "episodes"):
            assert row[key] == expected[key]
        for key in ("kl", "entropy", "grad_norm"):
            assert row[key] == pytest.approx(expected[key], abs=1e-4)
    assert rows[-1]["train_reward"] > 0


def test_full_fine_tuning_learns_and_gives_the_base_back(tmp_path):
    candidate = replace(LEARNER, full_finetune=True, lora_rank=0, learning_rate=5e-4)
    spec = replace(
        rl_trial(tmp_path / "full"), candidate=candidate, num_examples=160, eval_every=80
    )
    result = train_trial(spec, lambda row: True)
    assert result.status == "finished"
    assert result.rows[-1]["eval_reward"] > result.rows[0]["eval_reward"]
    assert result.rows[-1]["kl"] > 0


GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl"


@pytest.mark.skipif(not GSM8K.exists(), reason="needs ../shared/data/gsm8k/test.jsonl")
def test_gsm8k_goes_through_with_its_numeric_answers(tmp_path):
    spec = rl_trial(tmp_path / "t")
    spec = replace(
        spec,
        data=replace(spec.data, data=str(GSM8K), seq_len=512, eval=0.005),
        candidate=replace(LEARNER, global_batch_size=2),
        rl=RLSpec(reward={"numeric_answer": 1.0}, num_generations=2, max_completion_length=24),
        num_examples=4,
        eval_every=2,
    )
    result = train_trial(spec, lambda row: True)
    assert result.status == "finished", result.reason
    assert [row["episodes"] for row in result.rows] == [0, 4, 8]
    assert all(0 <= row["eval_reward"] <= 1 for row in result.rows)
    assert all(1 <= row["completion_length"] <= 24 for row in result.rows)
    answers = [row["answer"] for row in map(json.loads, GSM8K.read_text().splitlines())]
    assert Reward({"numeric_answer": 1.0})(answers, answers, answers) == [1.0] * 1319
    others = answers[1:] + answers[:1]
    assert sum(Reward({"numeric_answer": 1.0})(answers, others, answers)) < 100


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise RuntimeError('no judge')", "raised RuntimeError"),
        ("return [0.0]", "a number for each of"),
        ("return [float('nan')] * len(completions)", "finite numbers"),
        ("return ['x'] * len(completions)", "finite numbers"),
    ],
)
def test_reward_that_fails_ends_the_trial_with_the_reason(tmp_path, body, told):
    path = tmp_path / "mine.py"
    path.write_text(
        "calls = []\n"
        "def score(prompts, completions, answer):\n"
        "    calls.append(1)\n"
        "    if len(calls) < 4:\n"
        "        return [0.0] * len(completions)\n"
        f"    {body}\n"
    )
    rl = replace(RL, reward={f"{path}:score": 1.0})
    spec = replace(rl_trial(tmp_path / "t"), rl=rl)
    result = train_trial(spec, lambda row: True)
    assert result.status == "failed"
    assert told in result.reason
    status = read_json(TrialPaths(spec.folder).status)
    assert status["status"] == "failed"
    assert status["reason"] == result.reason
    assert result.rows  # what was evaluated before stays


def test_key_of_an_episode_is_its_own():
    keys = {episode_key(s, p, k) for s in range(-1, 4) for p in range(50) for k in range(8)}
    assert len(keys) == 5 * 50 * 8


class RLPack(Pack):
    """Two trials of different ranks and batches that learn by rewards together."""

    def __init__(self, data_file: Path, folder: Path, model: str, name: str) -> None:
        super().__init__(data_file, folder, model, name)
        reward = folder / "mine.py"
        reward.write_text(
            "def score(completions, **_):\n    return [sum(map(ord, c)) % 5 / 4 for c in completions]\n"
        )
        rl = RLSpec(reward={f"{reward}:score": 1.0}, num_generations=4, max_completion_length=4)
        self.specs = {
            key: replace(
                spec,
                rl=rl,
                candidate=replace(spec.candidate, dropout=0.0),
                num_examples=16 if key == "a" else 12,
                eval_every=4,
                max_tokens=600,
            )
            for key, spec in self.specs.items()
            if key in ("a", "b")
        }


def test_pack_killed_before_any_forward_samples_and_learns_the_same_again(
    data_file, tmp_path, tiny_folder, monkeypatch
):
    whole = Deaths(monkeypatch).assert_same_after_any(
        lambda name: RLPack(data_file, tmp_path, tiny_folder, name), least=7
    )
    assert shared(whole.log) > 1
    assert any("episodes" in row for row in read_json_lines(whole.log))


def test_spec_goes_through_json(tmp_path):
    spec = rl_trial(tmp_path)
    assert TrialSpec.from_dict(as_command(spec)) == spec
