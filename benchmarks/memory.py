"""Bytes of a worker by part: predicted by cluster/memory.py, beside what torch measures and what others published.

    python benchmarks/memory.py            # this machine: steps on the CPU, fake tensors, a base that loads
    python benchmarks/memory.py --gpu      # true shapes with random weights on a CUDA GPU
    python benchmarks/memory.py --docs     # only the tables of docs/memory.md

On a GPU the measure is torch.cuda.max_memory_allocated: what the context and the allocator hold beside it
is `memory.FIXED_BYTES` and `memory.USABLE_SHARE`, which no run has checked yet.
"""

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from benchmarks.common import ROOT, say, write_result
from benchmarks.memory_fake import fake_step_bytes
from benchmarks.memory_step import StepCase, measure_step
from benchmarks.memory_tables import (
    GB,
    measured_lines,
    parts_lines,
    published_config,
    published_lines,
)
from cluster.holding import BaseHolding
from cluster.memory import base_bytes, load_peak_bytes
from search_spaces.architecture import ModelShape
from trainers.base_model import device_name, load_base
from trainers.base_spec import BaseSpec
from trainers.paths import write_text

DOCS = ROOT / "docs" / "memory.md"
CPU = torch.device("cpu")
SAMPLE_S = 0.002

CPU_CASES: tuple[tuple[dict[str, int], StepCase], ...] = (
    ({"hidden_size": 128}, StepCase(num_adapters=4, lora_rank=64)),
    ({"hidden_size": 128}, StepCase(num_adapters=4, lora_rank=64, dtype="bf16", loss_frac=1.0)),
    ({"hidden_size": 256}, StepCase(quantized=True)),
    ({"hidden_size": 256}, StepCase(quantized=True, dtype="bf16", gradient_checkpointing=True)),
    ({"hidden_size": 256}, StepCase(quantized=True, keep_dequantized=True)),
    ({"hidden_size": 256}, StepCase(dtype="bf16", dropout=0.1)),
    ({"hidden_size": 256}, StepCase(row_tokens=256, num_examples=4)),
    ({"hidden_size": 512}, StepCase(num_adapters=1, lora_rank=64, quantized=True)),
    ({"hidden_size": 512}, StepCase(gradient_checkpointing=True, target="attn")),
    ({"hidden_size": 1024}, StepCase(num_adapters=1, quantized=True, dtype="bf16")),
    ({"hidden_size": 1024}, StepCase(num_adapters=4, dtype="bf16", gradient_checkpointing=True)),
)
FAKE_CASE = StepCase(
    lora_rank=16,
    target="attn+mlp",
    rows=2,
    row_tokens=1024,
    loss_frac=1 / 64,
    dtype="bf16",
    gradient_checkpointing=True,
)
FAKE_MODELS = ("Llama-3.1-8B", "Llama-3.1-70B")
GPU_MODELS = ("Qwen3-0.6B", "Llama-3.2-1B", "Llama-3.1-8B")
GPU_CASES = tuple(
    StepCase(
        num_adapters=adapters,
        lora_rank=16,
        target="attn+mlp",
        row_tokens=512,
        dtype="bf16",
        quantized=quantized,
        gradient_checkpointing=checkpointing,
    )
    for quantized in (True, False)
    for checkpointing in (True, False)
    for adapters in (1, 4)
)


def llama(hidden_size: int, **changes: int) -> LlamaConfig:
    """A small Llama of a width."""
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 2048,
    }
    return LlamaConfig(**(sizes | changes))  # pyright: ignore[reportArgumentType]


def compared(
    name: str, config: PretrainedConfig, case: StepCase, measured: int, device_type: str
) -> dict[str, Any]:
    """A case with its measured and predicted bytes."""
    predicted = case.predicted(ModelShape.from_config(config.to_dict()), device_type)
    ratio = predicted.total / measured
    say(
        f"{name}: predicted {predicted.total / GB:.3f} GB, measured {measured / GB:.3f}, {ratio:.3f}"
    )
    return {
        "name": name,
        "case": asdict(case),
        "measured_bytes": measured,
        "predicted_bytes": predicted.total,
        "ratio": ratio,
        "moment": predicted.moment,
        "parts": predicted.parts(),
    }


def measured_on(
    device: torch.device, cases: Sequence[tuple[str, PretrainedConfig, StepCase]]
) -> list[dict[str, Any]]:
    """Real steps of random models on a device."""
    rows = []
    for name, config, case in cases:
        with tempfile.TemporaryDirectory() as folder:
            total = measure_step(config, case, device, Path(folder)).total
        rows.append(compared(name, config, case, total, device.type))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def measured_fake() -> list[dict[str, Any]]:
    """Whole published shapes on fake tensors, in bf16 and in NF4."""
    rows = []
    for name in FAKE_MODELS:
        config = AutoConfig.for_model(**published_config(name))
        for case in (FAKE_CASE, replace(FAKE_CASE, quantized=True)):
            rows.append(compared(name, config, case, fake_step_bytes(config, case), "cpu"))
    return rows


