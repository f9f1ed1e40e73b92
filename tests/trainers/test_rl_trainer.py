"""Reinforcement learning of packs: against TRL's GRPOTrainer, against itself alone and in other parts, and where
rewards fail."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.trainers.rl import END, RUN, SPEC, evens, question_rows, rl_trainer
from tests.trainers.test_loop import adapter_spec
from tests.trainers.tiny import tiny_model
from trainers.adapters import inject
from trainers.episodes import Episodes, group_advantages, informative_rows, last_span
from trainers.full import BaseWeights, unfreeze
from trainers.rl_trainer import RewardEvaluation
from trainers.runs import Run, new_run

ALL = ("attn", "mlp", "unembed")
TRL_ROUNDING = 1e-5
"""TRL's fused head computes log-probabilities in float32, also of a float64 model."""


def started(model, num_adapters=1, target=ALL, **given):
    """A trainer with adapters that already differ from the base, and their runs."""
    specs = [adapter_spec(model, 4, target, seed=at) for at in range(num_adapters)]
    pack = inject(model, specs)
    generator = torch.Generator().manual_seed(1)
    for slot in pack.slots.values():
        for name, view in slot.parameters.items():
            if "lora_B" in name:
                view.copy_(torch.randn(view.shape, generator=generator, dtype=view.dtype) * 0.1)
    trainer = rl_trainer(pack, **given)
    return trainer, [new_run(pack, index, replace(RUN, seed=index)) for index in pack.slots]


def one_batch(trainer, runs) -> None:
    """Forwards and backwards of one global batch, without the step."""
    trainer._optimizer_steps = lambda full: None
    trainer.begin_batches(runs)
    while left := [run for run in runs if run.share]:
        trainer.forward([(run, run.share.take(3)) for run in left])


