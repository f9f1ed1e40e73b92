"""Shapes against published counts."""

import csv
import json

import pytest

from search_spaces.architecture import LinearShape, ModelShape, UnknownArchitectureError

DOCTRINE_ALL_LINEAR = {
    "Llama-3.2-1B": 704_512,
    "Llama-3.2-3B": 1_519_616,
    "Llama-3.1-8B": 2_621_440,
    "Llama-3.1-70B": 12_943_360,
    "Qwen3-0.6B": 630_784,
    "Qwen3-1.7B": 1_089_536,
    "Qwen3-4B": 2_064_384,
    "Qwen3-8B": 2_727_936,
    "Qwen3-14B": 4_014_080,
    "Mistral-7B-v0.3": 2_621_440,
    "gemma-2-9b": 3_376_128,
}
DOCTRINE_MOE = {"Qwen3-30B-A3B": 5_750_784, "Mixtral-8x7B": 7_405_568, "gpt-oss-20b": 3_262_464}
TABLE_NAMES = {
    "Qwen/Qwen3-4B-Instruct-2507": "Qwen3-4B",
    "Qwen/Qwen3-8B-Base": "Qwen3-8B",
    "meta-llama/Llama-3.1-8B": "Llama-3.1-8B",
    "meta-llama/Llama-3.1-8B-Instruct": "Llama-3.1-8B",
    "meta-llama/Llama-3.2-1B": "Llama-3.2-1B",
    "meta-llama/Llama-3.3-70B-Instruct": "Llama-3.1-70B",
}


@pytest.mark.parametrize(("name", "per_rank"), DOCTRINE_ALL_LINEAR.items())
def test_lora_params_all_linear_matches_doctrine_count(model_shape, name, per_rank):
    shape = model_shape(name)
    assert shape.lora_params(1, ("attn", "mlp")) == per_rank
    assert shape.lora_params(7, ("attn", "mlp")) == 7 * per_rank
    assert shape.lora_params(1, ("unembed",)) == shape.hidden_size + shape.vocab_size


@pytest.mark.parametrize(("name", "per_rank"), DOCTRINE_MOE.items())
def test_lora_params_moe_multiple_of_active_matches_doctrine_count(model_shape, name, per_rank):
    shape = model_shape(name)
    rank = 3 * shape.num_active_experts
    assert shape.lora_params(rank, ("attn", "experts")) == rank * per_rank
    assert shape.lora_params(rank, ("mlp",)) == 0


