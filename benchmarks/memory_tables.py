"""The tables of docs/memory.md: predicted bytes by part, beside published points and beside measured results."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import SHARED, table
from benchmarks.memory_step import StepCase
from cluster.holding import BaseHolding, Forward
from cluster.memory import load_peak_bytes, planned_bytes, step_bytes
from search_spaces.architecture import ModelShape

GB = 1e9


def published_config(name: str) -> dict[str, Any]:
    """The sizes of a published model, from ../shared/models."""
    return json.loads((SHARED / "models" / f"{name}.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class Published:
    """A point that others measured or estimated, and the setup that they give for it."""

    name: str
    config: dict[str, Any]
    holding: BaseHolding
    forward: Forward
    published_gb: float
    why: str


def _llama_70b(intermediate_size: int, kv_heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": kv_heads,
        "vocab_size": 32000,
    }


def _one_adapter(rows: int, row_tokens: int, lora_rank: int, dropout: bool) -> Forward:
    tokens = rows * row_tokens
    return Forward(
        num_adapters=1,
        tokens=tokens,
        row_tokens=row_tokens,
        loss_tokens=tokens,
        lora_rank=lora_rank,
        dropout=dropout,
    )


RECOMPUTED = BaseHolding(quantized=True, compute_bytes=2, gradient_checkpointing=True)
PUBLISHED = (
    Published(
        name="LLaMA-65B QLoRA, one card below 48 GB (rank 64, 1 x 512 tokens, dropout 0.05)",
        config=_llama_70b(22016, 64),
        holding=RECOMPUTED,
        forward=_one_adapter(1, 512, 64, True),
        published_gb=45.0,
        why="adapters and gradients are bf16 there, fp32 here (3.2 GB more); their model is 2.6 GB more "
        "than a count of its weights, their moments 0.6 GB less",
    ),
    Published(
        name="Llama-2-70B QLoRA, ZeRO-3 on 2 x 40 GB (rank 8, 2 x 2048 tokens, dropout 0.1)",
        config=_llama_70b(28672, 8),
        holding=BaseHolding(quantized=True, compute_bytes=2, num_workers=2, sharded=True),
        forward=_one_adapter(2, 2048, 8, True),
        published_gb=36.6,
        why="theirs is a card's use, context and NCCL included, with the logits of all 4,096 positions at "
        "once (1.3 GB and more) and DeepSpeed's buckets; ours has neither",
    ),
    Published(
        name="70B QLoRA in 4 bits, LLaMA-Factory's 48 GB (its defaults: rank 8, 1 x 2048 tokens)",
        config=_llama_70b(28672, 8),
        holding=RECOMPUTED,
        forward=_one_adapter(1, 2048, 8, False),
        published_gb=48.0,
        why="theirs is marked as estimated, the size of a card with its slack, and names no setup",
    ),
)
LINEARS = "attn+mlp"


def published_lines() -> list[str]:
    """The table beside published points."""
    head = ["setup", "published", "predicted step", "planned card", "step / published", "why"]
    rows = []
    for point in PUBLISHED:
        shape = ModelShape.from_config(point.config)
        step = step_bytes(shape, point.holding, point.forward, target=LINEARS, num_slots=1).total
        planned = planned_bytes(shape, point.holding, point.forward, target=LINEARS, num_slots=1)
        rows.append(
            [
                point.name,
                f"{point.published_gb:.1f} GB",
                f"{step / GB:.1f} GB",
                f"{planned / GB:.1f} GB",
                f"{step / GB / point.published_gb:.2f}",
                point.why,
            ]
        )
    return table(head, rows)


PARTS_FORWARD = Forward(
    num_adapters=4, tokens=8192, row_tokens=1024, loss_tokens=4096, lora_rank=16
)
PARTS_MODELS = (
    ("Qwen3-0.6B", 1),
    ("Llama-3.2-1B", 1),
    ("Llama-3.1-8B", 1),
    ("Qwen3-30B-A3B", 1),
    ("Llama-3.1-70B", 1),
    ("Llama-3.1-70B", 2),
    ("Llama-3.1-70B", 8),
)


def parts_lines() -> list[str]:
    """The table of parts, in GB."""
    rows, head = [], ["model", "GPUs", "load peak", "step", "planned", "worst moment"]
    names: list[str] = []
    for name, workers in PARTS_MODELS:
        shape = ModelShape.from_config(published_config(name))
        holding = replace(RECOMPUTED, num_workers=workers, sharded=workers > 1)
        target = "attn" if shape.num_experts else LINEARS
        step = step_bytes(shape, holding, PARTS_FORWARD, target=target, num_slots=4)
        planned = planned_bytes(shape, holding, PARTS_FORWARD, target=target, num_slots=4)
        names = list(step.parts())
        numbers = [load_peak_bytes(shape, holding), step.total, planned]
        values = [f"{number / GB:.2f}" for number in (*numbers, *step.parts().values())]
        rows.append([name, str(workers), *values[:3], step.moment, *values[3:]])
    return table([*head, *(name.replace("_", " ") for name in names)], rows)


def measured_lines(results: Path) -> list[str]:
    """Predicted over measured, for every result file."""
    lines: list[str] = []
    for path in sorted(results.glob("memory_step-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        lines += [
            f"**{path.stem}** ({result['settings']['device_name']}, {result['written_at'][:10]})"
        ]
        lines += ["", *_result_table(result), ""]
        if result.get("loads"):
            lines += [*_load_table(result["loads"]), ""]
    return lines[:-1] or ["Not measured yet."]


def _result_table(result: dict[str, Any]) -> list[str]:
    head = [
        "what",
        "adapters x rank",
        "tokens",
        "base",
        "recomputed",
        "measured",
        "predicted / measured",
    ]
    rows = []
    for row in [*result["steps"], *result.get("fake", [])]:
        case = StepCase(**row["case"])
        rows.append(
            [
                row["name"],
                f"{case.num_adapters} x {case.lora_rank}",
                str(case.forward.tokens),
                f"{'NF4, ' if case.holding.holds_nf4 else ''}{case.dtype}",
                "yes" if case.gradient_checkpointing else "no",
                f"{row['measured_bytes'] / 1e6:,.1f} MB",
                f"{row['ratio']:.3f}",
            ]
        )
    return table(head, rows)


def _load_table(loads: Sequence[dict[str, Any]]) -> list[str]:
    head = ["NF4 load of a 0.5 B Llama", "process grew by", "mapped from the file", "base held"]
    head += ["predicted peak", "predicted / (grew + mapped)"]
    keys = ("peak_bytes", "mapped_bytes", "base_bytes", "predicted_bytes")
    rows = [
        [row["dtype"], *(f"{row[key] / 1e6:,.0f} MB" for key in keys), f"{row['ratio']:.3f}"]
        for row in loads
    ]
    return table(head, rows)
