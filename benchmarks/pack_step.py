"""What a training step costs: K adapters together against one alone, and against other loops.

    python benchmarks/pack_step.py                    # all widths on this CPU, with one thread as a worker has
    python benchmarks/pack_step.py --widths 192 256   # some of them
    python benchmarks/pack_step.py --device cuda      # Qwen3-0.6B's shape, bf16 and NF4, 512 tokens

Tables: seconds of an adapter-step and peak bytes for K adapters at two sizes of an adapter's batch; one
adapter's step against PEFT by hand, TRL's trainer and full fine-tuning. What is compared alternates
within one process; peak bytes are those of a fresh process for each cell. Every cell is kept as a part
file: the same command again goes on where it stopped.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import (
    SHARED,
    base_parser,
    machine_text,
    print_verdicts,
    results_of,
    rewrite_readme,
    say,
    spread_text,
    table,
    write_result,
)
from benchmarks.step_cells import (
    LOOP_BATCH,
    LOOP_TOKENS,
    Cell,
    Options,
    loops_cell,
    pack_cell,
    part,
    peak_cell,
    profile_lines,
)
from benchmarks.step_verdicts import cpu_verdicts, gpu_verdicts

WIDTHS, KS = (128, 192, 256, 512, 1024), (1, 2, 4, 8, 16)
SHAPES = ((2, 64), (16, 128))
GPU_CONFIG = SHARED / "models" / "Qwen3-0.6B.json"
GPU_SHAPES, GPU_KS = ((1, 512), (16, 512)), (1, 4, 8, 16)


def main() -> None:
    args = parse_args()
    if args.readme:
        rewrite_readme("pack_step", readme_lines(args.results))
        return
    options = Options(
        device=args.device,
        threads=args.threads,
        repeats=args.repeats,
        min_sample_s=args.min_sample_s,
        max_tokens=args.max_tokens,
        lora_rank=args.lora_rank,
        dtype=args.dtype or ("fp32" if args.device == "cpu" else "bf16"),
        work=args.work / "pack_step",
    )
    cells = gpu_cells(args) if args.config else cpu_cells(args)
    if args.profile:
        for cell in cells:
            print(f"{cell.name}, K={max(args.ks)}\n{profile_lines(cell, max(args.ks), options)}")
        return
    values = measure(cells, args, options)
    print("\n".join(lines(values)))
    verdicts = gpu_verdicts(values) if args.config else cpu_verdicts(values)
    print_verdicts(verdicts)
    settings = vars(options) | {
        "work": str(options.work),
        "ks": args.ks,
        "device_name": _device_name(args),
    }
    what = args.config.stem if args.config else ".".join(map(str, args.widths))
    name = f"pack_step-{args.device}-{options.dtype}-{what}"
    write_result(args.results / f"{name}.json", settings, values | {"verdicts": verdicts})


def parse_args() -> argparse.Namespace:
    parser = base_parser(__doc__ or "")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--config", type=Path, help="a config.json with random weights; cuda: Qwen3-0.6B"
    )
    parser.add_argument("--widths", type=int, nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--ks", type=int, nargs="+", help="default: 1 2 4 8 16, cuda: 1 4 8 16")
    parser.add_argument(
        "--shapes", nargs="+", help="rows x tokens of one adapter's step, e.g. 2x64"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="default: fp32, cuda: bf16")
    parser.add_argument("--threads", type=int, default=1, help="as many as a worker group has")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--min-sample-s", type=float, default=0.5)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=0, help="of a forward; 0: as measured")
    parser.add_argument("--profile", action="store_true", help="only print where steps spend time")
    parser.add_argument("--skip", nargs="+", choices=["packs", "peaks", "loops"], default=[])
    args = parser.parse_args()
    if args.device == "cuda" and args.config is None:
        args.config = GPU_CONFIG
    args.ks = args.ks or list(GPU_KS if args.config else KS)
    if 1 not in args.ks:
        parser.error("--ks must hold 1, with which the others are compared")
    asked = [tuple(int(side) for side in text.split("x")) for text in args.shapes or []]
    args.shapes = asked or list(GPU_SHAPES if args.config else SHAPES)
    return args


def cpu_cells(args: argparse.Namespace) -> list[Cell]:
    """NF4 bases of growing width, each with both sizes of a step."""
    return [
        Cell(model=str(width), quantization="nf4", rows=rows, tokens=tokens)
        for width in args.widths
        for rows, tokens in args.shapes
    ]


def gpu_cells(args: argparse.Namespace) -> list[Cell]:
    """One base, plain and NF4."""
    return [
        Cell(model=str(args.config), quantization=quantization, rows=rows, tokens=tokens)
        for quantization in ("none", "nf4")
        for rows, tokens in args.shapes
    ]


def measure(cells: list[Cell], args: argparse.Namespace, options: Options) -> dict[str, Any]:
    """All cells: {"packs", "peaks", "equal_peaks", "loops"}, each by cell name."""
    found: dict[str, Any] = {"packs": {}, "peaks": {}, "equal_peaks": {}, "loops": {}}
    for number, cell in enumerate(cells, start=1):
        say(f"cell {number}/{len(cells)}: {cell.name}")
        if "packs" not in args.skip:
            found["packs"][cell.name] = packs_part(cell, args.ks, options)
        if "peaks" not in args.skip:
            found["peaks"][cell.name] = peaks_part(cell, args.ks, options)
    for model, quantization in dict.fromkeys((cell.model, cell.quantization) for cell in cells):
        if "peaks" not in args.skip:
            rows, tokens = max(args.shapes) if args.config else (LOOP_BATCH, LOOP_TOKENS)
            cell = Cell(model=model, quantization=quantization, rows=rows, tokens=tokens)
            name = f"{Path(model).stem}-{quantization}"
            found["equal_peaks"][name] = equal_peaks(cell, args.ks, options)
        if "loops" not in args.skip:
            found["loops"] |= loops_parts(model, quantization, args, options)
    return found


def packs_part(cell: Cell, ks: list[int], options: Options) -> dict[str, Any]:
    name = f"{cell.name}-k{'.'.join(map(str, ks))}"
    return part(options, "packs", name, lambda: pack_cell(cell, ks, options))


def peaks_part(cell: Cell, ks: list[int], options: Options) -> dict[str, Any]:
    """Peak bytes of each K."""
    return {
        str(k): part(options, "peak", f"{cell.name}-k{k}", lambda k=k: peak_cell(cell, k, options))
        for k in ks
    }


def equal_peaks(cell: Cell, ks: list[int], options: Options) -> dict[str, Any]:
    """Peak bytes of each K with the same tokens in flight: K adapters of rows / K rows."""
    return {
        str(k): peaks_part(replace(cell, rows=cell.rows // k), [k], options)[str(k)]
        for k in ks
        if cell.rows % k == 0
    }


def loops_parts(
    model: str, quantization: str, args: argparse.Namespace, options: Options
) -> dict[str, Any]:
    """One adapter against other loops: rows of the demo on a CPU, the cells' own shapes on a GPU."""
    gpu = args.config is not None
    shapes = args.shapes if gpu else [(LOOP_BATCH, LOOP_TOKENS)]
    found = {}
    for rows, tokens in shapes:
        cell = Cell(model=model, quantization=quantization, rows=rows, tokens=tokens)

        def measure(cell: Cell = cell) -> dict[str, Any]:
            return loops_cell(cell, options, real_rows=not gpu, full=not gpu)

        found[cell.name] = part(options, "loops", cell.name, measure)
    return found


