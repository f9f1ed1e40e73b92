"""Packed sequences train what their examples train alone; batches of similar length."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from tests.trainers.packs import CPU, RUN, Bench, adapter
from tests.trainers.tiny import random_rows, tiny_model
from tests.trainers.trials import trial
from trainers.adapters import Pack
from trainers.batches import RowSource
from trainers.data import prepare_data
from trainers.data.sequence_packing import PackedSet, packed_order
from trainers.data.token_set import TokenizedSet
from trainers.head import LossHead, check_packing
from trainers.sft_trainer import train_trial


def as_set(rows):
    """Test rows as a tokenized set."""
    counts = rows.loss_token_counts
    return TokenizedSet(
        input_ids=np.concatenate([row.input_ids for row in rows.rows]).astype(np.int32),
        loss_mask=np.concatenate([row.loss_mask for row in rows.rows]),
        offsets=np.cumsum([0, *rows.lengths]),
        row_loss_tokens=counts,
        row_loss_bytes=3 * counts,
    )


def as_packed(rows, seq_len=64):
    plain = as_set(rows)
    return PackedSet(plain, *packed_order(plain.lengths, seq_len))


@pytest.fixture
def pack():
    model = tiny_model()
    pack = Pack(model)
    pack.enter(adapter(model, "a"))
    return pack


def nats_and_gradients(pack, source):
    """Summed nats of all rows of a source, and the adapter's gradients of them."""
    slot = pack.slots[0]
    slot.zero_grad()
    batch = source.batch([np.arange(len(source))])
    nats = LossHead(pack).train_nats(batch, (0,), [1.0])
    return float(nats[0]), torch.cat([grad.flatten() for grad in slot.grads])


def test_packed_sequences_have_the_loss_and_gradients_of_their_rows_alone(pack):
    rows = random_rows(30)
    packed = as_packed(rows)
    assert len(packed) < 12  # several rows in each
    alone = nats_and_gradients(pack, RowSource(as_set(rows), 0, CPU))
    together = nats_and_gradients(pack, RowSource(packed, 0, CPU))
    assert together[0] == pytest.approx(alone[0], rel=1e-9)
    assert float(alone[1].abs().max()) > 1
    assert torch.allclose(together[1], alone[1], rtol=1e-9, atol=1e-12)


def test_packed_sequences_without_positions_would_lose_other_nats(pack):
    """The test above can fail: attention across examples changes the loss."""
    packed = as_packed(random_rows(30))
    source = RowSource(packed, 0, CPU)
    batch = source.batch([np.arange(len(source))])
    kept = LossHead(pack).eval_nats(batch, 0)
    mixed = LossHead(pack).eval_nats(type(batch)(batch.rows_B, batch.ids_BT, batch.loss), 0)
    assert abs(float(mixed - kept)) > 1


def test_packed_batch_counts_are_those_of_the_rows():
    rows = random_rows(30)
    batch = RowSource(as_packed(rows), 0, CPU).batch([np.arange(7)])
    counts = as_packed(rows).loss_token_counts[:7]
    assert (batch.loss.targets_M >= 0).sum() == counts.sum()


def test_check_packing_a_model_that_heeds_positions_passes(pack):
    check_packing(pack)


def test_check_packing_a_model_without_positions_is_refused():
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4)
    model = BloomForCausalLM(config).double().requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.mul_(5)
    with pytest.raises(ValueError, match=r"packing: Bloom.* attends across them; set packing"):
        check_packing(Pack(model))


def grouped_order(lengths, seed, start, stop, size):
    """Rows start..stop of a set of these lengths, in batches of similar length."""
    rows = SimpleNamespace(lengths=lengths, loss_token_counts=lengths)
    return RowSource(rows, 0, CPU).order(seed, start, stop, size)


def orders(lengths, size, epochs):
    """Every batch of some epochs, cut as the loop cuts them."""
    total = len(lengths) * epochs
    cuts = [*range(0, total, size), total]
    return [grouped_order(lengths, 3, start, stop, size) for start, stop in pairwise(cuts)]


@pytest.mark.parametrize(("num_rows", "size"), [(100, 8), (96, 8), (5, 8), (1, 1), (8, 3)])
def test_grouped_order_every_epoch_holds_each_row_once(num_rows, size):
    lengths = np.random.default_rng(0).integers(2, 50, num_rows)
    seen = np.concatenate(orders(lengths, size, 4))
    for epoch in range(4):
        part = seen[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(part.tolist()) == list(range(num_rows))


def test_grouped_order_batches_are_of_similar_length_in_random_order():
    lengths = np.random.default_rng(0).integers(2, 1000, 4096)
    batches = orders(lengths, 16, 1)
    spreads = [np.ptp(lengths[batch]) for batch in batches]
    assert np.mean(spreads) < 40  # 1,000 lengths over 50 batches; 880 in a random order
    means = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(range(len(means)), means)[0, 1]) < 0.2
    assert not np.array_equal(
        np.concatenate(batches), np.concatenate(orders(lengths, 16, 2))[4096:]
    )


def test_grouped_order_any_cut_is_the_same_stretch_of_the_whole():
    lengths = np.random.default_rng(0).integers(2, 50, 37)
    whole = grouped_order(lengths, 3, 0, 111, 4)
    for start, stop in ((0, 4), (36, 40), (40, 44), (72, 76), (108, 111)):
        assert np.array_equal(grouped_order(lengths, 3, start, stop, 4), whole[start:stop])


def test_run_grouped_by_length_trains_the_rows_that_the_order_names():
    rows = random_rows(40)
    spec = replace(RUN, num_examples=40, global_batch_size=8, group_by_length=True)
    bench = Bench(tiny_model(), rows)
    run, taken = bench.enter("a", spec), []
    while bench.micro_step():
        taken.append(run.batch_rows.copy())
    expected = grouped_order(rows.lengths, spec.seed, 0, 40, 8)
    assert np.array_equal(np.concatenate(taken), expected)


@pytest.mark.parametrize("packing", [False, True])
def test_trial_of_an_epoch_trains_the_tokens_that_the_audit_counted(packing, data_file, tmp_path):
    spec = trial(data_file, tmp_path / "trial")
    data = replace(spec.data, packing=packing)
    prepared = prepare_data(data)
    assert prepared.audit == prepare_data(spec.data).audit
    assert (len(prepared.train) < prepared.audit.num_train_rows / 2) == packing
    spec = replace(spec, data=data, num_examples=len(prepared.train), eval_every=1000)
    last = train_trial(spec, lambda row: True).rows[-1]
    assert last["loss_tokens"] == prepared.audit.num_train_loss_tokens
    assert last["tokens"] == prepared.audit.num_train_tokens
    assert last["steps"] == -(-len(prepared.train) // spec.candidate.global_batch_size)
