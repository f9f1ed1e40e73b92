"""What pack_step.py measures, one cell at a time; every cell is kept as a part file and measured once."""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import FUNCTIONS, ROOT, read_part, say
from benchmarks.step_arms import (
    Bench,
    PackSteps,
    Seconds,
    config_model_folder,
    fixed_rows,
    model_folder,
    one_at_a_time,
)
from benchmarks.step_flops import gemm_flops_per_second, step_flops
from search_spaces.architecture import ModelShape
from trainers.adapters import Pack
from trainers.base_model import DTYPES
from trainers.cpu import keep_freed_memory
from trainers.data import prepare_data
from trainers.data.spec import DataSpec
from trainers.data.token_set import TokenizedSet
from trainers.measure import measure_max_tokens
from trainers.paths import write_json

ALL_LAYERS, NO_HEAD = ("attn", "mlp", "unembed"), ("attn", "mlp")
"""The doctrine's target; what TRL can train too."""
NUM_ROWS = 64
LOOP_BATCH, LOOP_TOKENS = 16, 128
PEAK_STEPS, PEAK_SECONDS = 4, 30.0
SLOW_S = 2.0
"""A first step as long as this is warm enough to count steps by."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all cells of a run share.

    Args:
        repeats: samples of each number.
        min_sample_s: a sample makes as many steps as last so long.
        max_tokens: of a forward; 0: as trainers/measure.py measures.
    """

    device: str
    threads: int
    repeats: int
    min_sample_s: float
    max_tokens: int
    lora_rank: int
    dtype: str
    work: Path

    @property
    def key(self) -> str:
        """Part of every part file's name: cells of other settings are other cells."""
        return f"{self.device}-t{self.threads}-n{self.repeats}-m{self.max_tokens}-r{self.lora_rank}-{self.dtype}"

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", 0) if self.device == "cuda" else torch.device("cpu")

    def prepare(self) -> torch.device:
        """Makes this process one like a worker."""
        if self.device == "cpu":
            torch.set_num_threads(self.threads)
            keep_freed_memory()
        return self.torch_device


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One base and one step: rows x tokens of one adapter. model: a hidden size, or a config.json."""

    model: str
    quantization: str
    rows: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{Path(self.model).stem}-{self.quantization}-{self.rows}x{self.tokens}"


def part(
    options: Options, kind: str, name: str, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A cell's numbers: from disk, else measured and kept."""
    path = options.work / "parts" / f"{kind}-{name}-{options.key}.json"
    found = read_part(path)
    if found is None:
        say(f"{kind} {name}")
        found = measure()
        write_json(path, found)
    return found


def bench_of(
    cell: Cell,
    options: Options,
    rows: TokenizedSet | None = None,
    target: tuple[str, ...] = ALL_LAYERS,
) -> Bench:
    """The bench of a cell, its forward sized."""
    if cell.model.isdigit():
        folder = model_folder(int(cell.model), options.work)
    else:
        folder = config_model_folder(Path(cell.model), options.work, DTYPES[options.dtype])
    shape = ModelShape.from_config(folder / "config.json")
    bench = Bench(
        model=folder,
        shape=shape,
        rows=rows or fixed_rows(NUM_ROWS, cell.tokens, shape.vocab_size),
        batch=cell.rows,
        lora_rank=options.lora_rank,
        target=target,
        max_tokens=options.max_tokens,
        device=options.torch_device,
        quantization=cell.quantization,
        dtype=options.dtype,
    )
    if bench.max_tokens:
        return bench
    # Once for a base and a row length, as an engine has it.
    name = f"{Path(cell.model).stem}-{cell.quantization}-{cell.tokens}"
    found = part(options, "forward", name, lambda: _measured(bench, cell.tokens))
    return replace(bench, max_tokens=found["max_tokens"])


def _measured(bench: Bench, tokens: int) -> dict[str, Any]:
    return measure_max_tokens(Pack(bench.base()), bench.shape, bench.lora_rank, tokens)


def alternate(
    arms: dict[str, Seconds], repeats: int, min_sample_s: float
) -> dict[str, list[float]]:
    """Seconds of one step of each arm, `repeats` times, the arms in turn and every second time in
    reverse, so that what else happens on the machine hits all alike. A sample lasts min_sample_s."""
    # The first step of an arm touches all its memory for the first time: it tells nothing of the others.
    warm = {name: seconds(1) for name, seconds in arms.items()}
    warm = {name: each if each > SLOW_S else arms[name](1) for name, each in warm.items()}
    counts = {name: max(1, math.ceil(min_sample_s / each)) for name, each in warm.items()}
    found: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for name in list(arms) if repeat % 2 == 0 else list(arms)[::-1]:
            found[name].append(arms[name](counts[name]) / counts[name])
    return found


