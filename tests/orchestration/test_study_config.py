"""study.yaml, the presets, and the arms that they give."""

from pathlib import Path

import pytest
import yaml

from orchestration.cli import main
from orchestration.config import ConfigError, load_config
from orchestration.exit_codes import BAD_INPUT
from orchestration.planning import make_plan
from orchestration.studies.arms import CURVE_KINDS, make_arms
from orchestration.studies.config import (
    FOLDER,
    KINDS,
    PRESETS,
    StudyConfig,
    load_study,
    preset_values,
    write_study_yaml,
)
from search_spaces.candidate import Candidate
from trainers.paths import read_json

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "trainers" / "assets" / "tiny-llama"
FUNCTIONS = ROOT / "trainers" / "assets" / "demo" / "functions.jsonl"


def study(kind: str = "lr-ratio", **keys) -> StudyConfig:
    return load_study(kind, "smoke", None, **keys)


def arms(kind: str = "lr-ratio", **keys):
    config = study(kind, **keys)
    return make_arms(kind, config, make_plan(config))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_presets_of_every_kind_are_configs(kind, preset):
    model = {"model": str(BASE), "data": str(FUNCTIONS)}
    config = load_study(kind, preset, None, **model)
    assert config.model == str(BASE)
    assert config.scheduler == "fifo"


def test_studies_in_docs_are_configs():
    for path in ROOT.glob("docs/studies/*/study.yaml"):
        kind = read_json(path.with_name("results.json"))["kind"]
        assert load_study(kind, None, path).model


def test_presets_know_no_kind_that_is_not_there():
    for preset in PRESETS:
        sections = yaml.safe_load((FOLDER / f"{preset}.yaml").read_text())
        assert set(sections) - {"all"} <= set(KINDS)


def test_preset_cluster_without_a_model_asks_for_one():
    with pytest.raises(ConfigError, match="preset cluster: model: Field required"):
        load_study("lr-ratio", "cluster", None)


def test_study_file_wins_over_its_preset(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("examples: 64\nseeds: [7, 9]\n")
    config = load_study("lr-ratio", "smoke", path)
    assert (config.examples, config.seed_list) == (64, (7, 9))
    assert config.seq_len == preset_values("lr-ratio", "smoke")["seq_len"]


def test_study_without_file_or_preset_says_what_it_needs():
    with pytest.raises(ConfigError, match=r"--preset \(smoke, laptop, gpu, cluster\)"):
        load_study("rank", None, None)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"scheduler": "asha"}, "a study decides scheduler itself"),
        ({"seed": 3, "num_candidates": 2}, "a study decides num_candidates, seed itself"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": [True]}, "seeds must not be true or false, got [True]"),
        ({"loads": [True, 2]}, "loads must not be true or false, got [True, 2]"),
        (
            {"full_learning_rate": {"low": 1e-3, "high": 1e-4, "num": 3}},
            "full_learning_rate must hold 0 < low",
        ),
        ({"full_learning_rate": -1.0}, "full_learning_rate must be a finite number > 0"),
        ({"tolerence_frac": 0.1}, "did you mean 'tolerance_frac'?"),
        ({"tolerance_frac": 0.0}, "tolerance_frac"),
    ],
)
def test_study_keys_out_of_range_are_refused(keys, said):
    with pytest.raises(ConfigError) as error:
        study(**keys)
    assert said in str(error.value)


def test_study_yaml_written_and_read_is_the_same_study(tmp_path):
    config = study(seeds=[0, 4], name="x")
    write_study_yaml(tmp_path / "study.yaml", config)
    again = load_study("lr-ratio", None, tmp_path / "study.yaml")
    assert again == config.model_copy(update={"name": None})


def test_sweep_yaml_does_not_take_the_keys_of_a_study(tmp_path):
    (tmp_path / "sweep.yaml").write_text("model: m\ndata: d\nseeds: 3\n")
    with pytest.raises(ConfigError, match="unknown key 'seeds'"):
        load_config(tmp_path / "sweep.yaml")


