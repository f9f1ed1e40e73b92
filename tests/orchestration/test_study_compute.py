"""The compute study: what is measured when, and what planted costs say."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from orchestration.studies.compute import (
    GPU,
    LAPTOP,
    SHIPPED,
    SMOKE,
    ComputeRecipe,
    CostModel,
    arms_of,
    random_llama,
    run_compute,
)
from orchestration.studies.compute_findings import findings
from orchestration.studies.compute_run import RECIPES, recipe_of
from orchestration.studies.config import PRESETS, load_study
from search_spaces.architecture import ModelShape
from trainers.paths import read_json_lines

RECIPE = ComputeRecipe(
    models=(SHIPPED, random_llama(128, 1, 300)),
    ranks=(1, 16),
    nf4_ranks=(16,),
    rows=2,
    tokens=32,
    repeats=3,
)


class FakeBench:
    """Measures nothing: every spec gets costs that its rank decides. Stops after a number of specs."""

    def __init__(self, stop_after: int = 1000) -> None:
        self.asked: list[dict[str, Any]] = []
        self.rounds: list[list[int]] = []
        self.stop_after = stop_after

    def __call__(self, specs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        self.rounds.append([spec["lora_rank"] for spec in specs])
        for spec in specs:
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(spec)
            yield costs(1.0 if spec["lora_rank"] == 0 else 0.7, peak=100)


def costs(ratio: float, *, peak: int | None, seconds: float | None = None) -> dict[str, Any]:
    """What a process measures: FLOPs at a ratio to 9000, of which 6000 are linears."""
    return {
        "device": "a CPU",
        "flops": {
            "linears": round(6000 * ratio),
            "attention": 1000,
            "head": round(2000 * ratio),
            "step": 1000 + round(8000 * ratio),
        },
        "seconds": {
            "step": seconds or ratio,
            "forward_backward": ratio * 0.9,
            "update": ratio * 0.1,
            "num_steps": 3,
        },
        "bytes": {"base": 40, "adapter": 2, "gradients": 2, "optimizer": 4, "peak": peak},
    }


def planted(
    arms: dict[str, float],
    seconds: dict[str, list[float]] | None = None,
    hidden: int = 768,
    peak: int | None = 100,
    model: str = "m",
) -> list[dict[str, Any]]:
    """Rows of a model: label -> ratio of its FLOPs, and label -> seconds of its repeats."""
    rows = []
    for label, ratio in arms.items():
        repeats = (seconds or {}).get(label, [ratio])
        rank = 0 if label == "FullFT" else int(label.split()[0].removeprefix("r"))
        arm = {"label": label, "lora_rank": rank, "quantization": "none", "dtype": "fp32"}
        if label.endswith("NF4"):
            arm["quantization"] = "nf4"
        for repeat, each in enumerate(repeats):
            rows.append(
                {
                    "key": f"{model}{label}{repeat}",
                    "repeat": repeat,
                    "model": {
                        "name": model,
                        "hidden_size": hidden,
                        "num_layers": 2,
                        "num_params": 10,
                        "layer_weights": 600,
                        "layer_sides": 5,
                    },
                    "arm": arm,
                    "how": {
                        "rows": 2,
                        "tokens": 32,
                        "num_threads": 1,
                        "warmup_steps": 1,
                        "min_steps": 3,
                        "sample_s": 1.0,
                    },
                    **costs(ratio, peak=peak, seconds=each),
                }
            )
    return rows


def claims(rows: list[dict[str, Any]], about: str) -> dict[str, dict[str, Any]]:
    return {each["arm"]: each for each in findings(rows)["claims"] if about in each["name"]}


def quiet(text: str) -> None:
    pass


def test_run_compute_measures_every_arm_of_a_round_before_the_next_round_in_reverse(tmp_path):
    bench = FakeBench()
    run_compute(RECIPE, tmp_path, quiet, bench)
    forth = [0, 1, 16, 16]
    assert bench.rounds == [forth, forth[::-1], forth] * 2
    assert [spec["quantization"] for spec in bench.asked[:4]] == ["none", "none", "none", "nf4"]
    assert {spec["dtype"] for spec in bench.asked} == {"fp32"}


def test_run_compute_stopped_anywhere_measures_each_repeat_once(tmp_path):
    for stop_after in (0, 3, 5, 9):
        with pytest.raises(KeyboardInterrupt):
            run_compute(RECIPE, tmp_path, quiet, FakeBench(stop_after))
    last = FakeBench()
    found = run_compute(RECIPE, tmp_path, quiet, last)
    assert len(last.asked) == 24 - 3 - 5 - 9
    rows = read_json_lines(tmp_path / "costs.jsonl")
    places = [(row["model"]["name"], row["arm"]["label"], row["repeat"]) for row in rows]
    assert len(set(places)) == len(places) == 24
    again = FakeBench()
    assert run_compute(RECIPE, tmp_path, quiet, again) == found
    assert not again.rounds


def test_run_compute_with_more_repeats_or_ranks_keeps_what_is_there(tmp_path):
    run_compute(RECIPE, tmp_path, quiet, FakeBench())
    wider = FakeBench()
    run_compute(
        RECIPE.model_copy(update={"repeats": 4, "ranks": (1, 16, 64)}), tmp_path, quiet, wider
    )
    assert wider.rounds == [[64], [64], [64], [16, 64, 16, 1, 0]] * 2


def test_run_compute_of_another_batch_measures_anew_and_reports_that_alone(tmp_path):
    run_compute(RECIPE, tmp_path, quiet, FakeBench())
    bench = FakeBench()
    found = run_compute(RECIPE.model_copy(update={"tokens": 64}), tmp_path, quiet, bench)
    assert len(bench.asked) == 24
    assert found["protocol"][0] == ["batch", "2 rows of 64 tokens, one forward, one adapter"]


def test_run_compute_of_a_config_alone_gives_a_folder_of_the_study_and_never_the_users(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    config = random_llama(128, 1, 300).config
    (mine / "config.json").write_text(json.dumps(config))
    for at, source in enumerate((str(mine), str(mine / "config.json"))):
        bench = FakeBench()
        # The name is a path too, as where a user's YAML names a folder.
        recipe = RECIPE.model_copy(update={"models": (CostModel(name=source, folder=source),)})
        folder = tmp_path / f"study{at}"
        seen: list[Path] = []
        run_compute(
            recipe,
            folder,
            lambda _, seen=seen, folder=folder: seen.extend((folder / "models").iterdir()),
            bench,
        )
        assert {spec["model"] for spec in bench.asked} == {str(place) for place in seen}
        assert {place.parent for place in seen} == {folder / "models"}
        assert not (folder / "models").exists()
    assert [path.name for path in mine.iterdir()] == ["config.json"]


@pytest.mark.parametrize("given", [{}, {"folder": "a", "config": {"model_type": "llama"}}])
def test_cost_model_without_one_source_is_refused(given):
    with pytest.raises(ValidationError, match="must have a folder or a config"):
        CostModel(name="x", **given)


@pytest.mark.parametrize("recipe", [SMOKE, LAPTOP, GPU])
def test_presets_have_full_finetuning_and_random_models_that_can_be_read(recipe):
    labels = [arm.label for arm in arms_of(recipe)]
    assert labels[0] == "FullFT"
    assert len(set(labels)) == len(labels)
    for model in recipe.models:
        shape = ModelShape.from_config(model.config or Path(model.folder))
        assert shape.hidden_size % 64 == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_alone_is_enough_and_measures_its_own_models(preset):
    assert recipe_of(load_study("compute", preset, None), preset) == RECIPES[preset]


def test_findings_of_flops_at_the_estimate_and_times_like_them_support_all():
    # (2 + 6R/N)/3 at N = 768: R = 32 gives 0.75, R = 128 gives 1.
    arms = {"FullFT": 1.0, "r32": 0.75, "r128": 1.0}
    times = {"FullFT": [3.0, 2.0], "r32": [3.0 * 0.78, 2.0 * 0.77], "r128": [3.0, 2.1]}
    found = findings(planted(arms, times))
    flops, time = claims(planted(arms, times), "FLOPs of"), claims(planted(arms, times), "time")
    assert {name: claim["measured"] for name, claim in flops.items()} == {"r32": 0.75, "r128": 1.0}
    assert [claim["predicted"] for claim in flops.values()] == [0.75, 1.0]
    assert time["r32"]["measured"] == pytest.approx(0.775)
    assert (time["r32"]["low"], time["r32"]["high"]) == pytest.approx((0.77, 0.78))
    assert time["r32"]["predicted"] == pytest.approx((1000 + 6000) / 9000)
    assert found["verdict"]["status"] == "supported"
    assert found["verdict"]["would_decide"] is None
    assert "0.75 to 1.00 of FullFT's, +0.0% to +0.0%" in found["verdict"]["sentence"]


@pytest.mark.parametrize(
    ("counted", "status"),
    [(0.7125, "supported"), (0.787, "supported"), (0.712, "contradicted"), (0.79, "contradicted")],
)
def test_findings_of_flops_beside_the_estimate_of_075_are_judged_at_5_percent(counted, status):
    rows = planted({"FullFT": 1.0, "r32": counted})
    assert claims(rows, "FLOPs of")["r32"]["status"] == status


@pytest.mark.parametrize(
    ("seconds", "status"),
    [
        ([0.78, 0.79], "supported"),
        ([0.78, 0.95], "undecided"),
        ([0.95, 0.96], "contradicted"),
        ([0.60, 0.61], "contradicted"),
        ([0.60, 0.96], "undecided"),
        ([0.78], "undecided"),
        ([0.95], "undecided"),
    ],
)
def test_findings_of_a_time_are_judged_by_all_repeats_and_never_by_one(seconds, status):
    # 7000 of 9000 FLOPs: 0.778, and 10% beside it 0.70 to 0.856.
    times = {"FullFT": [1.0] * len(seconds), "r32": seconds}
    rows = planted({"FullFT": 1.0, "r32": 0.75}, times)
    assert claims(rows, "time")["r32"]["status"] == status
    assert ("quiet" in str(findings(rows)["verdict"]["would_decide"])) == (status == "undecided")


def test_findings_where_flops_agree_and_time_does_not_are_measured_and_say_both():
    rows = planted(
        {"FullFT": 1.0, "r32": 0.75, "r128": 0.9},
        {"FullFT": [1.0, 1.0], "r32": [1.2, 1.3], "r128": [1.0, 1.0]},
    )
    verdict = findings(rows)["verdict"]
    assert verdict["status"] == "measured"
    assert "more than 5% off at m r128" in verdict["sentence"]
    assert (
        "1.00 to 1.25 of FullFT's time, within 10% of what its counted FLOPs say in 1 of 2 cases"
        in (verdict["sentence"])
    )


def test_findings_pair_times_with_full_finetuning_of_the_same_repeat():
    # The machine was twice as slow in the second round: the ratio was 0.8 in both.
    rows = planted({"FullFT": 1.0, "r32": 0.75}, {"FullFT": [1.0, 2.0], "r32": [0.8, 1.6]})
    claim = claims(rows, "time")["r32"]
    assert (claim["low"], claim["measured"], claim["high"]) == (0.8, 0.8, 0.8)
    without = [row for row in rows if (row["arm"]["label"], row["repeat"]) != ("FullFT", 1)]
    assert claims(without, "time")["r32"]["measured"] == 0.8


def test_findings_of_nf4_are_in_tables_and_memory_alone():
    rows = planted({"FullFT": 1.0, "r32": 0.75, "r32 NF4": 0.75})
    found = findings(rows)
    assert {claim["arm"] for claim in found["claims"]} == {"r32"}
    flops, time, memory = found["figures"]
    assert all(series["x"] == [32] for figure in (flops, time) for series in figure["series"])
    assert memory["x_labels"] == ["FullFT", "r32", "r32 NF4"]
    assert all([row[0] for row in t["rows"]] == memory["x_labels"] for t in found["tables"])


def test_findings_figures_are_by_rank_with_the_estimate_and_two_thirds():
    rows = planted({"FullFT": 1.0, "r128": 1.0, "r32": 0.75})
    (flops, _, memory) = findings(rows)["figures"]
    linears, step, estimate = flops["series"]
    assert linears["x"] == step["x"] == estimate["x"] == [32, 128]
    assert linears["y"] == [0.75, 1.0]
    assert step["y"] == pytest.approx([7000 / 9000, 1.0])
    assert (estimate["y"], estimate["dash"]) == ([0.75, 1.0], "dash")
    assert flops["hlines"] == [{"y": pytest.approx(2 / 3), "text": "2/3"}]
    peak, held = memory["series"]
    assert peak["y"] == [100 / 1e6] * 3
    assert held["y"] == [48 / 1e6] * 3


def test_findings_table_of_flops_has_the_estimate_and_the_sum_over_the_matrices_as_they_are():
    (table, *_) = findings(planted({"FullFT": 1.0, "r32": 0.75}))["tables"]
    titles = [title for title, _ in table["headers"]]
    full, lora = (dict(zip(titles, row, strict=True)) for row in table["rows"])
    assert (full["estimate"], full["by sides"]) == ("-", "-")
    # 4/6, and all of 32 x 5 / 600.
    assert (lora["estimate"], lora["by sides"]) == ("0.750", "0.933")
    assert lora["ratio, matrices"] == "0.750"


def test_run_compute_rows_hold_the_sides_of_the_layers_matrices(tmp_path):
    recipe = RECIPE.model_copy(update={"models": (SHIPPED,), "repeats": 1})
    run_compute(recipe, tmp_path, quiet, FakeBench())
    (facts,) = {json.dumps(row["model"]) for row in read_json_lines(tmp_path / "costs.jsonl")}
    # Hidden 192, keys and values 64, MLP 512, 4 layers.
    weights = 4 * (2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 512)
    sides = 4 * (2 * (192 + 192) + 2 * (192 + 64) + 3 * (192 + 512))
    assert json.loads(facts)["layer_weights"] == weights
    assert json.loads(facts)["layer_sides"] == sides


def test_findings_without_a_measured_peak_say_so():
    found = findings(planted({"FullFT": 1.0, "r32": 0.75}, peak=None))
    assert "not measured on this system" in found["verdict"]["sentence"]
    assert found["tables"][2]["rows"][1][-3:] == ["-", "-", "-"]
    (held,) = found["figures"][2]["series"]
    assert held["y"] == [48 / 1e6] * 2


def test_findings_of_several_models_name_each_and_leave_out_one_without_full_finetuning():
    rows = [
        *planted({"FullFT": 1.0, "r32": 0.75}, model="a"),
        *planted({"FullFT": 1.0, "r32": 0.65}, model="b"),
        *planted({"r32": 0.65}, model="c"),
    ]
    found = findings(rows)
    assert len(found["tables"]) == len(found["figures"]) == 6
    assert "off at b r32" in found["verdict"]["sentence"]
    with pytest.raises(ValueError, match="must hold FullFT's"):
        findings(planted({"r32": 0.65}))


def test_findings_are_json_and_every_table_row_has_a_cell_for_each_header():
    found = findings(planted({"FullFT": 1.0, "r32": 0.75, "r32 NF4": 0.7}))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for table in found["tables"]:
        assert {len(row) for row in table["rows"]} == {len(table["headers"])}


def test_findings_of_rows_from_two_machines_say_that_their_times_do_not_compare():
    rows = planted({"FullFT": 1.0, "r32": 0.75})
    rows[1]["device"] = "another"
    assert any("different devices (a CPU; another)" in limit for limit in findings(rows)["limits"])


@pytest.mark.slow
def test_run_compute_in_real_processes_counts_what_the_shape_says(tmp_path):
    recipe = SMOKE.model_copy(update={"ranks": (16,), "tokens": 32})
    lines: list[str] = []
    found = run_compute(recipe, tmp_path, lines.append)
    shape = ModelShape.from_config(SHIPPED.folder or "")
    weights = sum(one.num_params for one in shape.linears if one.component != "unembed")
    rows = read_json_lines(tmp_path / "costs.jsonl")
    assert [row["arm"]["label"] for row in rows] == ["FullFT", "r16"]
    assert rows[0]["flops"]["linears"] == 6 * weights * 2 * 32
    assert rows[0]["bytes"]["gradients"] == 4 * shape.num_params
    assert rows[1]["bytes"]["gradients"] == 4 * shape.lora_params(16)
    for row in rows:
        held = sum(row["bytes"][part] for part in ("base", "adapter", "gradients", "optimizer"))
        assert held < row["bytes"]["peak"] < held + 200e6
    assert len(lines) == 2
    assert found["claims"][0]["measured"] < 1


@pytest.mark.slow
def test_run_compute_of_an_arm_that_fails_says_why(tmp_path):
    config = random_llama(128, 1, 300).config or {}
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "model.safetensors").write_bytes(b"no weights")
    recipe = SMOKE.model_copy(
        update={"models": (CostModel(name="broken", folder=str(broken)),), "ranks": (1,)}
    )
    with pytest.raises(
        ValueError, match=r"full fine-tuning of .*broken must be measurable on this machine"
    ):
        run_compute(recipe, tmp_path / "study", quiet)
    assert read_json_lines(tmp_path / "study" / "costs.jsonl") == []
