"""What the measured costs of training steps say: ratios to full fine-tuning, claims and a verdict. Pure."""

import statistics
from collections.abc import Sequence
from typing import Any

from orchestration.studies.compute_costs import ESTIMATE, FULL, ModelCosts, models_of
from orchestration.studies.compute_pictures import figures, tables

CLOSE_FRAC = 0.05
"""Counted FLOPs so near to the estimate agree with it."""
TIME_CLOSE_FRAC = 0.1
"""A time so near to what the FLOPs say follows them: repeats on a quiet machine spread about so much."""
QUESTION = (
    f"Does a LoRA step take {ESTIMATE} of the FLOPs of a full-fine-tuning step, and do its time and its "
    "memory follow?"
)
LIMITS = (
    "The estimate takes every matrix for N x N. Where the MLP is wider than N it is too high, the more the "
    "higher the rank; what is left of the difference is the first layer, whose query, key and value need "
    "no gradient of their input: few layers exaggerate it.",
    "FLOPs are those of matrix products in forward and backward, two for a multiply-add, as torch counts "
    "them; elementwise work, dequantization and the optimizer are not in them, but are in the time.",
    "Attention is counted as its kernel computes it: the whole square, not the causal half, and with what "
    "a fused kernel computes again in the backward pass. Both arms have the same.",
    "All arms but those named bf16 or NF4 are fp32, base included, since full fine-tuning is fp32 only; "
    "a GPU trial's LoRA base is bf16 or NF4. On NF4 the weights are dequantized at each use, where a trial "
    "with room for it keeps them dequantized.",
    "One batch is one forward without activation checkpointing, every token of which bears loss; shorter "
    "completions make the head cheaper in all arms.",
    "Peak bytes: weights, and the most that was held above the loaded model. A warm worker's second copy "
    "of the weights in full fine-tuning trials is not in them.",
)