def test_loss_and_gradients_are_those_of_trl(tmp_path):
    """float64: TRL's GRPOTrainer._compute_loss on the same episodes, rewards and weights; without an adapter on the
    head, which TRL (1.16) refuses."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    from tests.trainers.trials import BASE

    model = tiny_model()
    spec = replace(SPEC, temperature=0.8)
    trainer, (run,) = started(copy.deepcopy(model), target=("attn", "mlp"), spec=spec)
    one_batch(trainer, [run])
    episodes = trainer.batches[run].episodes.episodes

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(episodes),
        num_generations=SPEC.num_generations,
        temperature=0.8,
        loss_type="dapo",
        scale_rewards="none",
        importance_sampling_level="token",
        beta=0.0,
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
    )
    adapter = run.slot.spec
    config = LoraConfig(
        r=adapter.lora_rank,
        lora_alpha=32,
        target_modules=sorted({linear.name for linear in adapter.linears}),
    )
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    parameters = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, view in run.slot.parameters.items():
            parameters[name.replace(".weight", ".default.weight")].copy_(view)
    reference = trl.GRPOTrainer(
        peft_model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * len(episodes)),
        processing_class=AutoTokenizer.from_pretrained(BASE),
    )
    inputs = trl_inputs(episodes)
    reference.current_gradient_accumulation_steps = 1  # which its train() sets
    loss = reference._compute_loss(reference.model, inputs)
    loss.backward()

    own = float(run.batch_nats) / run.batch_loss_tokens
    assert own == pytest.approx(loss.item(), abs=TRL_ROUNDING)
    num_compared = 0
    for name, gradient in run.slot.gradients.items():
        expected = parameters[name.replace(".weight", ".default.weight")].grad
        largest = float(expected.abs().max())
        assert gradient == pytest.approx(expected.numpy(), abs=TRL_ROUNDING * largest), name
        num_compared += bool(expected.abs().max() > 1e-5)
    assert num_compared == len(parameters) == len(run.slot.gradients)


def trl_inputs(episodes):
    """Episodes as GRPOTrainer holds them: prompts padded on the left, completions on the right."""
    prompts = [e.ids[: e.prompt_length] for e in episodes]
    completions = [e.ids[e.prompt_length :] for e in episodes]
    left, right = max(map(len, prompts)), max(map(len, completions))
    inputs = {
        "prompt_ids": torch.zeros(len(episodes), left, dtype=torch.int64),
        "prompt_mask": torch.zeros(len(episodes), left, dtype=torch.int64),
        "completion_ids": torch.zeros(len(episodes), right, dtype=torch.int64),
        "completion_mask": torch.zeros(len(episodes), right, dtype=torch.int64),
        "old_per_token_logps": torch.zeros(len(episodes), right),
        "advantages": torch.tensor([e.advantage for e in episodes], dtype=torch.float64),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
    for at, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        inputs["prompt_ids"][at, left - len(prompt) :] = torch.from_numpy(prompt)
        inputs["prompt_mask"][at, left - len(prompt) :] = 1
        inputs["completion_ids"][at, : len(completion)] = torch.from_numpy(completion)
        inputs["completion_mask"][at, : len(completion)] = 1
        inputs["old_per_token_logps"][at, : len(completion)] = torch.from_numpy(
            episodes[at].logps.copy()
        )
    return inputs


def test_advantages_are_what_an_episode_earned_above_its_groups_mean():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    expected = [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0]]
    assert group_advantages(rewards).tolist() == expected


def test_prompt_is_what_stands_before_the_last_answer():
    assert last_span(np.array([0, 0, 1, 1, 0, 1, 1], dtype=bool)) == (5, 7)
    assert last_span(np.array([0, 1], dtype=bool)) == (1, 2)
    with pytest.raises(ValueError, match="must have an answer"):
        last_span(np.zeros(3, dtype=bool))


def test_only_episodes_with_an_advantage_are_computed_and_all_tokens_counted():
    trainer, (run,) = started(
        tiny_model(), reward=lambda completions, **_: [1.0] * len(completions)
    )
    trainer.begin_batches([run])
    episodes = trainer.batches[run].episodes
    assert informative_rows(episodes).tolist() == [0]
    assert len(run.share) == 1
    assert run.batch_loss_tokens == episodes.loss_token_counts.sum()
    assert len(episodes) == RUN.global_batch_size * SPEC.num_generations
    assert informative_rows(Episodes(episodes.episodes[:3])).tolist() == [0]


def gradients(run: Run) -> torch.Tensor:
    return torch.cat([g.flatten() for g in run.slot.gradients.values()])


@pytest.mark.parametrize("max_tokens", [16, 60, 1 << 20])
def test_any_micro_batch_gives_the_same_gradients(max_tokens):
    trainer, (run,) = started(tiny_model(), max_tokens=max_tokens)
    one_batch(trainer, [run])
    whole, (other,) = started(tiny_model())
    whole._optimizer_steps = lambda full: None
    whole.advance([other])
    assert gradients(run) == pytest.approx(gradients(other), abs=1e-12)
    assert float(gradients(run).abs().max()) > 1e-4


def rows_of(runs, trainer):
    found: dict[int, list] = {run.slot_index: [] for run in runs}

    def keep(run, evaluation) -> bool:
        found[run.slot_index].append(evaluation)
        return True

    trainer.run(runs, keep)
    return found


def test_two_adapters_learn_together_what_each_learns_alone():
    together, runs = started(tiny_model(), 2)
    found = rows_of(runs, together)
    for index in range(2):
        alone, (first, second) = started(tiny_model(), 2)
        run = (first, second)[index]
        own = rows_of([run], alone)[index]
        assert len(own) == len(found[index]) == 2
        for a, b in zip(own, found[index], strict=True):
            assert (a.eval_reward, a.completion_length) == (b.eval_reward, b.completion_length)
            assert (a.kl, a.entropy) == pytest.approx((b.kl, b.entropy), abs=1e-6)
            assert a.train_reward == b.train_reward
        weights = [
            torch.cat([p.flatten() for p in r.slot.parameters.values()]) for r in (run, runs[index])
        ]
        assert weights[0] == pytest.approx(weights[1], abs=1e-6)


def test_reward_rises_and_the_policy_leaves_the_base():
    spec = replace(RUN, num_examples=300, eval_every=100)
    trainer, (run,) = started(tiny_model(torch.float32))
    run.spec = spec
    base, *rows = rows_of([run], trainer)[0]
    assert (base.steps, base.kl, base.train_reward) == (0, 0.0, None)
    assert [row.examples for row in rows] == [100, 200, 300]
    assert [row.episodes for row in rows] == [400, 800, 1200]
    assert base.eval_reward < 0.65 < rows[-1].eval_reward
    assert rows[-1].eval_loss == -rows[-1].eval_reward
    assert rows[-1].kl > 0.02
    assert rows[-1].train_reward > rows[0].train_reward
    assert isinstance(rows[-1], RewardEvaluation)


def test_whole_model_learns_and_its_kl_is_to_the_base_it_was():
    model = tiny_model(torch.float32)
    weights = BaseWeights(model)
    trainer = rl_trainer(unfreeze(model), weights=weights)
    run = new_run(trainer.pack, 0, replace(RUN, learning_rate=3e-3, num_examples=100))
    base, last = rows_of([run], trainer)[0]
    assert last.eval_reward > base.eval_reward
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    # by hand: both models' log-probabilities of the completions that the policy samples
    questions = [trainer.eval_questions.question(row) for row in range(12)]
    from trainers.rollouts import EVAL_SEED
    from trainers.sampler import Prompt, episode_key

    prompts = [Prompt(q.ids, episode_key(EVAL_SEED, row, 0)) for row, q in enumerate(questions)]
    (done,) = trainer.roller.sampler.sample([(None, prompts)])
    total, count = 0.0, 0
    for question, completion in zip(questions, done, strict=True):
        ids = torch.from_numpy(np.concatenate([question.ids, completion.ids]))[None]
        logps = []
        for values in (trained, weights.copies):
            with torch.no_grad():
                out = torch.func.functional_call(model, values, (), {"input_ids": ids})
            logp = torch.log_softmax(out.logits[0, len(question.ids) - 1 : -1].double(), -1)
            logps.append(logp.gather(1, ids[0, len(question.ids) :, None]).sum().item())
        total, count = total + logps[0] - logps[1], count + len(completion.ids)
    assert last.kl == pytest.approx(total / count, abs=1e-5)
    assert last.kl > 0.01
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name])


def test_batch_that_is_done_again_trains_on_the_same_episodes():
    trainer, (run,) = started(tiny_model())
    trainer.begin_batches([run])
    first = trainer.batches[run].episodes
    run.share = None
    trainer.begin_batches([run])
    assert trainer.batches[run].episodes is first


def test_run_that_goes_on_samples_what_it_would_have_sampled():
    trainer, (run,) = started(tiny_model())
    rows_of([run], trainer)
    again, (other,) = started(tiny_model())
    other.spec = replace(RUN, num_examples=20)
    rows_of([other], again)
    # the second half in a fresh trainer, with the state of the first
    third, (last,) = started(tiny_model())
    for kind in ("parameters",):
        for name, view in getattr(last.slot, kind).items():
            view.copy_(getattr(other.slot, kind)[name])
    for name, (m, v) in last.slot.moments.items():
        m.copy_(other.slot.moments[name][0])
        v.copy_(other.slot.moments[name][1])
    last.restore(other.counters)
    rows_of([last], third)
    assert last.examples == run.examples == 40
    for name, view in run.slot.parameters.items():
        assert torch.equal(view, last.slot.parameters[name]), name


@pytest.mark.parametrize("when", ["training", "evaluation"])
def test_reward_that_raises_fails_its_trial_with_the_reason(when):
    calls = []

    def reward(completions, **others):
        calls.append(len(completions))
        if len(calls) == (1 if when == "evaluation" else 2):
            raise KeyError("gold")
        return evens(completions, **others)

    trainer, (run,) = started(tiny_model(), reward=reward)
    rows_of([run], trainer)
    assert run.status == "failed"
    assert "reward test raised KeyError" in run.reason
    assert (run.steps, run.examples) == (0, 0)


def test_reward_of_one_trial_that_fails_leaves_its_neighbour_alone():
    def reward(prompts, completions, answer):
        if len(prompts) == 20 and any(p[0] >= "\x08" for p in prompts) and reward.broken:
            reward.broken = False
            raise ValueError("first batch")
        return evens(completions)

    reward.broken = True
    trainer, runs = started(tiny_model(), 2, reward=reward)
    rows_of(runs, trainer)
    assert [run.status for run in runs] == ["failed", "finished"]
    assert runs[1].examples == 40


def test_non_finite_objective_ends_the_run_as_diverged():
    trainer, (run,) = started(tiny_model())
    next(iter(run.slot.parameters.values())).fill_(math.nan)
    rows_of([run], trainer)
    assert run.status in ("diverged", "failed")
    assert run.reason


def test_out_of_memory_halves_the_forwards_and_keeps_the_episodes(monkeypatch):
    trainer, (run,) = started(tiny_model())
    expected, (other,) = started(tiny_model())
    rows_of([other], expected)
    micro_step, sizes = trainer._micro_step, []

    def short(chosen, source, rows):
        sizes.append(sum(map(len, rows)))
        if sizes[-1] > 4:
            raise RuntimeError("can't allocate memory")
        micro_step(chosen, source, rows)

    monkeypatch.setattr(trainer, "_micro_step", short)
    rows_of([run], trainer)
    assert run.status == "finished"
    assert max(sizes) > 4 >= sizes[-1]
    for name, view in run.slot.parameters.items():
        assert view == pytest.approx(other.slot.parameters[name].numpy(), abs=1e-9), name


def test_questions_hold_prompt_and_answer():
    trainer, _ = started(tiny_model())
    rows = question_rows(30)
    question = trainer.train_questions.question(4)
    example = rows.example(4)
    assert question.ids.tolist() == example.input_ids[:-2].tolist()
    assert question.prompt == "".join(map(chr, example.input_ids[:-2]))
    assert question.answer == chr(example.input_ids[-2])
    assert example.input_ids[-1] == END