def pack_cell(cell: Cell, ks: Sequence[int], options: Options) -> dict[str, Any]:
    """Seconds of an adapter-step at each K, and its ratio to K = 1 measured right beside it."""
    device = options.prepare()
    bench = bench_of(cell, options)
    steps = PackSteps(bench, bench.base(), max(ks))
    result: dict[str, Any] = {}
    alone: list[float] = []
    for k in [k for k in ks if k > 1]:
        arms = {"1": _adapters(steps, 1), "k": _adapters(steps, k)}
        found = alternate(arms, options.repeats, options.min_sample_s)
        alone += found["1"]
        each = [seconds / k for seconds in found["k"]]
        ratios = [a / b for a, b in zip(each, found["1"], strict=True)]
        result[str(k)] = _numbers(each, cell) | {"ratio": ratios}
        say(
            f"  K={k}: {statistics.median(each) * 1e3:.1f} ms, ratio {statistics.median(ratios):.2f}"
        )
    loss_tokens = cell.rows * (cell.tokens - cell.tokens // 2)
    tokens = cell.rows * cell.tokens
    return {
        "max_tokens": bench.max_tokens,
        "k": {"1": _numbers(alone, cell) | {"ratio": [1.0]}, **result},
        "step_flops": step_flops(bench.shape, bench, tokens, loss_tokens, cell.tokens),
        "gemm_flops_per_s": _gemm(bench, device),
        "num_params": bench.shape.num_params,
    }


def _adapters(steps: PackSteps, k: int) -> Seconds:
    return lambda num_steps: steps.seconds(num_steps, k)


def _numbers(seconds: list[float], cell: Cell) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "tokens_per_s": cell.rows * cell.tokens / statistics.median(seconds),
    }


def _gemm(bench: Bench, device: torch.device) -> float:
    """At the shapes of a full forward of ours."""
    return gemm_flops_per_second(
        bench.shape, bench.max_tokens, bench.max_tokens // 2, device, DTYPES[bench.dtype]
    )


def loops_cell(cell: Cell, options: Options, *, real_rows: bool, full: bool) -> dict[str, Any]:
    """Seconds of one step of one adapter: ours, PEFT by hand, TRL, and full fine-tuning.

    Args:
        real_rows: functions of the demo up to LOOP_TOKENS, of different lengths; else rows of one length.
    """
    device = options.prepare()
    rows = demo_rows(LOOP_TOKENS) if real_rows else None
    bench = bench_of(cell, options, rows, NO_HEAD)
    arms = one_at_a_time(bench, options.work, full=full)
    found = alternate(arms, options.repeats, options.min_sample_s)
    for name, seconds in found.items():
        say(f"  {name}: {statistics.median(seconds) * 1e3:.1f} ms")
    mean, loss = (
        bench.rows.num_tokens / len(bench.rows),
        bench.rows.num_loss_tokens / len(bench.rows),
    )
    sizes = (cell.rows * mean, cell.rows * loss, int(mean))
    return {
        "max_tokens": bench.max_tokens,
        "seconds": found,
        "step_flops": step_flops(bench.shape, bench, *sizes),
        "full_step_flops": step_flops(bench.shape, bench, *sizes, full=True),
        "gemm_flops_per_s": _gemm(bench, device),
    }


def demo_rows(seq_len: int) -> TokenizedSet:
    """The demo's functions that fit."""
    return prepare_data(DataSpec(data=str(FUNCTIONS), seq_len=seq_len)).train


def peak_cell(cell: Cell, k: int, options: Options) -> dict[str, Any]:
    """Peak bytes of a fresh process that makes a few steps of K adapters."""
    # Sizes the forward here: the cell's own process would count what that took.
    bench_of(cell, options)
    asked = {"cell": vars(cell), "k": k, "options": vars(options) | {"work": str(options.work)}}
    command = [sys.executable, str(ROOT / "benchmarks" / "step_cells.py"), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the cell {cell.name} K={k} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(cell: Cell, k: int, options: Options) -> dict[str, Any]:
    """{"base_bytes", "peak_bytes", "adapter_bytes"}: before any adapter; highest; of one adapter.

    Source: VmHWM of the process on a CPU (imports and base included), torch's allocator on a GPU.
    """
    device = options.prepare()
    bench = bench_of(cell, options)
    model = bench.base()
    reset_peak(device)
    base = held_bytes(device)
    steps = PackSteps(bench, model, k)
    began = time.perf_counter()
    for _ in range(PEAK_STEPS):  # the allocator settles after a few
        steps.seconds(1, k)
        if time.perf_counter() - began > PEAK_SECONDS:
            break
    peak = peak_bytes(device)
    return {"base_bytes": base, "peak_bytes": peak, "adapter_bytes": steps.adapter_bytes}


def profile_lines(cell: Cell, k: int, options: Options) -> str:
    """Where one step of K adapters spends its time, by operator."""
    device = options.prepare()
    bench = bench_of(cell, options)
    steps = PackSteps(bench, bench.base(), k)
    steps.seconds(2, k)
    with torch.profiler.profile() as profile:
        steps.seconds(1, k)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return str(profile.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40))


def reset_peak(device: torch.device) -> None:
    """Makes the peak what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def held_bytes(device: torch.device) -> int:
    """Bytes held now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """Most bytes held since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    """One peak cell, in this process: what `peak_cell` starts."""
    asked = json.loads(sys.argv[1])
    options = Options(**(asked["options"] | {"work": Path(asked["options"]["work"])}))
    print(json.dumps(measure_peak(Cell(**asked["cell"]), asked["k"], options)))


if __name__ == "__main__":
    main()
