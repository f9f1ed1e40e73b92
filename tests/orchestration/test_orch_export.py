"""`tenfold export`: what is given away loads elsewhere, computes what was trained, or is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestration.cli import main
from orchestration.serving import vllm_refusals, vllm_remarks
from search_spaces.architecture import ModelShape
from search_spaces.candidate import Candidate, trial_name
from tests.orchestration.sweeps import BASE
from tests.trainers.trials import CANDIDATE
from trainers.adapters import inject
from trainers.base_model import load_base
from trainers.base_spec import BaseSpec
from trainers.checkpoint import save_weights
from trainers.data import DataSpec
from trainers.integrity import check_folder, seal_folder
from trainers.paths import RunPaths, read_state, write_json, write_json_lines, write_state
from trainers.runs import RunSpec, new_run
from trainers.slots import AdapterSpec

IDS = torch.arange(3, 67).view(2, 32)
RUN = RunSpec(learning_rate=1e-3, global_batch_size=1, num_examples=1, eval_every=1)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A sweep of two trials with weights, as one leaves it, whose model was named by a relative path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    shutil.copytree(BASE, tmp_path / "models" / "base")
    run = RunPaths(tmp_path / "runs" / "run")
    write_state(
        run.resolved, {"config": {"model": "models/base", "revision": None}, "versions": {}}
    )
    for seed, loss in ((0, 2.0), (1, 1.5)):
        add_trial(run, seed=seed, eval_loss=loss)
    return run


def add_trial(run: RunPaths, seed: int, eval_loss: float) -> None:
    candidate = Candidate.from_dict(CANDIDATE.to_dict() | {"seed": seed})
    paths = run.trial(trial_name(candidate))
    base = BaseSpec(model=str(Path("models/base").resolve()), quantization="none", dtype="fp32")
    data = DataSpec(data="train.jsonl", model=base.model)
    config = {
        "name": paths.root.name,
        "folder": str(paths.root),
        "num_examples": 1,
        "eval_every": 1,
    }
    config |= {"base": vars(base), "data": vars(data), "candidate": candidate.to_dict()}
    write_state(paths.config, config)
    row = {"examples": 1, "steps": 1, "eval_loss": eval_loss}
    write_json_lines(paths.metrics, [row])
    write_state(paths.status, {"status": "finished", "reason": "", "examples": 1, "steps": 1})
    model = load_base(base)
    linears = ModelShape.from_config(BASE / "config.json").resolve_target(candidate.target)
    pack = inject(
        model, [AdapterSpec(lora_rank=4, lora_alpha=32, linears=tuple(linears), seed=seed)]
    )
    torch.manual_seed(seed)
    for name, view in pack.slots[0].parameters.items():
        if ".lora_B." in name:
            view.normal_(0, 0.02)
    paths.best.mkdir()
    save_weights(pack, new_run(pack, 0, RUN), paths.best, base_name=base.model, revision=None)
    seal_folder(paths.best)


def exported(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    capsys.readouterr()
    assert main(["export", "runs/run", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    capsys.readouterr()
    before = sorted(Path.cwd().rglob("*"))
    assert main(["export", *arguments]) == 2
    assert sorted(Path.cwd().rglob("*")) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.removeprefix("tenfold: ").splitlines()


def name_of(seed: int) -> str:
    return trial_name(Candidate.from_dict(CANDIDATE.to_dict() | {"seed": seed}))


def test_export_best_adapter_is_portable_and_peft_loads_it_elsewhere(run, capsys, tmp_path):
    (line,) = exported(capsys)
    assert line == f"adapter of {name_of(1)}: runs/run/export/adapter"
    config = json.loads(Path("runs/run/export/adapter/adapter_config.json").read_text())
    # As the user named it (field case B19), not where it lies on this machine.
    assert (config["base_model_name_or_path"], config["revision"]) == ("models/base", None)
    elsewhere = shutil.move("runs/run/export/adapter", tmp_path / "elsewhere")
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.no_grad():
        untouched = base(input_ids=IDS).logits
        got = PeftModel.from_pretrained(base, elsewhere)(input_ids=IDS).logits
        again = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        expected = PeftModel.from_pretrained(again, str(run.trial(name_of(1)).best))(
            input_ids=IDS
        ).logits
    assert torch.equal(got, expected)
    assert not torch.allclose(got, untouched, atol=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(elsewhere)
    assert (
        tokenizer("def f(x):")["input_ids"]
        == AutoTokenizer.from_pretrained(BASE)("def f(x):")["input_ids"]
    )


def test_export_of_a_named_trial_goes_where_it_is_told(run, capsys):
    lines = exported(capsys, "--trial", name_of(0), "-o", "given/away")
    assert lines == [f"adapter of {name_of(0)}: given/away"]
    assert Path("given/away/adapter_model.safetensors").is_file()
    assert [path.name for path in Path("given").iterdir()] == ["away"]


def test_export_merged_is_a_plain_model_with_the_logits_of_base_and_adapter(run, capsys):
    lines = exported(capsys, "--merge")
    assert lines[0].startswith("29 layers merged; logits differ from base and adapter by ")
    assert lines[1] == "the head was tied to the embedding: it has weights of its own now"
    folder = Path("runs/run/export/merged")
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.no_grad():
        got = merged(input_ids=IDS).logits
        expected = PeftModel.from_pretrained(base, str(run.trial(name_of(1)).best))(
            input_ids=IDS
        ).logits
    # The shipped base is published in bf16, and so is what is merged; test_merge.py has fp32 at 1e-4.
    assert (got - expected).abs().max() <= 1e-2 * expected.abs().max()
    AutoTokenizer.from_pretrained(folder)


def test_export_for_vllm_says_how_to_serve_it(run, capsys):
    lines = exported(capsys, "--for", "vllm")
    assert lines[0] == "vLLM: serve it with --enable-lora --max-lora-rank 8"
    assert "it adapts the head" in lines[1]


def test_export_for_vllm_of_what_it_refuses_is_refused_with_the_way_out(run, capsys):
    config = run.trial(name_of(1)).best / "adapter_config.json"
    write_json(config, json.loads(config.read_text()) | {"use_dora": True})
    seal_folder(config.parent)
    lines = refused(capsys, "runs/run", "--for", "vllm")
    assert lines == ["vLLM: DoRA is not supported; export merged weights (--merge)"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["runs/none"], "must be the folder of a sweep or study"),
        (["runs/run", "--trial", "r99"], "has no trial 'r99'; it has r4-"),
        (["runs/run", "-o", "models/base"], "must be new, it exists"),
        (["runs/run", "--for", "tgi"], "--for must be one of vllm, got 'tgi'"),
    ],
)
def test_export_that_cannot_be_is_refused_in_one_line(run, capsys, arguments, part):
    (line,) = refused(capsys, *arguments)
    assert part in line


def test_export_of_a_trial_without_weights_or_of_a_full_fine_tuning_is_refused(run, capsys):
    paths = run.trial(name_of(1))
    shutil.rmtree(paths.best)
    (line,) = refused(capsys, "runs/run")
    assert "must have weights in best/, it has none" in line
    config = read_state(paths.config)
    write_state(paths.config, config | {"candidate": config["candidate"] | {"full_finetune": True}})
    (line,) = refused(capsys, "runs/run")
    assert "is a full fine-tuning" in line


def test_export_that_fails_in_the_middle_leaves_nothing(run, capsys):
    adapter = run.trial(name_of(1)).best / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1000])
    seal_folder(adapter.parent)
    (line,) = refused(capsys, "runs/run", "--merge")
    assert "adapter_model.safetensors" in line
    assert "is no readable safetensors file" in line


def test_export_of_a_damaged_adapter_is_refused_and_what_is_exported_can_be_checked(run, capsys):
    exported(capsys)
    check_folder(Path("runs/run/export/adapter"))
    adapter = run.trial(name_of(1)).best / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1000])
    (line,) = refused(capsys, "runs/run", "-o", "second")
    assert "adapter_model.safetensors: must have" in line
    assert "it is cut short" in line
    assert not Path("second").exists()


def adapter_config(**values: Any) -> dict[str, Any]:
    return {"r": 16, "bias": "none", "target_modules": ["q_proj"]} | values


@pytest.mark.parametrize(
    ("values", "vocab_size", "part"),
    [
        ({"r": 513}, 100, "lora_rank must be at most 512, is 513"),
        ({"use_dora": True}, 100, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, 100, "modules_to_save must be empty"),
        ({"bias": "all"}, 100, "bias must be none"),
        (
            {"rank_pattern": {"experts.down_proj": 2}},
            100,
            "rank_pattern is not read: experts.down_proj",
        ),
        ({"target_modules": ["lm_head"]}, 258_049, "at most 258,048, this has 258,049"),
    ],
)
def test_vllm_refuses(values, vocab_size, part):
    (line,) = vllm_refusals(adapter_config(**values), vocab_size)
    assert part in line


@pytest.mark.parametrize(
    "values", [{}, {"r": 512}, {"use_rslora": True}, {"target_modules": ["model.lm_head"]}]
)
def test_vllm_takes(values):
    assert list(vllm_refusals(adapter_config(**values), 258_048)) == []


@pytest.mark.parametrize(
    ("rank", "flag"), [(1, 1), (2, 8), (8, 8), (9, 16), (256, 256), (257, 320)]
)
def test_vllm_rank_flag_is_the_next_that_it_knows(rank, flag):
    assert next(vllm_remarks(adapter_config(r=rank))).endswith(f"--max-lora-rank {flag}")
