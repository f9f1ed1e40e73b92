"""True layers of a model too large for this machine: a slice of it takes a sharded step on CPU workers.

The slice has the widths, the head and the vocabulary of the config, fewer layers and random weights. Each
worker loads its part (NF4), a pack of adapters takes one optimizer step under ZeRO-3, and what each worker
held is written beside what cluster/memory.py predicts.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from transformers import AutoConfig

from benchmarks.common import SHARED, machine, say, stamp, versions
from cluster.holding import BaseHolding, Forward
from cluster.memory import load_peak_bytes, step_bytes
from search_spaces.architecture import ModelShape
from trainers.adapters import Pack
from trainers.base_model import load_base, meta_model
from trainers.base_spec import BaseSpec
from trainers.batches import RowSource
from trainers.comm import Comm
from trainers.composer import ForwardLimits
from trainers.loop import Trainer
from trainers.measure import random_rows
from trainers.paths import read_json, write_json
from trainers.runs import RunSpec, new_run
from trainers.slots import AdapterSpec

TARGET = ("attn", "mlp", "unembed")
SAMPLE_S = 0.005


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained: adapters of one rank, each with one row of so many tokens on each worker."""

    folder: str
    num_workers: int
    num_adapters: int
    lora_rank: int
    row_tokens: int


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        say(f"writing {args.layers} layers of {args.config.stem} with random weights")
        write_slice(args.config, args.layers, Path(folder))
        case = Case(
            folder=folder,
            num_workers=args.workers,
            num_adapters=args.adapters,
            lora_rank=args.lora_rank,
            row_tokens=args.row_tokens,
        )
        mp.spawn(work, args=(case,), nprocs=args.workers)
        found = [read_json(Path(folder) / f"worker-{rank}.json") for rank in range(args.workers)]
        result = {
            "config": args.config.stem,
            "layers": args.layers,
            "case": vars(case) | {"folder": ""},
            "workers": found,
            "predicted": predicted(ModelShape.from_config(folder), case),
            "machine": machine(),
            "versions": versions(),
            "when": stamp(),
        }
    write_json(args.output, result)
    print(json.dumps({key: result[key] for key in ("workers", "predicted")}, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=SHARED / "models" / "Llama-3.1-70B.json")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--row-tokens", type=int, default=32)
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the weights (8 GB)")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def write_slice(config_file: Path, layers: int, folder: Path) -> None:
    """A loadable folder: config.json and bf16 weights in a file for each layer and one for the rest."""
    config = AutoConfig.for_model(**json.loads(config_file.read_text(encoding="utf-8")))
    config.num_hidden_layers = layers
    config.save_pretrained(folder)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in meta_model(config).state_dict().items():
        part = name.split(".")[2] if ".layers." in name else "outer"
        files.setdefault(f"model-{part}.safetensors", {})[name] = tensor.shape
    generator = torch.Generator().manual_seed(0)
    for file, shapes in files.items():
        tensors = {name: random_weight(shape, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    where = {name: file for file, shapes in files.items() for name in shapes}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


def random_weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    weight = torch.empty(shape, dtype=torch.bfloat16)
    if len(shape) == 1:
        return weight.fill_(1.0)
    return weight.normal_(0, 0.02, generator=generator)


def work(rank: int, case: Case) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{case.folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=case.num_workers)
    start = anonymous_bytes()
    with peak() as loading:
        model = load_base(
            BaseSpec(model=case.folder, quantization="nf4", dtype="bf16", sharded=True)
        )
        pack = Pack(model)
    assert pack.sharding is not None
    held = anonymous_bytes()
    if rank == 0:
        say("loaded")
    began = time.perf_counter()
    with peak() as stepping:
        losses = step(pack, case)
    facts = {
        "bytes_at_start": start,
        "load_peak_bytes": loading["peak"] - start,
        "held_after_loading_bytes": held - start,
        "parts_bytes": pack.sharding.held_bytes(),
        "step_peak_bytes": stepping["peak"] - start,
        "step_s": round(time.perf_counter() - began, 1),
        "losses": losses,
    }
    write_json(Path(case.folder) / f"worker-{rank}.json", facts)
    dist.destroy_process_group()


def step(pack: Pack, case: Case) -> list[float]:
    """One optimizer step of every adapter; the loss of each before and after it."""
    shape = ModelShape.from_config(case.folder)
    rows = random_rows(case.num_workers, case.row_tokens, shape.vocab_size)
    source = RowSource(rows, 0, pack.device)
    limits = ForwardLimits(max_tokens=case.num_adapters * case.row_tokens)
    trainer = Trainer(pack, source, source, limits=limits, comm=Comm())
    linears = tuple(shape.resolve_target(TARGET))
    runs = []
    for seed in range(case.num_adapters):
        spec = AdapterSpec(lora_rank=case.lora_rank, lora_alpha=32, linears=linears, seed=seed)
        size = case.num_workers
        plan = RunSpec(
            learning_rate=1e-3, global_batch_size=size, num_examples=2 * size, eval_every=size
        )
        runs.append(new_run(pack, pack.enter(spec), plan))
    while any(run.steps < 1 for run in runs):
        trainer.advance([run for run in runs if run.steps < 1])
    before = [run.since_report[0][0] / run.since_report[0][1] for run in runs]
    return [*before, trainer.eval_losses(runs[0])[0]]


def predicted(shape: ModelShape, case: Case) -> dict[str, Any]:
    holding = BaseHolding(
        quantized=True, compute_bytes=2, num_workers=case.num_workers, sharded=True
    )
    tokens = case.num_adapters * case.row_tokens
    forward = Forward(
        num_adapters=case.num_adapters,
        tokens=tokens,
        row_tokens=case.row_tokens,
        loss_tokens=tokens,
        lora_rank=case.lora_rank,
    )
    step = step_bytes(
        shape, holding, forward, target=TARGET, num_slots=case.num_adapters, device_type="cpu"
    )
    return {
        "load_peak_bytes": load_peak_bytes(shape, holding),
        "step_bytes": step.total,
        "parts": step.parts(),
    }


@contextmanager
def peak() -> Iterator[dict[str, int]]:
    """Most anonymous memory of this process within: files that are mapped can be given back."""
    found, done = {"peak": anonymous_bytes()}, threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_S):
            found["peak"] = max(found["peak"], anonymous_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def anonymous_bytes() -> int:
    """RssAnon and RssShmem of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    kinds = ("RssAnon:", "RssShmem:")
    return int(np.sum([int(line.split()[1]) << 10 for line in lines if line.startswith(kinds)]))


if __name__ == "__main__":
    main()