@pytest.mark.parametrize(("model", "name"), TABLE_NAMES.items())
def test_lora_params_dense_rows_match_published_table(shared, model_shape, model, name):
    with (shared / "reference" / "lora_params_per_rank.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["model"] == model)
    shape = model_shape(name)
    for component in ("mlp", "attn", "unembed"):
        assert shape.lora_params(1, (component,)) == int(row[component])


@pytest.mark.parametrize(
    ("rank", "components", "millions"),
    [
        (256, ("mlp", "unembed"), 487),
        (256, ("attn", "unembed"), 252),
        (256, ("attn", "mlp", "unembed"), 705),
        (128, ("mlp", "unembed"), 243),
    ],
)
def test_lora_params_llama31_8b_matches_blog_totals(model_shape, rank, components, millions):
    params = model_shape("Llama-3.1-8B").lora_params(rank, components)
    assert round(params / 1e6) == millions


@pytest.mark.parametrize(
    ("name", "millions"),
    [("Llama-3.1-8B", 8030), ("Qwen3-8B", 8191), ("Mixtral-8x7B", 46703), ("gpt2", 124)],
)
def test_num_params_matches_published_size(model_shape, name, millions):
    assert round(model_shape(name).num_params / 1e6) == millions


def test_lora_params_tiny_qwen3_uses_explicit_head_dim(tiny_config):
    # FIELD_CASES B14: 19,456 and not the naive 16,384.
    shape = ModelShape.from_config(tiny_config("qwen3", head_dim=32))
    assert shape.lora_params(8, ("attn", "mlp")) == 19_456


def test_lora_params_tiny_families_match_field_counts(tiny_config):
    # FIELD_CASES B12 and B13, rank 8, all-linear.
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}
    assert ModelShape.from_config(gpt2).lora_params(8, ("attn", "mlp")) == 16_384
    for model_type, count in (("phi3", 13_312), ("gpt_neox", 12_288)):
        shape = ModelShape.from_config(tiny_config(model_type))
        assert shape.lora_params(8, ("attn", "mlp")) == count
    falcon = ModelShape.from_config(tiny_config("falcon"))
    assert falcon.lora_params(8, ("attn", "mlp")) == 14_848
    mpt = {"model_type": "mpt", "d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 256}
    assert ModelShape.from_config(mpt).lora_params(8, ("attn", "mlp")) == 16_384


def test_lora_params_more_active_experts_than_rank_floors_at_one(model_shape):
    # FIELD_CASES B05: the rule alone would give 0.
    shape = model_shape("Qwen3-30B-A3B")
    assert shape.lora_params(1, ("experts",)) == shape.lora_params(8, ("experts",))
    assert shape.lora_params(1, ("experts",)) == 48 * 128 * (2 * 2048 + 3 * 768)


def test_lora_params_rank_zero_refused(tiny_llama):
    with pytest.raises(ValueError, match="lora_rank must be >= 1, got 0"):
        tiny_llama.lora_params(0)


def test_from_config_folder_file_and_dict_agree(tmp_path, tiny_config, tiny_llama):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama")))
    assert ModelShape.from_config(tmp_path) == tiny_llama
    assert ModelShape.from_config(str(tmp_path / "config.json")) == tiny_llama


def test_from_config_absent_broken_or_wrong_file_refused(tmp_path, tiny_config):
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        ModelShape.from_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        ModelShape.from_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        ModelShape.from_config(tmp_path)
    with pytest.raises(ValueError, match=r"hidden_size in config\.json must be an integer >= 1"):
        ModelShape.from_config(tiny_config("llama", hidden_size=0))
    with pytest.raises(ValueError, match="must hold a model_type"):
        ModelShape.from_config({})


def test_from_config_unknown_type_names_the_meta_device():
    with pytest.raises(UnknownArchitectureError, match=r"'mamba'.*meta device"):
        ModelShape.from_config({"model_type": "mamba"})


def test_from_config_moe_with_dense_layers_counts_both(tiny_config):
    shape = ModelShape.from_config(
        tiny_config("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[1])
    )
    counts = {linear.name: linear.count for linear in shape.linears}
    assert counts["gate_proj"] == 4
    assert counts["experts.down_proj"] == 2 * 128


def test_from_config_gemma3_reads_nested_text_config(model_shape):
    shape = model_shape("gemma-3-4b")
    assert (shape.hidden_size, shape.num_layers, shape.tied_head) == (2560, 34, True)
    assert shape.max_position_embeddings == 131_072


def test_resolve_target_default_leaves_out_absent_components(tiny_llama, tiny_moe):
    everything = ["attn", "mlp", "experts", "unembed"]
    assert tiny_llama.normalize_target(everything) == ("attn", "mlp", "unembed")
    assert tiny_moe.normalize_target("attn+mlp+experts+unembed") == ("attn", "experts", "unembed")
    assert tiny_llama.resolve_target(everything) == tiny_llama.linears


def test_resolve_target_absent_component_by_name_refused(tiny_llama, tiny_moe):
    with pytest.raises(ValueError, match="'experts' matches no layer of this llama model"):
        tiny_llama.resolve_target(["attn", "experts"])
    with pytest.raises(ValueError, match="'mlp' matches no layer of this qwen3_moe model"):
        tiny_moe.resolve_target("mlp")


def test_resolve_target_module_names_select_those(model_shape, tiny_llama):
    names = [linear.name for linear in tiny_llama.resolve_target(["v_proj", "q_proj"])]
    assert names == ["q_proj", "v_proj"]
    gpt2 = model_shape("gpt2").resolve_target(["c_proj"])
    assert [(linear.name, linear.component) for linear in gpt2] == [
        ("attn.c_proj", "attn"),
        ("mlp.c_proj", "mlp"),
    ]
    assert tiny_llama.lora_params(8, ["q_proj"]) == 8 * 2 * (64 + 64)


def test_resolve_target_unknown_name_refused_with_nearest(tiny_llama, model_shape):
    with pytest.raises(ValueError, match=r"'q_prj' matches no layer; did you mean 'q_proj'\?"):
        tiny_llama.resolve_target(["q_prj"])
    # FIELD_CASES B13: Llama names on Phi-3.
    with pytest.raises(ValueError, match="'q_proj' matches no layer"):
        model_shape("Phi-3-mini-4k").resolve_target(["q_proj", "o_proj"])
    with pytest.raises(ValueError, match="at least one layer"):
        tiny_llama.resolve_target([])


def test_max_useful_lora_rank_is_smallest_side(model_shape):
    assert model_shape("Llama-3.1-8B").max_useful_lora_rank() == 1024
    assert model_shape("Llama-3.1-8B").max_useful_lora_rank(["q_proj", "mlp"]) == 4096
    # An expert's rank is nominal / 8 active.
    assert model_shape("Qwen3-30B-A3B").max_useful_lora_rank("experts") == 768 * 8


def test_from_linears_given_fields_counts_like_config(tiny_llama):
    fields = {k: v for k, v in vars(tiny_llama).items() if k != "linears"}
    assert ModelShape.from_linears(tiny_llama.linears, **fields) == tiny_llama


def test_from_linears_experts_without_active_count_refused():
    expert = LinearShape(
        name="experts.w", in_features=4, out_features=4, component="experts", count=8
    )
    with pytest.raises(ValueError, match="num_active_experts >= 1"):
        ModelShape.from_linears(
            [expert],
            model_type="x",
            hidden_size=4,
            num_layers=1,
            vocab_size=8,
            tied_head=False,
            embedding_params=32,
            other_params=0,
        )


def test_linear_shape_zero_size_refused():
    with pytest.raises(ValueError, match="must be >= 1"):
        LinearShape(name="q", in_features=0, out_features=4, component="attn", count=1)
