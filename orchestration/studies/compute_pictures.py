"""Tables and figures of the compute study, as results.json holds them. Pure."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from orchestration.studies.compute_costs import ESTIMATE, FULL, ArmCosts, ModelCosts
from orchestration.studies.figures import figure, series
from search_spaces.doctrine import COMPUTE

RATIO = f"ratio to {FULL}"


def tables(model: ModelCosts) -> list[dict[str, Any]]:
    """FLOPs, seconds and bytes of every arm."""
    arms = (model.full, *model.arms)
    return [
        {
            "title": f"{model.name}: FLOPs of a step, in GFLOP",
            "note": f"ratios to {FULL}; estimate of the matrices' ratio: {ESTIMATE} at N = "
            f"{model.facts['hidden_size']}; by their sides: the same sum over each matrix as it is",
            "headers": [
                ["arm", False],
                *([title, True] for title in ("layers' matrices", "attention", "head", "step")),
                *(
                    [title, True]
                    for title in ("ratio, step", "ratio, matrices", "estimate", "by sides")
                ),
            ],
            "rows": [_flops_row(model, arm) for arm in arms],
        },
        {
            "title": f"{model.name}: seconds of a step, in ms",
            "note": "median (smallest to largest) of the repeats; update: batch, clip, AdamW",
            "headers": [
                ["arm", False],
                *(
                    [title, True]
                    for title in ("step", "forward + backward", "update", "ratio, step")
                ),
            ],
            "rows": [_time_row(model, arm) for arm in arms],
        },
        {
            "title": f"{model.name}: bytes, in MB",
            "note": "summed over tensors, but for the peak, which is measured",
            "headers": [
                ["arm", False],
                *([title, True] for title in ("base", "adapter", "gradients", "optimizer")),
                *([title, True] for title in ("peak", "peak above these", "ratio, peak")),
            ],
            "rows": [_bytes_row(model, arm) for arm in arms],
        },
    ]


def _flops_row(model: ModelCosts, arm: ArmCosts) -> list[str]:
    parts = [f"{arm.flops(part) / 1e9:,.3f}" for part in ("linears", "attention", "head", "step")]
    ratios = [f"{model.flops_ratio(arm, part):.3f}" for part in ("step", "linears")]
    if arm.lora_rank == 0:
        return [arm.label, *parts, *ratios, "-", "-"]
    rules = (model.estimate(arm.lora_rank), model.by_sides(arm.lora_rank))
    return [arm.label, *parts, *ratios, *(f"{rule:.3f}" for rule in rules)]


def _time_row(model: ModelCosts, arm: ArmCosts) -> list[str]:
    parts = [
        _spread([1e3 * each for each in arm.seconds(part)], 1)
        for part in ("step", "forward_backward", "update")
    ]
    return [arm.label, *parts, _spread(model.time_ratios(arm), 2)]


def _bytes_row(model: ModelCosts, arm: ArmCosts) -> list[str]:
    counted = [
        f"{arm.num_bytes(part) / 1e6:,.1f}"
        for part in ("base", "adapter", "gradients", "optimizer")
    ]
    if not arm.peaks or not model.full.peaks:
        return [arm.label, *counted, "-", "-", "-"]
    peak = statistics.median(arm.peaks)
    ratio = peak / statistics.median(model.full.peaks)
    spread = _spread([each / 1e6 for each in arm.peaks], 1)
    return [arm.label, *counted, spread, f"{(peak - arm.held) / 1e6:,.1f}", f"{ratio:.2f}"]


def _spread(values: Sequence[float], digits: int) -> str:
    middle = f"{statistics.median(values):,.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def figures(model: ModelCosts) -> list[dict[str, Any]]:
    """FLOPs and time by rank, memory by arm."""
    return [_flops_figure(model), _time_figure(model), _bytes_figure(model)]


def _by_rank(
    model: ModelCosts, name: str, values: Callable[[ArmCosts], Sequence[float]], **style: str
) -> dict[str, Any]:
    """A series over the compared ranks: medians, with the range where there are several values."""
    several = [list(values(arm)) for arm in model.compared]
    spread = any(len(each) > 1 for each in several)
    return series(
        name,
        [arm.lora_rank for arm in model.compared],
        [statistics.median(each) for each in several],
        low=[min(each) for each in several] if spread else None,
        high=[max(each) for each in several] if spread else None,
        **style,
    )


def _flops_figure(model: ModelCosts) -> dict[str, Any]:
    return figure(
        f"{model.name}: FLOPs of a step",
        "lora_rank",
        RATIO,
        [
            _by_rank(model, "layers' matrices", lambda arm: [model.flops_ratio(arm, "linears")]),
            _by_rank(model, "whole step", lambda arm: [model.flops_ratio(arm, "step")]),
            _by_rank(
                model,
                f"estimate {ESTIMATE}, N = {model.facts['hidden_size']}",
                lambda arm: [model.estimate(arm.lora_rank)],
                mode="lines",
                dash="dash",
            ),
        ],
        x_log=True,
        hlines=[{"y": COMPUTE.value[0] / COMPUTE.value[2], "text": "2/3"}],
    )


def _time_figure(model: ModelCosts) -> dict[str, Any]:
    return figure(
        f"{model.name}: time of a step",
        "lora_rank",
        RATIO,
        [
            _by_rank(model, "a step's time", model.time_ratios),
            _by_rank(
                model,
                "forward + backward",
                lambda arm: model.time_ratios(arm, "forward_backward"),
            ),
            _by_rank(
                model,
                "its counted FLOPs",
                lambda arm: [model.flops_ratio(arm, "step")],
                mode="lines",
                dash="dash",
            ),
        ],
        x_log=True,
        hlines=[{"y": 1.0, "text": FULL}],
    )


def _bytes_figure(model: ModelCosts) -> dict[str, Any]:
    arms = (model.full, *model.arms)
    held = series(
        "held between steps (summed over tensors)",
        range(len(arms)),
        [arm.held / 1e6 for arm in arms],
        mode="markers",
    )
    measured = [(at, arm.peaks) for at, arm in enumerate(arms) if arm.peaks]
    peak = series(
        "peak (measured)",
        [at for at, _ in measured],
        [statistics.median(peaks) / 1e6 for _, peaks in measured],
        low=[min(peaks) / 1e6 for _, peaks in measured],
        high=[max(peaks) / 1e6 for _, peaks in measured],
        mode="markers",
    )
    return figure(
        f"{model.name}: memory",
        "arm",
        "MB",
        [peak, held] if measured else [held],
        x_labels=[arm.label for arm in arms],
    )