def lines(values: dict[str, Any]) -> list[str]:
    """All tables."""
    return [*pack_lines(values), "", *peak_lines(values), "", *loop_lines(values), ""]


def pack_lines(values: dict[str, Any]) -> list[str]:
    """A row for each cell and K."""
    head = ["base, batch of an adapter", "K", "ms / adapter-step", "ratio to K=1", "tokens/s"]
    head += ["share of GEMM rate", "forward tokens", "peak MB"]
    rows = []
    for name, cell in values["packs"].items():
        for k, numbers in cell["k"].items():
            seconds = statistics.median(numbers["seconds"])
            share = cell["step_flops"] / seconds / cell["gemm_flops_per_s"]
            peak = values["peaks"].get(name, {}).get(k)
            milliseconds = [1e3 * each for each in numbers["seconds"]]
            rows.append(
                [
                    name,
                    k,
                    spread_text(milliseconds, "", 1),
                    spread_text(numbers["ratio"], "", 2),
                    f"{numbers['tokens_per_s']:,.0f}",
                    f"{share:.0%} of {cell['gemm_flops_per_s'] / 1e9:,.0f} GFLOP/s",
                    f"{cell['max_tokens']:,}",
                    f"{peak['peak_bytes'] / 1e6:,.0f}" if peak else "-",
                ]
            )
    return table(head, rows) if rows else []


def peak_lines(values: dict[str, Any]) -> list[str]:
    """Peaks with equal tokens in flight."""
    head = ["equal tokens in flight", "K", "peak MB", "above the loaded base", "of it adapters"]
    rows = [
        [
            name,
            k,
            f"{peak['peak_bytes'] / 1e6:,.0f}",
            f"{(peak['peak_bytes'] - peak['base_bytes']) / 1e6:,.0f}",
            f"{int(k) * peak['adapter_bytes'] / 1e6:,.0f}",
        ]
        for name, peaks in values["equal_peaks"].items()
        for k, peak in peaks.items()
    ]
    return table(head, rows) if rows else []


def loop_lines(values: dict[str, Any]) -> list[str]:
    """One adapter's step by each loop."""
    head = ["base, batch", "loop", "ms / step", "times ours", "share of GEMM rate"]
    rows = []
    for name, cell in values["loops"].items():
        ours = statistics.median(cell["seconds"]["ours"])
        for arm, seconds in cell["seconds"].items():
            flops = cell["full_step_flops" if arm == "full fine-tuning" else "step_flops"]
            median = statistics.median(seconds)
            share = flops / median / cell["gemm_flops_per_s"]
            milliseconds = [1e3 * each for each in seconds]
            rows.append(
                [
                    name,
                    arm,
                    spread_text(milliseconds, "", 1),
                    f"{median / ours:.2f}",
                    f"{share:.0%}",
                ]
            )
    return table(head, rows) if rows else []


def readme_lines(results: Path) -> list[str]:
    """The README's tables and verdicts."""
    found: list[str] = []
    for name, result in results_of(results, "pack_step-*.json"):
        found += [f"**{name}** ({machine_text(result)})", "", *lines(result)]
        words = {True: "met", False: "not met", None: "not measured"}
        for each in result["verdicts"]:
            found.append(f"- {words[each['passed']]}: {each['criterion']}: {each['numbers']}")
        found.append("")
    return found or ["Not measured yet."]


def _device_name(args: argparse.Namespace) -> str | None:
    if args.device == "cpu":
        return None
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
