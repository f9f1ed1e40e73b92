"""The loop against a plain PEFT + torch.optim.AdamW loop, against itself split in other ways, and
under divergence. Oracles are PEFT and torch, not our own code."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from search_spaces.architecture import ModelShape
from tests.trainers.tiny import Rows, random_rows, tiny_model
from trainers.adapters import inject
from trainers.batches import RowSource, example_order
from trainers.composer import ForwardLimits
from trainers.full import unfreeze
from trainers.loop import Trainer
from trainers.runs import Run, RunSpec, new_run, scheduled_lr
from trainers.slots import AdapterSpec

CPU = torch.device("cpu")
LIMITS = ForwardLimits(max_tokens=1 << 20)
SPEC = RunSpec(learning_rate=1e-2, global_batch_size=6, num_examples=120, eval_every=1000)


def adapter_spec(model, lora_rank=4, target=("attn", "mlp", "unembed"), **changes) -> AdapterSpec:
    shape = ModelShape.from_config(model.config.to_dict())
    linears = tuple(shape.resolve_target(target))
    return AdapterSpec(lora_rank=lora_rank, lora_alpha=32, linears=linears, **changes)


def train(
    model, specs, run_specs, rows, held_out, micro_batch_size=3, max_tokens=1 << 20
) -> tuple[list[Run], list[list[float]]]:
    """Trains a pack and records each run's loss at every optimizer step."""
    pack = inject(model, specs)
    trainer = Trainer(
        pack,
        RowSource(rows, 0, CPU),
        RowSource(held_out, 0, CPU),
        limits=ForwardLimits(max_tokens=max_tokens, micro_batch_size=micro_batch_size),
    )
    runs = [new_run(pack, index, spec) for index, spec in enumerate(run_specs)]
    losses: list[list[float]] = [[] for _ in runs]
    count = trainer._count

    def recording(run: Run, nats: float) -> None:
        losses[runs.index(run)].append(nats / run.batch_loss_tokens)
        count(run, nats)

    trainer._count = recording
    trainer.run(runs, lambda run, evaluation: True)
    return runs, losses


def peft_reference(model, spec: AdapterSpec, run_spec: RunSpec, rows: Rows) -> list[float]:
    """A plain loop: PEFT model, torch AdamW, whole padded batch with an attention mask."""
    config = LoraConfig(
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,
        target_modules=sorted({linear.name for linear in spec.linears}),
    )
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    own = inject(
        tiny_model(model.dtype, tie_word_embeddings=model.config.tie_word_embeddings), [spec]
    )
    parameters = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in own.slots[0].parameters.items():
            parameters[name.replace(".weight", ".default.weight")].copy_(parameter)
    assert len(parameters) == len(own.slots[0].parameters)
    optimizer = torch.optim.AdamW(parameters.values(), lr=run_spec.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(run_spec.num_steps):
        start = step * run_spec.global_batch_size
        order = example_order(len(rows), run_spec.seed, start, start + run_spec.global_batch_size)
        batch = [rows.example(int(index)) for index in order]
        width = max(len(row.input_ids) for row in batch)
        ids = torch.tensor([[*row.input_ids, *[0] * (width - len(row.input_ids))] for row in batch])
        attention = torch.tensor(
            [[1] * len(r.input_ids) + [0] * (width - len(r.input_ids)) for r in batch]
        )
        labels = torch.tensor(
            [
                [int(i) if m else -100 for i, m in zip(r.input_ids, r.loss_mask, strict=True)]
                + [-100] * (width - len(r.input_ids))
                for r in batch
            ]
        )
        logits = peft_model(input_ids=ids, attention_mask=attention).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), run_spec.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tied", [False, True])
def test_loop_one_adapter_float64_equals_peft_over_20_steps(rows, held_out, tied):
    model = tiny_model(tie_word_embeddings=tied)
    spec = adapter_spec(model)
    expected = peft_reference(copy.deepcopy(model), spec, SPEC, rows)
    _, (losses,) = train(model, [spec], [SPEC], rows, held_out)
    assert len(losses) == 20
    assert losses == pytest.approx(expected, abs=1e-9)
    assert abs(losses[-1] - losses[0]) > 0.1  # it learnt: the comparison is not of constants


def test_loop_one_adapter_float32_equals_peft_over_5_steps(rows, held_out):
    model = tiny_model(torch.float32)
    spec, run_spec = adapter_spec(model), replace(SPEC, num_examples=30)
    expected = peft_reference(copy.deepcopy(model), spec, run_spec, rows)
    _, (losses,) = train(model, [spec], [run_spec], rows, held_out)
    assert losses == pytest.approx(expected, abs=1e-5)


def test_loop_any_micro_batch_size_gives_the_same_losses(held_out):
    # FIELD D07: rows with 1 and 50 loss tokens weigh by token, not by micro-batch.
    rows = random_rows(30, seed=3, longest=60)
    runs = [
        train(tiny_model(), [adapter_spec(tiny_model())], [SPEC], rows, held_out, size)[1][0]
        for size in (1, 2, 6)
    ]
    assert runs[0] == pytest.approx(runs[1], abs=1e-9)
    assert runs[0] == pytest.approx(runs[2], abs=1e-9)


