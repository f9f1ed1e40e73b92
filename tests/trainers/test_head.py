"""The loss head against the model's own logits: families that scale them, chunks, positions computed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaForCausalLM,
)

from tests.trainers.packs import CPU, NAMES, RUN, Bench, adapter
from tests.trainers.tiny import TINY_LLAMA, Row, Rows, random_rows, tiny_model
from trainers.adapters import Pack, inject
from trainers.batches import LOSS_BLOCK, RowSource
from trainers.composer import ForwardLimits
from trainers.head import LossHead, check_head, logit_scaling, output_head
from trainers.loop import Trainer

SIZES = {key: value for key, value in TINY_LLAMA.items() if key != "initializer_range"}


def gemma2():
    config = Gemma2Config(**SIZES, head_dim=16, pad_token_id=0, final_logit_softcapping=2.0)
    return Gemma2ForCausalLM, config


def cohere():
    return CohereForCausalLM, CohereConfig(**SIZES, pad_token_id=0, logit_scale=0.0625)


def cohere2():
    return Cohere2ForCausalLM, Cohere2Config(**SIZES, pad_token_id=0, logit_scale=0.5)


def granite():
    return GraniteForCausalLM, GraniteConfig(**SIZES, pad_token_id=0, logits_scaling=8.0)


def built(family):
    """A model of a family whose logits are of the size of a trained model's, about 10."""
    torch.manual_seed(0)
    kind, config = family()
    config.tie_word_embeddings = False
    model = kind(config).double().requires_grad_(False).eval()
    output_head(model).weight.normal_(0, 1.0)
    return model


def mean_nats(logits_of, rows: Rows) -> float:
    """Nats per loss-bearing token, row by row, of logits [T, V] of a row's ids."""
    nats = []
    for row in rows.rows:
        ids = torch.tensor(row.input_ids)
        trained = torch.tensor(row.loss_mask)[1:]
        logits = logits_of(ids[None])[0, :-1][trained]
        nats += F.cross_entropy(logits, ids[1:][trained], reduction="none").tolist()
    return sum(nats) / len(nats)


# Gemma 2 sums a row's attention in float32, and with AVX-512 in an order that depends on the padding.
@pytest.mark.parametrize(
    ("family", "atol"), [(gemma2, 1e-7), (cohere, 1e-9), (cohere2, 1e-9), (granite, 1e-9)]
)
def test_eval_losses_of_a_family_that_scales_its_logits_are_those_of_its_forward(family, atol):
    model, held_out = built(family), random_rows(5, seed=1)
    with torch.no_grad():
        expected = mean_nats(lambda ids: model(input_ids=ids).logits, held_out)
        unscaled = mean_nats(
            lambda ids: output_head(model)(model.base_model(input_ids=ids).last_hidden_state),
            held_out,
        )
    assert abs(expected - unscaled) > 0.1  # the scaling matters
    pack = Pack(model)
    check_head(pack)
    source = RowSource(held_out, 0, CPU)
    trainer = Trainer(pack, source, source, limits=ForwardLimits(max_tokens=50))
    assert trainer.eval_losses(None)[0] == pytest.approx(expected, abs=atol)


