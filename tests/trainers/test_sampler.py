"""Sampling: the right distribution, and the same completions whoever shares the batch."""

import copy

import numpy as np
import pytest
import torch

from tests.trainers.test_loop import adapter_spec
from tests.trainers.tiny import tiny_model
from trainers.adapters import Pack, inject
from trainers.sampler import Prompt, Sampler, episode_key, gumbel_noise

END = 7


def sampler(pack, length=12, temperature=1.0) -> Sampler:
    return Sampler(
        pack, pad_id=0, end_ids=[END], max_completion_length=length, temperature=temperature
    )


def prompts(count, seed=0, longest=9):
    generator = np.random.default_rng(seed)
    return [
        Prompt(
            generator.integers(8, 256, int(generator.integers(2, longest))), episode_key(seed, i, 0)
        )
        for i in range(count)
    ]


def two_adapters():
    model = tiny_model()
    pack = inject(model, [adapter_spec(model, 4), adapter_spec(model, 2, seed=5)])
    generator = torch.Generator().manual_seed(1)
    for slot in pack.slots.values():
        for name, view in slot.parameters.items():
            if "lora_B" in name:
                view.copy_(torch.randn(view.shape, generator=generator, dtype=view.dtype) * 0.3)
    return pack


def test_gumbel_trick_draws_as_often_as_the_softmax_says():
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    keys_B = torch.tensor([episode_key(0, at, 0) for at in range(20_000)])
    drawn_B = (torch.log_softmax(logits_V, -1) + gumbel_noise(keys_B, 3, 4)).argmax(-1)
    found = drawn_B.bincount(minlength=4) / len(drawn_B)
    # four standard errors of a share
    for share, expected in zip(found.tolist(), torch.softmax(logits_V, -1).tolist(), strict=True):
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 20_000) ** 0.5)


def test_noise_differs_by_key_position_and_token():
    keys = torch.tensor([episode_key(0, 0, 0), episode_key(0, 0, 1), episode_key(1, 0, 0)])
    first, second = gumbel_noise(keys, 0, 50), gumbel_noise(keys, 1, 50)
    values = torch.cat([first.flatten(), second.flatten()])
    assert len(values.unique()) == len(values)
    assert torch.equal(first, gumbel_noise(keys, 0, 50))


def test_logps_and_entropy_are_those_of_the_policy():
    """Against the model's own forward over the whole sequence."""
    pack = two_adapters()
    asked = prompts(5)
    (found,) = sampler(pack, temperature=0.7).sample([(1, asked)])
    pack.activate([1])
    for prompt, completion in zip(asked, found, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt.ids, completion.ids]))[None]
        with torch.no_grad():
            logp_TV = torch.log_softmax(pack.model(input_ids=ids).logits[0] / 0.7, -1)
        own = logp_TV[len(prompt.ids) - 1 : -1]
        taken = own.gather(1, ids[0, len(prompt.ids) :, None])[:, 0]
        assert completion.logps == pytest.approx(taken.numpy(), abs=1e-4)
        entropy = -(own.exp() * own).sum(-1).mean()
        assert completion.entropy == pytest.approx(float(entropy), abs=1e-4)


def test_completion_ends_at_its_first_end_token_or_at_the_limit():
    model = tiny_model()
    (found,) = sampler(Pack(model), length=40).sample([(None, prompts(60))])
    assert {c.is_whole for c in found} == {True, False}
    for completion in found:
        ends = np.flatnonzero(completion.ids == END).tolist()
        assert ends == ([len(completion.ids) - 1] if completion.is_whole else [])
        assert len(completion.ids) == len(completion.logps) <= 40
        assert completion.is_whole or len(completion.ids) == 40


def test_adapter_samples_the_same_alone_beside_another_and_in_small_batches():
    pack = two_adapters()
    first, second = prompts(7), prompts(5, seed=1)
    alone = [sampler(pack).sample([(0, first)])[0], sampler(pack).sample([(1, second)])[0]]
    together = sampler(pack).sample([(0, first), (1, second)])
    small = sampler(pack)
    small.cached_tokens = 3 * (8 + 12)
    in_parts = small.sample([(0, first), (1, second)])
    for found in (together, in_parts):
        for part, own in zip(found, alone, strict=True):
            assert [c.ids.tolist() for c in part] == [c.ids.tolist() for c in own]
    assert [c.ids.tolist() for c in alone[0][:5]] != [c.ids.tolist() for c in alone[1]]


def test_adapters_sample_what_their_own_model_would():
    """The pack's two adapters against models with each adapter merged."""
    pack = two_adapters()
    asked = prompts(6)
    found = sampler(pack).sample([(0, asked), (1, asked)])
    for index, slot in pack.slots.items():
        assert slot.spec is not None
        merged = copy.deepcopy(tiny_model())
        for name, layer in pack.layers.items():
            size = layer.size
            A = slot.parameters[f"base_model.model.{name}.lora_A.weight"]
            B = slot.parameters[f"base_model.model.{name}.lora_B.weight"]
            merged.get_submodule(name).weight.data += slot.spec.scaling(size) * (B @ A)
        (own,) = sampler(Pack(merged)).sample([(None, asked)])
        assert [c.ids.tolist() for c in found[index]] == [c.ids.tolist() for c in own]


def test_batch_without_room_is_halved_and_samples_the_same(monkeypatch):
    pack = two_adapters()
    asked = prompts(8)
    expected = [c.ids.tolist() for c in sampler(pack).sample([(0, asked)])[0]]
    cramped, sizes = sampler(pack), []
    batch = cramped._batch

    def short(slots, rows):
        count = sum(map(len, rows))
        sizes.append(count)
        if count > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return batch(slots, rows)

    monkeypatch.setattr(cramped, "_batch", short)
    (found,) = cramped.sample([(0, asked)])
    assert [c.ids.tolist() for c in found] == expected
    assert sizes == [8, 4, 2, 2, 2, 2]
