"""Layers that are computed again: the same losses and gradients, less held."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.trainers.packs import NAMES, Bench
from tests.trainers.tiny import random_rows, tiny_model
from trainers.decoder import decoder_layers
from trainers.gradient_checkpointing import recompute_layers


def trained(again: bool):
    model = tiny_model()
    if again:
        recompute_layers(model)
    bench = Bench(model, random_rows(40), max_tokens=3 * 24)
    for name in NAMES:
        bench.enter(name)
    bench.train()
    return {name: [*one.train, *one.held_out] for name, one in bench.losses.items()}


def test_recompute_layers_a_mixed_pack_with_dropout_loses_the_same():
    # The head's chunks activate other segments before the backward pass computes the layers again.
    kept = trained(again=False)
    for name, losses in trained(again=True).items():
        assert losses == pytest.approx(kept[name], abs=1e-12)


def test_recompute_layers_a_layer_runs_twice_in_a_step_and_once_in_an_evaluation():
    model, calls = tiny_model(), []
    _, layers = decoder_layers(model)
    for layer in layers:
        layer.input_layernorm.register_forward_pre_hook(lambda *_: calls.append(1))
    recompute_layers(model)
    bench = Bench(model, random_rows(40))  # everything fits into one forward
    bench.enter("a")
    bench.trainer.evaluate(bench.runs["a"], lambda run, row: True)
    assert len(calls) == 2 * 1
    calls.clear()
    bench.micro_step()
    assert len(calls) == 2 * 2


def test_recompute_layers_every_adapter_matrix_gets_a_gradient():
    """Field case D11: frozen embeddings give a first layer whose input needs no gradient."""
    model = tiny_model()
    recompute_layers(model)
    bench = Bench(model, random_rows(40))
    run = bench.enter("a")
    with torch.no_grad():
        for name, view in run.slot.parameters.items():
            if ".lora_B." in name:  # zero at the start, where A gets no gradient
                view.fill_(0.01)
    bench.micro_step()
    moments = {name: bool(first.any()) for name, (first, _) in run.slot.moments.items()}
    assert all(moments.values())
    assert len(moments) == 2 * (2 * 7 + 1)


def test_decoder_layers_of_gpt2_are_found_by_their_number():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=64))
    name, layers = decoder_layers(model)
    assert (name, len(layers)) == ("transformer.h", 3)
