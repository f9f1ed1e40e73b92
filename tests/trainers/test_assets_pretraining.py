"""The script that pretrains the bases: shapes, learning rates, the kept weights, resuming, the corpus."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.assets import pretraining
from trainers.assets.corpus import own_library, seen_files, texts, unseen_files
from trainers.assets.make_tiny_llama import model_config, peak_learning_rate, recipe_of
from trainers.assets.pretraining import CHOOSING_WINDOWS, cpu_recipe, held_out_loss, pretrain

ASSETS = Path(pretraining.__file__).parent
RECIPE = replace(cpu_recipe(10 * 4096, 3e-3), check_steps=2)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )


def random_stream(num_tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(64, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def weights(model: LlamaForCausalLM) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_model_config_default_is_the_shipped_bases():
    shipped = json.loads((ASSETS / "tiny-llama" / "config.json").read_text())
    ours = model_config().to_dict()
    same = {key: value for key, value in shipped.items() if key in ours and key != "dtype"}
    same.pop("transformers_version")
    same.pop("architectures")
    assert {key: ours[key] for key in same} == same
    assert len(same) > 15


# By hand: embedding 3072 H; a layer 2 H^2 (q, o) + 2 H (32 kv) + 3 H m + 2 H; the last norm H.
@pytest.mark.parametrize(
    ("hidden", "kv_heads", "mlp", "num_params"),
    [
        (192, 2, 512, 2_164_416),  # what the shipped base's README says
        (256, 2, 704, 786_432 + 4 * (131_072 + 32_768 + 540_672 + 512) + 256),
        (320, 5, 832, 983_040 + 4 * (204_800 + 102_400 + 798_720 + 640) + 320),
        (1024, 8, 2752, 3_145_728 + 4 * (2_097_152 + 524_288 + 8_454_144 + 2_048) + 1_024),
    ],
)
def test_model_config_of_a_width_has_the_parameters_of_its_shape(hidden, kv_heads, mlp, num_params):
    config = model_config(hidden)
    assert (config.num_key_value_heads, config.intermediate_size) == (kv_heads, mlp)
    assert config.num_attention_heads * 32 == hidden
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == num_params


@pytest.mark.parametrize("hidden", [0, 16, 200])
def test_model_config_of_a_width_without_whole_heads_is_refused(hidden):
    with pytest.raises(ValueError, match=f"multiple of 32, got {hidden}"):
        model_config(hidden)


def test_peak_learning_rate_falls_above_the_shipped_width_alone():
    assert [peak_learning_rate(h) for h in (96, 192)] == [3e-3, 3e-3]
    assert peak_learning_rate(1024) == pytest.approx(5.625e-4)


def test_recipe_of_auto_without_cuda_is_the_cpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert recipe_of("auto", 192, None) == cpu_recipe(5_000_000, 3e-3)


def test_learning_rate_of_the_shipped_run_warms_up_over_100_steps():
    rates = [pretraining.learning_rate(step, 1220, 3e-3) for step in (0, 99, 100, 1219)]
    assert rates == pytest.approx([3e-5, 3e-3, 3e-3, 6e-5], rel=1e-2)


def test_pretrain_with_stop_after_ends_early_with_the_best_weights():
    # Random tokens, few enough to be learnt by heart: the held-out loss rises from some step on.
    train, held_out = random_stream(2_100, 1), random_stream(402 * 1024 + 2, 2)
    recipe = replace(
        RECIPE, num_tokens=60 * 4096, peak_learning_rate=3e-2, stop_after=2, check_steps=4
    )
    start, model = tiny_model(), tiny_model()
    loss_before = held_out_loss(start, held_out, CHOOSING_WINDOWS, recipe)
    num_tokens = pretrain(model, train, held_out, recipe, Path("/nowhere"))
    loss = held_out_loss(model, held_out, CHOOSING_WINDOWS, recipe)
    last = tiny_model()
    pretrain(
        last, train, held_out, replace(recipe, stop_after=None, check_steps=999), Path("/nowhere")
    )
    assert 0 < num_tokens < 60 * 4096
    assert num_tokens % (4 * 4096) == 0
    assert loss < held_out_loss(last, held_out, CHOOSING_WINDOWS, recipe) - 0.1
    assert loss < loss_before + 0.1
    assert math.log(64) - 0.05 < loss  # nothing random can be predicted


def test_pretrain_resumed_after_a_kill_gives_the_weights_of_one_run(tmp_path, monkeypatch):
    train, held_out = random_stream(20_000, 1), random_stream(4 * 1024, 2)
    whole, killed = tiny_model(), tiny_model()
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    assert pretrain(whole, train, held_out, RECIPE, tmp_path / "whole") == 10 * 4096
    step, num_steps = pretraining.train_step, iter(range(5))

    def dying(*args):
        if next(num_steps) == 4:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(pretraining, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        pretrain(killed, train, held_out, RECIPE, tmp_path / "killed")
    monkeypatch.setattr(pretraining, "train_step", step)
    resumed = tiny_model()
    pretrain(resumed, train, held_out, RECIPE, tmp_path / "killed")
    assert torch.equal(weights(resumed), weights(whole))
    assert not torch.equal(weights(killed), weights(whole))


def test_corpus_of_a_given_library_is_split_by_name(tmp_path):
    root = own_library()
    names = ["ast.py", "json/decoder.py", "pydoc_data/topics.py", "argparse.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((root / name).read_bytes())
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_ast.py").write_text("def test_it(): pass\n")
    seen, unseen = seen_files(tmp_path), unseen_files(tmp_path)
    own = {p.relative_to(root).as_posix() for p in seen_files()}
    assert sorted(p.relative_to(tmp_path).as_posix() for p in seen + unseen) == sorted(names)
    assert {p.relative_to(tmp_path).as_posix() for p in seen} == own & set(names)
    from pydoc_data.topics import topics

    assert set(topics.values()) <= set(texts(seen))