class Shifted(LlamaForCausalLM):
    """Does to its logits what we do not know of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.1 * output.logits.abs().amax(-1, keepdim=True) * (
            torch.arange(output.logits.shape[-1]) % 2
        )
        return output


def test_check_head_model_that_changes_its_logits_is_refused():
    config = tiny_model().config
    check_head(Pack(tiny_model()))
    model = Shifted(config).double().requires_grad_(False).eval()
    with pytest.raises(ValueError, match=r"Shifted: its logits must be its head .* differ by"):
        check_head(Pack(model))


def test_check_head_of_weights_that_are_not_finite_says_so():
    model = tiny_model()
    model.lm_head.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"logits must be finite, they are not in torch\.float64"):
        check_head(Pack(model))


def test_check_head_family_that_means_another_thing_by_a_known_key_is_refused():
    # HyperCLOVA X multiplies by the logits_scaling that Granite divides by.
    model = built(lambda: (HyperCLOVAXForCausalLM, HyperCLOVAXConfig(**SIZES, logits_scaling=0.5)))
    with pytest.raises(ValueError, match="HyperCLOVAXForCausalLM: its logits must be its head"):
        check_head(Pack(model))


def test_check_head_with_adapters_in_the_pack_looks_at_the_base_alone():
    bench = Bench(tiny_model())
    bench.enter("a")
    for view in bench.runs["a"].slot.parameters.values():
        view.fill_(float("nan"))
    check_head(bench.pack)


def test_logit_scaling_of_a_plain_model_is_none():
    logits = torch.randn(3, 5)
    assert torch.equal(logit_scaling(tiny_model())(logits), logits)


def packed_batch(pack: Pack, max_positions: int):
    """Nats and gradients of three adapters of a batch with unequal segments."""
    head = LossHead(pack)
    head.max_positions = max_positions
    source = RowSource(random_rows(12), 0, CPU)
    segments = [np.arange(4), np.array([4]), np.arange(5, 12)]
    nats = head.train_nats(source.batch(segments, max_positions), (0, 1, 2), [0.5, 2.0, 1.0])
    return nats, {
        (index, name): gradient.clone()
        for index, slot in pack.slots.items()
        for name, gradient in slot.gradients.items()
    }


def pack_of_three() -> Pack:
    model = tiny_model()
    pack = inject(model, [adapter(model, name, dropout=0.0) for name in "ade"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for slot in pack.slots.values():
            for view in slot.parameters.values():
                view.copy_(0.05 * torch.randn(view.shape, generator=generator).double())
    return pack


@pytest.mark.parametrize("max_positions", [1, 5, 64, 1 << 20])
def test_train_nats_any_chunk_size_gives_the_nats_and_gradients_of_the_whole(max_positions):
    pack = pack_of_three()
    nats, gradients = packed_batch(pack, max_positions)
    # The oracle: each segment's rows through the model's own forward, and plain autograd.
    model, rows = pack.model, random_rows(12)
    for index, scale, members in ((0, 0.5, range(4)), (1, 2.0, [4]), (2, 1.0, range(5, 12))):
        pack.activate([index])
        for slot in pack.slots.values():
            slot.zero_grad()
        total = 0.0
        for member in members:
            row = rows.rows[member]
            ids, trained = torch.tensor(row.input_ids), torch.tensor(row.loss_mask)[1:]
            logits = model(input_ids=ids[None]).logits[0, :-1][trained]
            loss = F.cross_entropy(logits, ids[1:][trained], reduction="sum")
            (scale * loss).backward()
            total += loss.item()
        assert nats[index].item() == pytest.approx(total, abs=1e-9)
        for name, gradient in pack.slots[index].gradients.items():
            torch.testing.assert_close(gradients[index, name], gradient, atol=1e-9, rtol=0)
            assert gradient.abs().max() > 0


def test_train_nats_of_a_batch_without_loss_is_zero_and_leaves_the_gradients():
    pack = pack_of_three()
    source = RowSource(random_rows(3), 0, CPU)
    batch = source.batch([np.array([], dtype=np.int64)])
    assert LossHead(pack).train_nats(batch, (0,), [1.0]).tolist() == [0.0]
    assert all(g.eq(0).all() for g in pack.slots[0].gradients.values())


# Counting


def positions_of_the_head(model) -> list[int]:
    """Filled with the number of positions of each call of the head."""
    calls: list[int] = []
    output_head(model).register_forward_pre_hook(
        lambda _, inputs: calls.append(math.prod(inputs[0].shape[:-1]))
    )
    return calls


def rows_of(num_tokens: int, trained: list[int]) -> Rows:
    """Rows of a length, of which the last so many tokens bear loss."""
    generator = np.random.default_rng(0)
    return Rows(
        [
            Row(generator.integers(5, 256, num_tokens), np.arange(num_tokens) >= num_tokens - count)
            for count in trained
        ]
    )


@pytest.mark.parametrize("training", [True, False])
def test_head_of_rows_with_one_trained_token_in_50_computes_no_more(training):
    model = tiny_model()
    pack = inject(model, [adapter(model, name) for name in "acd"])
    calls = positions_of_the_head(model)
    source, head = RowSource(rows_of(50, [1] * 30), 0, CPU), LossHead(pack)
    if training:
        head.train_nats(source.batch(np.split(np.arange(30), 3)), (0, 1, 2), [1.0] * 3)
    else:
        head.eval_nats(source.batch([np.arange(30)]), 0)
    assert sum(calls) == 30  # of 1,500


@pytest.mark.parametrize(
    ("trained", "most"),
    [
        ([10, 10, 10], 30),
        ([40, 38, 40], 1.1 * 118),
        ([1, 1, 49], 3 * LOSS_BLOCK),
        ([49, 1, 1], 49 + 2 * 49),
    ],
)
def test_head_of_unequal_segments_stays_within_the_padding_rule(trained, most):
    model = tiny_model()
    pack = inject(model, [adapter(model, name) for name in "acd"])
    calls = positions_of_the_head(model)
    batch = RowSource(rows_of(50, trained), 0, CPU).batch([np.array([k]) for k in range(3)])
    LossHead(pack).train_nats(batch, (0, 1, 2), [1.0] * 3)
    assert sum(trained) <= sum(calls) <= most


def test_head_never_holds_more_positions_at_once_than_it_may():
    model = tiny_model()
    pack = inject(model, [adapter(model, name) for name in "acd"])
    calls, head = positions_of_the_head(model), LossHead(pack)
    head.max_positions = 16
    source = RowSource(rows_of(50, [30, 20, 10]), 0, CPU)
    batch = source.batch([np.array([k]) for k in range(3)], head.max_positions)
    head.train_nats(batch, (0, 1, 2), [1.0] * 3)
    assert max(calls) <= 16
    assert sum(calls) >= 60


def test_decoder_runs_once_for_a_micro_step_of_the_whole_pack():
    bench = Bench(tiny_model())
    for name in NAMES:
        bench.enter(name, replace(RUN, global_batch_size=2, num_examples=20))
    calls = {"attention": 0, "adapted": 0, "head": 0}

    def count(kind: str, module) -> None:
        module.register_forward_hook(lambda *_: calls.update({kind: calls[kind] + 1}))

    layer = bench.model.model.layers[0]
    count("attention", layer.self_attn)
    count("adapted", layer.mlp.down_proj)
    count("head", output_head(bench.model))
    bench.micro_steps(4)
    assert bench.chosen == [NAMES] * 4
    assert [run.steps for run in bench.runs.values()] == [4] * 5
    assert calls == {"attention": 4, "adapted": 4, "head": 4}
