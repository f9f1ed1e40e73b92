"""A base that no worker holds whole: two workers over gloo against one that holds it all."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig, LlamaConfig, LlamaForCausalLM

from tests.trainers.families import MOE_FAMILIES, tiny_of
from tests.trainers.packs import CPU, NAMES, RUNS, Bench
from tests.trainers.test_families import RUN, spec_of
from tests.trainers.tiny import TINY_LLAMA, random_rows
from trainers.adapters import Pack
from trainers.base_model import load_base, meta_model
from trainers.base_spec import BaseSpec
from trainers.batches import RowSource
from trainers.comm import Comm
from trainers.composer import ForwardLimits
from trainers.loop import Trainer
from trainers.paths import read_json, write_json
from trainers.runs import new_run
from trainers.sharded_loading import LayerLoader, WeightFiles
from trainers.sharding import Sharding

STEPS = 5
SEVERAL = 3 * 24
"""Tokens of a forward: a few adapters' rows at once."""


def save_tiny(folder: Path, **changes: Any) -> str:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(TINY_LLAMA | {"num_hidden_layers": 3} | changes)))
    model.save_pretrained(folder, max_shard_size="100KB")
    return str(folder)


def trained(spec: BaseSpec, comm: Comm | None = None) -> dict[str, list[float]]:
    """The losses of a pack of five adapters: mixed ranks, targets, batches and dropouts."""
    bench = Bench(load_base(spec), random_rows(40), max_tokens=SEVERAL, comm=comm)
    for name in NAMES:
        size = RUNS[name].global_batch_size
        bench.enter(name, replace(RUNS[name], num_examples=STEPS * size))
    bench.train()
    return {name: [*one.train, *one.held_out] for name, one in bench.losses.items()}


def experts_trained(spec: BaseSpec, comm: Comm | None = None) -> dict[str, list[float]]:
    """The last held-out losses of a pack of two adapters on everything of a mixture of experts."""
    model = load_base(spec)
    pack = Pack(model)
    rows, held_out = RowSource(random_rows(40), 0, CPU), RowSource(random_rows(7, seed=1), 0, CPU)
    trainer = Trainer(pack, rows, held_out, limits=ForwardLimits(max_tokens=SEVERAL), comm=comm)
    runs = {r: new_run(pack, pack.enter(spec_of(model, r, seed=r)), RUN) for r in (4, 8)}
    losses: dict[str, list[float]] = {f"rank {lora_rank}": [] for lora_rank in runs}
    while active := [run for run in runs.values() if run.status == "running"]:
        for run in trainer.advance(active):
            lora_rank = next(r for r, one in runs.items() if one is run)
            found = losses[f"rank {lora_rank}"]
            trainer.evaluate(run, lambda _, row, found=found: found.append(row.eval_loss) is None)
    return losses


def facts(spec: BaseSpec) -> dict[str, Any]:
    """What a worker holds of a sharded base."""
    model = load_base(spec)
    sharding = Sharding(model)
    parameters: list[Any] = list(model.parameters())
    return {
        "dtypes": sorted({str(p.dtype) for p in parameters}),
        "whole": sum(p.numel() for p in parameters),
        "held": sharding.held_bytes(),
        "all": sum(p.ds_numel * p.element_size() for p in parameters),
    }


Train = Callable[[BaseSpec, Comm], dict[str, list[float]]]


def _work(rank: int, folder: str, train: Train, specs: list[BaseSpec]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for number, spec in enumerate(specs):
        found = {"losses": train(spec, Comm()), "facts": facts(spec)}
        write_json(Path(folder) / f"{number}-{rank}.json", found)
    dist.destroy_process_group()


def on_two_workers(folder: Path, train: Train, *specs: BaseSpec) -> list[list[dict[str, Any]]]:
    """What each of two workers found, for each spec."""
    mp.spawn(_work, args=(str(folder), train, list(specs)), nprocs=2)
    return [
        [read_json(folder / f"{number}-{rank}.json") for rank in (0, 1)]
        for number in range(len(specs))
    ]


@pytest.mark.slow
def test_sharded_pack_follows_the_losses_of_a_worker_that_holds_it_all(tmp_path):
    untied = save_tiny(tmp_path / "untied")
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    specs = [
        BaseSpec(model=untied, quantization="nf4", dtype="fp32", sharded=True),
        BaseSpec(model=tied, quantization="nf4", dtype="fp32", sharded=True),
        BaseSpec(model=untied, quantization="none", dtype="fp64", sharded=True),
    ]
    for spec, (first, second) in zip(specs, on_two_workers(tmp_path, trained, *specs), strict=True):
        assert first["losses"] == second["losses"]
        tolerance = 1e-7 if spec.dtype == "fp64" else 1e-4  # norms are in fp32
        for name, losses in trained(replace(spec, sharded=False)).items():
            assert first["losses"][name] == pytest.approx(losses, abs=tolerance)
        # One dtype (field case D02), nothing whole, half of everything but for padding.
        assert len(first["facts"]["dtypes"]) == 1
        assert first["facts"]["whole"] == 0
        assert first["facts"]["held"] == pytest.approx(first["facts"]["all"] / 2, rel=0.01)


@pytest.mark.slow
def test_sharded_experts_follow_the_losses_of_a_worker_that_holds_them_all(tmp_path):
    specs = []
    for family in MOE_FAMILIES:  # of which some have dense layers beside the sparse ones
        tiny_of(family).save_pretrained(tmp_path / family)
        base = BaseSpec(model=str(tmp_path / family), dtype="fp32", sharded=True)
        specs += [base, replace(base, quantization="none")]
    found = on_two_workers(tmp_path, experts_trained, *specs)
    for spec, (first, second) in zip(specs, found, strict=True):
        assert first["losses"] == second["losses"]
        assert first["facts"]["whole"] == 0
        for name, losses in experts_trained(replace(spec, sharded=False)).items():
            assert len(losses) == 1
            assert first["losses"][name] == pytest.approx(losses, abs=1e-4)


def test_layer_loader_refuses_a_layer_that_no_config_of_one_layer_makes(tmp_path):
    torch.manual_seed(0)
    config = Ernie4_5_MoeConfig(
        **TINY_LLAMA, moe_num_experts=4, moe_k=2, moe_intermediate_size=64, moe_layer_start_index=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loader = LayerLoader(WeightFiles(str(tmp_path), None), meta_model(config), {})
    with pytest.raises(
        ValueError, match=r"layers.1 must be built like the others .* cannot be sharded"
    ):
        loader.layer(1)