def test_loop_first_step_every_lora_b_has_a_gradient(rows, held_out):
    model = tiny_model()
    pack = inject(model, [adapter_spec(model)])
    trainer = Trainer(pack, RowSource(rows, 0, CPU), RowSource(held_out, 0, CPU), limits=LIMITS)
    run = new_run(pack, 0, SPEC)
    trainer.begin_batches([run])
    trainer._micro_step([run], trainer.train_rows, [run.share.rows])
    b_gradients = {n: g for n, g in run.slot.gradients.items() if ".lora_B." in n}
    assert len(b_gradients) == 2 * 7 + 1
    assert all(bool(gradient.any()) for gradient in b_gradients.values())


def test_loop_mixed_pack_of_three_trains_each_as_if_alone(rows, held_out):
    base = tiny_model()
    specs = [
        adapter_spec(base, 4),
        adapter_spec(base, 8, target=("attn",), seed=5, dropout=0.1),
        adapter_spec(base, 2, target=("mlp", "unembed"), seed=9),
    ]
    run_specs = [
        SPEC,
        replace(SPEC, global_batch_size=4, seed=1, learning_rate=3e-3),
        replace(SPEC, num_examples=60, seed=2),
    ]
    _, together = train(tiny_model(), specs, run_specs, rows, held_out)
    for spec, run_spec, losses in zip(specs, run_specs, together, strict=True):
        _, (alone,) = train(tiny_model(), [spec], [run_spec], rows, held_out)
        assert losses == pytest.approx(alone, abs=1e-9)


def test_loop_diverging_neighbour_ends_alone_with_a_reason(rows, held_out):
    base = tiny_model()
    specs = [adapter_spec(base, 4), adapter_spec(base, 4, seed=1)]
    run_specs = [SPEC, replace(SPEC, learning_rate=1e200, max_grad_norm=0.0)]
    runs, (losses, _) = train(tiny_model(), specs, run_specs, rows, held_out)
    _, (alone,) = train(tiny_model(), [specs[0]], [SPEC], rows, held_out)
    assert (runs[0].status, runs[1].status) == ("finished", "diverged")
    assert "nan" in runs[1].reason or "inf" in runs[1].reason
    assert runs[1].steps < 5
    assert losses == pytest.approx(alone, abs=1e-9)


def test_loop_same_seed_twice_gives_identical_losses(rows, held_out):
    first, second = (
        train(tiny_model(), [adapter_spec(tiny_model(), dropout=0.2)], [SPEC], rows, held_out)[1]
        for _ in range(2)
    )
    assert first == second


def test_loop_partial_last_batch_uses_exactly_the_budget(rows, held_out):
    runs, (losses,) = train(
        tiny_model(), [adapter_spec(tiny_model())], [replace(SPEC, num_examples=20)], rows, held_out
    )
    assert (runs[0].examples, runs[0].steps, len(losses)) == (20, 4, 4)


def test_eval_loss_any_batch_size_is_token_weighted(rows, held_out):
    model = tiny_model()
    expected_nats, tokens = 0.0, 0
    for row in held_out.rows:
        logits = model(input_ids=torch.tensor(row.input_ids)[None]).logits[0].log_softmax(-1)
        for position in np.flatnonzero(row.loss_mask):
            expected_nats -= logits[position - 1, row.input_ids[position]].item()
            tokens += 1
    pack = inject(model, [adapter_spec(model)])
    for size in (1, 2, 8):
        trainer = Trainer(
            pack,
            RowSource(rows, 0, CPU),
            RowSource(held_out, 0, CPU),
            limits=ForwardLimits(max_tokens=size * 24),
        )
        loss, bits = trainer.eval_losses(new_run(pack, 0, SPEC))
        assert loss == pytest.approx(expected_nats / tokens, abs=1e-9)
        assert bits == pytest.approx(expected_nats / math.log(2) / (3 * tokens), abs=1e-9)


def test_full_fine_tuning_equals_plain_adamw(rows, held_out):
    run_spec = replace(SPEC, learning_rate=1e-3, num_examples=30)
    pack = unfreeze(tiny_model(tie_word_embeddings=True))
    trainer = Trainer(pack, RowSource(rows, 0, CPU), RowSource(held_out, 0, CPU), limits=LIMITS)
    run = new_run(pack, 0, run_spec)
    trainer.run([run], lambda run, evaluation: True)
    model = tiny_model(tie_word_embeddings=True)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(5):
        order = example_order(len(rows), 0, step * 6, step * 6 + 6)
        nats = tokens = 0
        for row in (rows.example(int(index)) for index in order):
            logits = model(input_ids=torch.tensor(row.input_ids)[None]).logits[0, :-1]
            wanted = torch.tensor(row.loss_mask[1:])
            nats = nats + F.cross_entropy(
                logits[wanted], torch.tensor(row.input_ids)[1:][wanted], reduction="sum"
            )
            tokens += int(wanted.sum())
        (nats / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            run.slot.parameters[name].detach(), parameter.detach(), atol=1e-9, rtol=0
        )


def test_full_fine_tuning_bf16_is_refused():
    with pytest.raises(ValueError, match="dtype: fp32"):
        unfreeze(tiny_model(torch.bfloat16))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1 - 1 / 17]),
        ("cosine", [0.25, 0.5, 0.75, 1, 0.5 * (1 + math.cos(math.pi / 17))]),
    ],
)
def test_scheduled_lr_warms_up_then_follows_its_shape(schedule, expected):
    spec = replace(SPEC, learning_rate=1.0, lr_schedule=schedule, warmup=3)
    assert [scheduled_lr(spec, step) for step in range(5)] == pytest.approx(expected)
