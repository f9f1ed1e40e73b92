"""The acceptance lines of pack_step.py, from its numbers."""

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.common import verdict

Values = dict[str, Any]
MAX_RATIO, MAX_SMALL_RATIO, MAX_PEAK, MAX_HAND, MAX_OF_FULL = 1.05, 0.6, 1.1, 1.05, 0.7
SMALL_WIDTHS, WIDE = ("128", "192", "256"), 1024
GPU_GOAL = 4.0


def cpu_verdicts(values: Values) -> list[dict[str, Any]]:
    """One line for each criterion of the issue."""
    by_hand = ("PEFT by hand", "PEFT by hand, plain base")
    return [
        pack_ratio(
            values, "a pack is not slower per adapter-step than one adapter alone", MAX_RATIO
        ),
        pack_ratio(
            values,
            "at hidden 128-256, 2 x 64 tokens, K=8: time per adapter-step",
            MAX_SMALL_RATIO,
            lambda name, k: (
                k == "8" and name.endswith("-2x64") and name.split("-")[0] in SMALL_WIDTHS
            ),
        ),
        peaks(values, above_base=False),
        peaks(values, above_base=True),
        loops(values, f"K=1 at most {MAX_HAND:g}x PEFT by hand", by_hand, MAX_HAND),
        loops(values, "K=1 faster than TRL's trainer", ("TRL SFTTrainer",), 1.0),
        loops(
            values,
            f"at hidden >= {WIDE} a LoRA step at most {MAX_OF_FULL:g} of a full fine-tuning step",
            ("full fine-tuning",),
            MAX_OF_FULL,
            lambda name: int(name.split("-")[0]) >= WIDE,
        ),
    ]


def pack_ratio(
    values: Values,
    what: str,
    most: float,
    chosen: Callable[[str, str], bool] = lambda name, k: True,
) -> dict[str, Any]:
    """The worst median ratio to K=1 among the chosen cells."""
    found = {
        f"{name} K={k}": statistics.median(numbers["ratio"])
        for name, cell in values["packs"].items()
        for k, numbers in cell["k"].items()
        if k != "1" and chosen(name, k)
    }
    return _worst(f"{what} at most {most:g}", found, most)


def peaks(values: Values, *, above_base: bool) -> dict[str, Any]:
    """Peak bytes of K=8 at equal tokens in flight, less what seven more adapters hold, over K=1.

    above_base: without what the loaded base and the libraries weigh, beside which little else shows on
    a small base.
    """
    found = {}
    for name, cell in values["equal_peaks"].items():
        if "1" in cell and "8" in cell:
            own = 7 * cell["8"]["adapter_bytes"]
            eight, one = (
                cell[k]["peak_bytes"] - (cell[k]["base_bytes"] if above_base else 0)
                for k in ("8", "1")
            )
            found[name] = (eight - own) / one
    what = "peak bytes above the loaded base" if above_base else "peak bytes"
    name = f"{what} at K=8, equal tokens in flight, less the added adapters' own"
    return _worst(f"{name}: at most {MAX_PEAK:g}x K=1", found, MAX_PEAK)


def loops(
    values: Values,
    what: str,
    arms: tuple[str, ...],
    most: float,
    chosen: Callable[[str], bool] = lambda name: True,
) -> dict[str, Any]:
    """Our step over another loop's (the fastest of the arms), sample by sample; the worst cell."""
    found = {}
    for name, cell in values["loops"].items():
        present = [cell["seconds"][arm] for arm in arms if arm in cell["seconds"]]
        if present and chosen(name):
            other = min(present, key=statistics.median)
            ratios = [a / b for a, b in zip(cell["seconds"]["ours"], other, strict=True)]
            found[name] = statistics.median(ratios)
    return _worst(what, found, most)


def _worst(what: str, found: dict[str, float], most: float) -> dict[str, Any]:
    if not found:
        return verdict(what, None, "-")
    name = max(found, key=lambda key: found[key])
    numbers = f"worst {found[name]:.2f} ({name}), median {statistics.median(found.values()):.2f} of {len(found)}"
    return verdict(what, found[name] <= most, numbers)


def gpu_verdicts(values: Values) -> list[dict[str, Any]]:
    """Adapter-steps an hour at K=16 against the best one-at-a-time loop of the same base and batch."""
    found = {}
    for name, cell in values["packs"].items():
        if name in values["loops"] and "16" in cell["k"]:
            alone = [statistics.median(s) for s in values["loops"][name]["seconds"].values()]
            alone.append(statistics.median(cell["k"]["1"]["seconds"]))
            found[name] = min(alone) / statistics.median(cell["k"]["16"]["seconds"])
    one_row = {name: gain for name, gain in found.items() if "-1x" in name}
    more = {name: gain for name, gain in found.items() if name not in one_row}
    return [
        _least(
            f"K=16, 1 row an adapter: at least {GPU_GOAL:g}x the adapters per hour",
            one_row,
            GPU_GOAL,
        ),
        _least("K=16, 16 rows an adapter: never slower", more, 1 / MAX_RATIO),
        peaks(values, above_base=False),
        peaks(values, above_base=True),
    ]


def _least(what: str, found: dict[str, float], least: float) -> dict[str, Any]:
    numbers = ", ".join(f"{name} {gain:.2f}x" for name, gain in found.items()) or "-"
    return verdict(what, min(found.values()) >= least if found else None, numbers)