def measured_loads() -> list[dict[str, Any]]:
    """What a process grows by while it loads a random 0.5 B Llama, at its worst."""
    config = llama(2048, num_hidden_layers=8, intermediate_size=7168, vocab_size=32000)
    shape, rows = ModelShape.from_config(config.to_dict()), []
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=False
        ).save_pretrained(folder)
        for dtype, size in (("bf16", 2), ("fp32", 4)):
            holding = BaseHolding(quantized=True, compute_bytes=size)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak, kept = pool.apply(_load_growth, (folder, dtype))
            predicted = load_peak_bytes(shape, holding, device_type="cpu")
            held = sum(base_bytes(shape, holding))
            # What needs no other type than the file's stays a page of it: the embedding and the head.
            mapped = 2 * 2 * shape.vocab_size * shape.hidden_size if dtype == "bf16" else 0
            ratio = predicted / (peak + mapped)
            say(
                f"load {dtype}: predicted {predicted / GB:.3f} GB, measured {peak / GB:.3f}, {ratio:.3f}"
            )
            rows.append(
                {
                    "dtype": dtype,
                    "peak_bytes": peak,
                    "kept_bytes": kept,
                    "mapped_bytes": mapped,
                    "ratio": ratio,
                    "base_bytes": held,
                    "predicted_bytes": predicted,
                }
            )
    return rows


def _load_growth(folder: str, dtype: str) -> tuple[int, int]:
    """Anonymous bytes at the worst moment of a load and after it, above those before."""
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as small
    ):  # what the first load of all imports is no part of it
        AutoModelForCausalLM.from_config(
            llama(64), dtype=torch.bfloat16, trust_remote_code=False
        ).save_pretrained(small)
        load_base(BaseSpec(model=small, dtype=dtype), CPU)
    before, ended = _anonymous_bytes(), threading.Event()
    peaks = [before]

    def watch() -> None:
        while not ended.is_set():
            peaks[0] = max(peaks[0], _anonymous_bytes())
            time.sleep(SAMPLE_S)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_base(BaseSpec(model=folder, dtype=dtype), CPU)
    ended.set()
    watcher.join()
    kept = _anonymous_bytes() - before
    del model
    return peaks[0] - before, kept


def _anonymous_bytes() -> int:
    text = Path(f"/proc/{os.getpid()}/status").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def write_docs(results: Path) -> None:
    """Rewrites the tables of docs/memory.md."""
    text = DOCS.read_text(encoding="utf-8")
    for marker, lines in (
        ("parts", parts_lines()),
        ("published", published_lines()),
        ("measured", measured_lines(results)),
    ):
        begin, end = f"<!-- {marker} -->", f"<!-- end {marker} -->"
        before, rest = text.split(begin)
        text = "\n".join([f"{before}{begin}", *lines, f"{end}{rest.split(end)[1]}"])
    write_text(DOCS, text)
    say(f"rewrote {DOCS}")


def cpu_cases() -> list[tuple[str, PretrainedConfig, StepCase]]:
    """The steps that are measured on a CPU."""
    return [
        (f"Llama, hidden {sizes['hidden_size']}, 3 layers", llama(**sizes), case)
        for sizes, case in CPU_CASES
    ]


def gpu_cases() -> list[tuple[str, PretrainedConfig, StepCase]]:
    """The steps that are measured on a GPU."""
    return [
        (name, AutoConfig.for_model(**published_config(name)), case)
        for name in GPU_MODELS
        for case in GPU_CASES
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--gpu", action="store_true", help="measure on a CUDA GPU")
    parser.add_argument("--docs", action="store_true", help="only rewrite docs/memory.md")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not args.docs:
        torch.set_num_threads(1)
        device = torch.device("cuda") if args.gpu else CPU
        values: dict[str, Any] = {
            "steps": measured_on(device, gpu_cases() if args.gpu else cpu_cases())
        }
        if not args.gpu:
            values |= {"fake": measured_fake(), "loads": measured_loads()}
        settings = {"device_name": device_name(device)}
        name = device_name(device).split()[-1].lower() if args.gpu else "cpu"
        write_result(args.results / f"memory_step-{name}.json", settings, values)
    write_docs(args.results)


if __name__ == "__main__":
    main()