def findings(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parts of a study's results that its cost rows decide.

    Args:
        rows: of costs.jsonl; a model without full fine-tuning's is left out.

    Raises:
        ValueError: no model has any.
    """
    models = models_of(rows)
    if not models:
        raise ValueError(
            f"the rows must hold {FULL}'s of a model, got {len(rows)} rows; measure it"
        )
    claims = [claim for model in models for claim in (*_flops_claims(model), *_time_claims(model))]
    return {
        "question": QUESTION,
        "verdict": _verdict(models, claims),
        "limits": [*LIMITS, *_device_limits(rows)],
        "protocol": _protocol(rows),
        "model": models[0].facts,
        "claims": claims,
        "tables": [table for model in models for table in tables(model)],
        "figures": [figure for model in models for figure in figures(model)],
    }


def _flops_claims(model: ModelCosts) -> list[dict[str, Any]]:
    claims = []
    for arm in model.compared:
        counted, predicted = model.flops_ratio(arm, "linears"), model.estimate(arm.lora_rank)
        off = counted / predicted - 1
        claims.append(
            {
                "name": f"{model.name}: FLOPs of the layers' matrices, {arm.label}",
                "arm": arm.label,
                "predicted": predicted,
                "measured": counted,
                "low": None,
                "high": None,
                "status": "supported" if abs(off) <= CLOSE_FRAC else "contradicted",
                "sentence": f"Counted {counted:.3f} of {FULL}'s, estimated {predicted:.3f} ({off:+.1%}).",
            }
        )
    return claims


def _time_claims(model: ModelCosts) -> list[dict[str, Any]]:
    claims = []
    for arm in model.compared:
        ratios, predicted = model.time_ratios(arm), model.flops_ratio(arm, "step")
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        claims.append(
            {
                "name": f"{model.name}: a step's time follows its FLOPs, {arm.label}",
                "arm": arm.label,
                "predicted": predicted,
                "measured": middle,
                "low": low,
                "high": high,
                "status": _time_status(ratios, predicted),
                "sentence": f"A step takes {middle:.2f} ({low:.2f} to {high:.2f} in {len(ratios)} "
                f"repeats) of {FULL}'s time; by its counted FLOPs {predicted:.2f}.",
            }
        )
    return claims


def _time_status(ratios: Sequence[float], predicted: float) -> str:
    """One repeat decides nothing; several decide where they agree."""
    low, high = predicted * (1 - TIME_CLOSE_FRAC), predicted * (1 + TIME_CLOSE_FRAC)
    inside = [low <= ratio <= high for ratio in ratios]
    if len(ratios) > 1 and all(inside):
        return "supported"
    beside = max(ratios) < low or min(ratios) > high
    return "contradicted" if len(ratios) > 1 and beside else "undecided"


def _verdict(models: Sequence[ModelCosts], claims: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Supported or contradicted where all claims agree; else measured, and the sentence tells."""
    statuses = {claim["status"] for claim in claims}
    undecided = "undecided" in statuses
    return {
        "status": statuses.pop() if len(statuses) == 1 else "measured",
        "sentence": " ".join(
            (_flops_sentence(claims), _time_sentence(claims), _byte_sentence(models))
        ),
        "would_decide": "more repeats on a quiet machine" if undecided else None,
    }


def _flops_sentence(claims: Sequence[dict[str, Any]]) -> str:
    counted = [claim for claim in claims if "FLOPs of the layers" in claim["name"]]
    off = [claim["measured"] / claim["predicted"] - 1 for claim in counted]
    text = (
        f"Counted FLOPs of the layers' matrices are {_range([c['measured'] for c in counted])} of {FULL}'s, "
        f"{min(off):+.1%} to {max(off):+.1%} beside the estimate {ESTIMATE}"
    )
    far = [claim for claim in counted if claim["status"] == "contradicted"]
    if not far:
        return f"{text}: within {CLOSE_FRAC:.0%} at every rank."
    places = ", ".join(f"{c['name'].split(':')[0]} {c['arm']}" for c in far)
    return f"{text}: more than {CLOSE_FRAC:.0%} off at {places}."


def _time_sentence(claims: Sequence[dict[str, Any]]) -> str:
    timed = [claim for claim in claims if "time follows" in claim["name"]]
    follow = sum(claim["status"] == "supported" for claim in timed)
    undecided = sum(claim["status"] == "undecided" for claim in timed)
    return (
        f"A step takes {_range([claim['measured'] for claim in timed])} of {FULL}'s time, within "
        f"{TIME_CLOSE_FRAC:.0%} of what its counted FLOPs say in {follow} of {len(timed)} cases"
        + (f" ({undecided} undecided)." if undecided else ".")
    )


def _byte_sentence(models: Sequence[ModelCosts]) -> str:
    known = [model for model in models if model.full.peaks]
    ratios = [
        statistics.median(arm.peaks) / statistics.median(model.full.peaks)
        for model in known
        for arm in model.compared
    ]
    if not ratios:
        return "Peak memory was not measured on this system."
    held = [arm.held / model.full.held for model in known for arm in model.compared]
    return (
        f"Peak bytes are {_range(ratios)} of {FULL}'s; what is held between steps (weights, gradients, "
        f"optimizer) {_range(held)}."
    )


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _device_limits(rows: Sequence[dict[str, Any]]) -> list[str]:
    devices = sorted({row["device"] for row in rows})
    if len(devices) == 1:
        return []
    return [
        f"Measured on different devices ({'; '.join(devices)}): times do not compare across them."
    ]


def _protocol(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    how, repeats = rows[0]["how"], 1 + max(row["repeat"] for row in rows)
    return [
        ["batch", f"{how['rows']} rows of {how['tokens']} tokens, one forward, one adapter"],
        [
            "repeats",
            f"{repeats}, each arm in a fresh process, the arms in turn and every second time in reverse",
        ],
        [
            "timed",
            f"median of at least {how['min_steps']} steps and {how['sample_s']:g} s after "
            f"{how['warmup_steps']} to warm up; ratios within a repeat",
        ],
        ["device", "; ".join(sorted({row["device"] for row in rows}))],
    ]
