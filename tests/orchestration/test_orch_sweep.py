"""`tenfold sweep` for real: local Ray, NF4 on the shipped base. Each starts the command as a user does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from orchestration.results import best_trial, read_trials
from tests.orchestration.sweeps import (
    BASE,
    FUNCTIONS,
    ROOT,
    ended,
    losses,
    processes_of,
    rows,
    start,
    statuses,
    sweep,
    told,
)
from trainers.base_model import BaseSpec, load_base
from trainers.data import DataSpec, TokenizedSet, prepare_data, prepare_whole
from trainers.paths import RunPaths, read_state
from trainers.sft_trainer import TrialSpec, train_trial

SHARED = ROOT.parent / "shared" / "data"
ONE_GROUP = {"cpus_per_worker": 2}
"""Starting a second one takes longer than these sweeps train."""
REFERENCE = FUNCTIONS.parent / "reference.jsonl"

pytestmark = pytest.mark.ray


def loss_by_peft(run: Path, rows: TokenizedSet) -> float:
    """Loss of best/, computed by PEFT on a freshly quantized base, row by row."""
    model = PeftModel.from_pretrained(
        load_base(BaseSpec(model=str(BASE), dtype="fp32")), str(run / "best")
    )
    nats = tokens = 0.0
    with torch.no_grad():
        for example in map(rows.example, range(len(rows))):
            ids = torch.tensor(example.input_ids.tolist())
            loss = torch.tensor(example.loss_mask.tolist(), dtype=torch.bool)[1:]
            log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            nats -= log_p.gather(1, ids[1:, None])[:, 0][loss].sum().item()
            tokens += loss.sum().item()
    return nats / tokens


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_sweep_of_a_mixture_of_experts_trains_them_and_exports(tmp_path):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "vocab_size": 3072,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, tmp_path / "base" / name)
    values = {"model": "base", "lora_rank": [4], "learning_rate": [3e-3, 1e-2], "examples": 64}
    values |= {"seq_len": 128, "capacity_policy": "advisory", "scheduler": "fifo", **ONE_GROUP}
    run, done = sweep(tmp_path, **values)
    assert done.returncode == 0, told(done)
    assert {end["status"] for end in statuses(run).values()} == {"finished"}
    best = best_trial(read_trials(RunPaths(run)))
    assert best is not None
    assert best.best is not None
    assert best.base_loss is not None
    assert best.best["eval_loss"] < best.base_loss
    saved = load_file(run / "best" / "adapter_model.safetensors")
    experts = [tensor for name, tensor in saved.items() if ".experts." in name]
    # A and B of two fused parameters in two layers; rank 4 / 2 active experts, 4 experts.
    assert len(experts) == 8
    assert {min(tensor.shape) for tensor in experts} == {8}
    assert all(bool(tensor.any()) for tensor in experts)
    merged = ended(start(tmp_path, "export", "runs/run", "--merge"))
    assert merged.returncode == 0, told(merged)
    assert "13 layers merged" in merged.stdout
    model = load_base(
        BaseSpec(model=str(run / "export" / "merged"), quantization="none", dtype="fp32")
    )
    assert type(model).__name__ == "MixtralForCausalLM"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sweep_prunes_trains_keeps_the_diverged_and_hands_back_the_best(tmp_path, monkeypatch):
    run, done = sweep(
        tmp_path,
        lora_rank=[1, 4],
        learning_rate=[3e-3, 1e15],
        max_grad_norm=0,
        examples=96,
        scheduler="fifo",
        retention=str(REFERENCE),
        **ONE_GROUP,
    )
    assert done.returncode == 0, told(done)
    ended = {name[:2] + name.split("-")[1]: status for name, status in statuses(run).items()}
    found = {key: status["status"] for key, status in ended.items()}
    assert found == {"r4lr3.0e": "finished", "r4lr1.0e+15": "diverged"}
    assert "nan" in ended["r4lr1.0e+15"]["reason"] or "inf" in ended["r4lr1.0e+15"]["reason"]
    plan = json.loads((run / "plan.json").read_text())
    assert [item["candidate"]["lora_rank"] for item in plan["discarded"]] == [1, 1]
    assert len(list((run / "trials").iterdir())) == 2  # a discarded candidate never was a trial
    base, *trained = rows(next((run / "trials").glob("r4-lr3*")))
    best = min(trained, key=lambda row: row["eval_loss"])
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    spec = DataSpec(data=str(FUNCTIONS), model=str(BASE))
    assert loss_by_peft(run, prepare_data(spec).eval) == pytest.approx(best["eval_loss"], abs=1e-3)
    text, _ = prepare_whole(spec, str(REFERENCE))
    assert loss_by_peft(run, text) == pytest.approx(best["retention_loss"], abs=1e-3)
    assert abs(best["retention_loss"] - base["retention_loss"]) > 0.01
    for part in ("report.html", "best adapter", "4 candidates planned, 2 discarded"):
        assert part in done.stdout
    assert f"retention_loss of the untouched base: {base['retention_loss']:.4f}" in done.stdout
    assert (run / "report.html").stat().st_size > 1_000_000  # plotly is inside it
    assert not processes_of(tmp_path)


def close(found: dict[str, list], expected: dict[str, list], within: float) -> bool:
    """Whether two sweeps evaluated the same trials at the same examples, to near losses."""
    assert {name: [at for at, _ in each] for name, each in found.items()} == {
        name: [at for at, _ in each] for name, each in expected.items()
    }
    gaps = [
        abs(loss - other)
        for name, each in found.items()
        for (_, loss), (_, other) in zip(each, expected[name], strict=True)
    ]
    return max(gaps) <= within


def losses_alone(trial: Path, folder: Path) -> list[tuple[int, float]]:
    """What a trial of a sweep loses in one process, whole and without neighbours."""
    spec = TrialSpec.from_dict(read_state(trial / "config.json"))
    base = replace(spec.base, sharded=False)
    result = train_trial(replace(spec, folder=folder, base=base), lambda row: True)
    return [(row["examples"], row["eval_loss"]) for row in result.rows]


@pytest.mark.slow
def test_sweep_on_two_workers_ends_in_the_numbers_of_one_whole_or_sharded(tmp_path, monkeypatch):
    config = {"lora_rank": [4, 8], "learning_rate": 3e-3, "examples": 64, "pack_size": 2}
    config |= {"scheduler": "fifo", "dtype": "fp32", "eval": 0.02}
    found = {}
    for strategy in ("ddp", "zero3"):
        run, done = sweep(tmp_path, name=strategy, strategy=strategy, workers_per_trial=2, **config)
        assert done.returncode == 0, told(done)
        found[strategy] = losses(run)
        assert [len(each) for each in found[strategy].values()] == [5] * 2
        packs = json.loads((run / "packs.json").read_text())
        assert packs["strategy"] == strategy
        assert packs["num_groups"] * packs["places"] == 2
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    alone = {name: losses_alone(run / "trials" / name, tmp_path / name) for name in found["ddp"]}
    assert close(found["ddp"], alone, 1e-5)
    assert close(found["zero3"], alone, 1e-4)
    best = best_trial(read_trials(RunPaths(run)))
    assert best is not None
    assert best.best is not None
    spec = DataSpec(**json.loads((run / "trials" / best.name / "config.json").read_text())["data"])
    by_peft = loss_by_peft(run, prepare_data(spec).eval)
    assert by_peft == pytest.approx(best.best["eval_loss"], abs=1e-4)


@pytest.mark.slow
def test_sweep_of_nf4_chooses_the_same_best_packed_and_solo(tmp_path):
    config = {"lora_rank": [4, 16], "learning_rate": 1e-2, "examples": 96, "eval": 0.02}
    config |= ONE_GROUP
    found, best = {}, {}
    for engine in ("solo", "packed"):
        run, done = sweep(
            tmp_path / engine,
            engine=engine,
            scheduler="fifo",
            retention=str(REFERENCE),
            **config,
        )
        assert done.returncode == 0, told(done)
        found[engine] = losses(run) | {
            f"{trial.name} on the retention set": [
                (row["examples"], row["retention_loss"]) for row in rows(trial)
            ]
            for trial in (run / "trials").iterdir()
        }
        best[engine] = best_trial(read_trials(RunPaths(run)))
    assert best["packed"].name == best["solo"].name
    assert close(found["packed"], found["solo"], 1e-3)


@pytest.mark.slow
def test_sweep_of_real_files_of_two_shapes_runs_through(tmp_path):
    files = [SHARED / "gsm8k" / "test.jsonl", SHARED / "chat" / "alpaca_en_demo.json"]
    if not all(file.exists() for file in files):
        pytest.skip("needs ../shared/data/gsm8k and ../shared/data/chat")
    data = {str(file): 1 for file in files}
    run, done = sweep(tmp_path, data=data, learning_rate=3e-3, lora_rank=16, examples=32, eval=0.01)
    assert done.returncode == 0, told(done)
    (status,) = statuses(run).values()
    assert (status["status"], status["examples"]) == ("finished", 32)