def test_arms_of_lr_ratio_are_full_fine_tuning_and_every_rank_and_alpha():
    config = load_study("lr-ratio", "laptop", None, lora_rank=[2, 4], lora_alpha=[8, 32])
    found = make_arms("lr-ratio", config, make_plan(config))
    assert [arm.label for arm in found] == [
        "FullFT",
        "r2 alpha 8",
        "r4 alpha 8",
        "r2 alpha 32",
        "r4 alpha 32",
    ]
    full, lora = found[0], found[1]
    assert full.full_finetune
    assert full.trained_params == 2_164_416  # the README of the shipped base
    assert lora.trained_params == 2 * (13_568 + 3_264)  # 2 x (in + out), by hand: layers and head
    assert full.grid[4] == pytest.approx(2000 / 192 * 1e-4, rel=1e-5)
    assert [round(b / a, 4) for a, b in zip(full.grid, full.grid[1:], strict=False)] == [1.7783] * 8
    assert lora.grid[4] == pytest.approx(10 * full.grid[4], rel=1e-5)
    assert lora.grid[-1] / lora.grid[0] == pytest.approx(100, rel=1e-4)


def test_arms_of_a_given_grid_keep_its_learning_rates():
    found = arms(
        full_learning_rate=[2e-3, 1e-3], learning_rate={"low": 1e-3, "high": 4e-3, "num": 3}
    )
    assert found[0].grid == (1e-3, 2e-3)
    assert found[1].grid == (1e-3, 2e-3, 4e-3)


def test_arms_of_layers_have_equal_parameters():
    found = arms("layers", lora_rank=8)
    named = [arm.label.split()[-1] for arm in found]
    assert named == ["attn", "mlp", "attn+mlp", "attn+mlp+unembed"]
    assert ["+".join(arm.template.target) for arm in found] == [
        "attn",
        "mlp",
        "attn+mlp",
        "attn+mlp+unembed",
    ]
    budget = found[-1].trained_params
    per_rank = {"attn": 5_120, "mlp": 8_448, "attn+mlp": 13_568, "attn+mlp+unembed": 16_832}
    for arm in found:
        own = per_rank["+".join(arm.template.target)]
        assert arm.trained_params == own * arm.template.lora_rank
        assert abs(arm.trained_params - budget) <= own / 2


def test_arms_of_batch_pair_each_batch_with_its_own_full_arm():
    found = arms("batch", global_batch_size=[4, 8])
    labels = ["FullFT batch 4", "FullFT batch 8", "r4 alpha 32 batch 4", "r4 alpha 32 batch 8"]
    assert [arm.label for arm in found] == labels


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        (
            "lr-ratio",
            {"global_batch_size": [4, 8]},
            r"global_batch_size must be one value .*\[4, 8\]",
        ),
        ("rank", {"lora_alpha": [8, 32]}, "lora_alpha must be one value"),
        ("layers", {"target": [["attn"], ["mlp"]]}, "target must be one value"),
        ("lr-ratio", {"dropout": [0.0, 0.1]}, "dropout must be one value"),
    ],
)
def test_arms_with_several_values_of_a_fixed_key_are_refused(kind, keys, said):
    with pytest.raises(ValueError, match=said):
        arms(kind, **keys)


@pytest.mark.parametrize("kind", CURVE_KINDS)
def test_arms_hold_their_own_points_and_no_others(kind):
    found = arms(kind)
    for arm in found:
        point = Candidate.from_dict(arm.candidate(arm.grid[0], 1).to_dict())
        assert [other.label for other in found if other.holds(point)] == [arm.label]


def test_rl_study_is_of_rewards_and_decides_its_method_itself(tmp_path):
    config = load_study("rl", "smoke", None)
    assert (config.method, config.num_generations) == ("rl", 4)
    labels = [arm.label for arm in arms("rl", lora_rank=[1, 4])]
    assert labels == ["FullFT", "r1 alpha 32", "r4 alpha 32"]
    path = tmp_path / "study.yaml"
    path.write_text("method: rl\n")
    with pytest.raises(ConfigError, match="a study decides method itself"):
        load_study("rl", "smoke", path)
    path.write_text("reward: exact_match\n")
    with pytest.raises(ConfigError, match="reward is for method: rl"):
        load_study("lr-ratio", "smoke", path)


@pytest.mark.parametrize(
    "words",
    [
        ["x.yaml", "--preset", "smoke"],
        ["--preset", "smoke", "x.yaml"],
        ["--preset=smoke", "x.yaml"],
    ],
)
def test_study_yaml_may_stand_before_or_behind_the_flags(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "lr-ratio", *words]) == BAD_INPUT
    assert "x.yaml: no such file" in capsys.readouterr().err


def test_study_with_two_files_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["study", "lr-ratio", "x.yaml", "--preset", "smoke", "y.yaml"])
    assert "unrecognized arguments: y.yaml" in capsys.readouterr().err
