"""A task metric beside the loss: what it measures, which weights it keeps, and that neighbours change nothing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.trainers.links import FakeLink, enter, serve
from tests.trainers.test_rl_trial import LEARNER, TASK
from tests.trainers.trials import BASE, numbers, trial
from trainers.base_model import BaseSpec
from trainers.data import prepare_data
from trainers.data.tokenizer import load_tokenizer
from trainers.episodes import Questions, spoken
from trainers.metrics import BY_LOSS, Judge
from trainers.paths import TrialPaths, read_json_lines
from trainers.rewards import Reward
from trainers.rl_spec import TaskSpec
from trainers.sft_trainer import TrialSpec, train_trial

ASKED = TaskSpec(reward={"exact_match": 1.0}, max_completion_length=6, num_rows=20)
BY_SCORE = Judge(key="eval_score")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))


def asked_trial(folder: Path, **changes) -> TrialSpec:
    """A supervised trial on prompts with an answer of a word, evaluated three times."""
    spec = trial(TASK, folder, task=ASKED, judge=BY_SCORE, num_examples=240, eval_every=80)
    data = replace(spec.data, seq_len=64, eval=0.1)
    return replace(spec, data=data, candidate=LEARNER, micro_batch_size=None, **changes)


def score_by_peft(spec: TrialSpec) -> float:
    """What transformers' own greedy answers of the saved adapter to the same held-out rows are worth."""
    tokenizer = load_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(TrialPaths(spec.folder).best)).eval()
    questions = Questions(prepare_data(spec.data).eval, tokenizer)
    rows = np.linspace(0, len(questions) - 1, ASKED.num_rows).round().astype(int)
    asked = [questions.question(int(row)) for row in rows]
    answers = []
    for question in asked:
        prompt = torch.from_numpy(question.ids)[None]
        out = model.generate(prompt, do_sample=False, max_new_tokens=6, pad_token_id=0)
        answers.append(spoken(tokenizer, out[0, prompt.shape[1] :].numpy()))
    scores = Reward(ASKED.reward)(
        [question.prompt for question in asked], answers, [question.answer for question in asked]
    )
    return float(np.mean(scores))


def test_score_and_adapter_are_of_the_same_step_and_peft_answers_alike(tmp_path):
    spec = asked_trial(tmp_path / "t")
    result = train_trial(spec, lambda row: True)
    base, *rows = result.rows
    assert base["eval_score"] <= 0.1
    assert result.best is max(rows, key=lambda row: row["eval_score"])
    assert result.best["eval_score"] > 0.4
    assert all(row["eval_loss"] > 0 for row in rows)  # the loss is still told
    assert score_by_peft(spec) == result.best["eval_score"]


def test_neighbours_in_a_pack_change_no_score(tmp_path):
    exact = BaseSpec(model=BASE, quantization="none", dtype="fp64")
    short = {"num_examples": 64, "eval_every": 32, "base": exact}
    specs = [
        replace(asked_trial(tmp_path / f"{place}{seed}"), **short)
        for place in "pa"
        for seed in "01"
    ]
    specs = [
        replace(s, candidate=replace(s.candidate, seed=int(s.name[-1]), learning_rate=1e-2))
        for s in specs
    ]
    link = FakeLink([enter(spec) for spec in specs[:2]])
    serve(link)
    for packed, alone in zip(specs[:2], specs[2:], strict=True):
        train_trial(alone, lambda row: True)
        got, expected = (
            [row["eval_score"] for row in read_json_lines(TrialPaths(s.folder).metrics)]
            for s in (packed, alone)
        )
        assert got == expected
        assert len(got) == 3
        assert got[-1] > 0


def test_metric_that_fails_ends_its_trial_with_the_reason(tmp_path):
    (tmp_path / "mine.py").write_text("def score(completions, **others):\n    return [None]\n")
    reward = {f"{tmp_path / 'mine.py'}:score": 1.0}
    spec = asked_trial(tmp_path / "t")
    result = train_trial(
        replace(spec, task=replace(ASKED, reward=reward, num_rows=1)), lambda row: True
    )
    assert result.status == "failed"
    assert "must give finite numbers, gave None" in result.reason


def test_without_a_metric_rows_hold_none(tmp_path):
    spec = replace(asked_trial(tmp_path / "t"), task=None, judge=BY_LOSS, num_examples=16)
    rows = numbers(train_trial(spec, lambda row: True).rows)
    assert not rows[0].keys() & {"eval_score", "completion_length"}


def row(steps: int, loss: float, **others: float | None) -> dict:
    return {"steps": steps, "eval_loss": loss, **others}


def test_judge_takes_the_highest_score_and_the_lowest_loss():
    rows = [row(0, 3.0, eval_score=0.9), row(1, 2.0, eval_score=0.1), row(2, 2.5, eval_score=0.3)]
    assert BY_SCORE.best_row(rows) is rows[2]
    assert BY_LOSS.best_row(rows) is rows[1]


@pytest.mark.parametrize(("most", "best"), [(0.5, 3), (0.2, 2), (0.1, 1), (0.0, None), (None, 3)])
def test_judge_passes_over_what_forgets_too_much(most, best):
    lost = (1.0, 1.05, 1.2, 1.4)
    rows = [row(at, 3.0 - at, retention_loss=loss) for at, loss in enumerate(lost)]
    found = Judge(max_forgetting=most).best_row(rows)
    assert found is (rows[best] if best else None)


def test_judge_of_forgetting_takes_no_row_whose_retention_is_not_finite():
    rows = [row(0, 3.0, retention_loss=1.0), row(1, 1.0, retention_loss=None)]
    assert Judge(max_forgetting=9.0).best_row(rows) is None
    assert json.loads(json.dumps(vars(Judge()))) == vars(Judge())  # as config.json keeps it
