"""What a sweep took: bytes planned and measured, seconds, GPU-hours and money. Numbers only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.results import TrialRecord
from trainers.composition import members
from trainers.paths import RunPaths, read_state

HELD_S = "held_s"
"""packs.json's key of the seconds in which the sweep held its worker groups, all drivers that ended together."""


@dataclass(frozen=True, kw_only=True)
class Spending:
    """Times and money.

    Args:
        trained_s: seconds that trials trained, each its share of the forwards it was in. Not counted: evaluations,
            waiting, loading the base.
        examples: that trials were trained on, each as often as it was.
        held_s: how long the worker groups were held; None where nobody wrote it (engine solo, a driver that died).
        num_gpus: that they held together; 0 on a CPU.
        planned: plan.json's cost; None for machines whose speed is not known.
        price_per_gpu_hour: as the user gave it.
    """

    trained_s: float
    examples: int
    held_s: float | None
    num_gpus: float
    planned: Mapping[str, Any] | None
    price_per_gpu_hour: float | None

    @property
    def examples_per_s(self) -> float | None:
        """Of one worker group while it trains."""
        return self.examples / self.trained_s if self.trained_s else None

    @property
    def gpu_hours(self) -> float | None:
        """What was held, whether it trained or not: that is what is paid for."""
        if not self.num_gpus or self.held_s is None:
            return None
        return self.held_s * self.num_gpus / 3600

    @property
    def price(self) -> float | None:
        if self.gpu_hours is None or self.price_per_gpu_hour is None:
            return None
        return self.gpu_hours * self.price_per_gpu_hour


def spending(
    plan: Mapping[str, Any],
    config: Mapping[str, Any],
    records: Sequence[TrialRecord],
    packs: Mapping[str, Any] | None,
) -> Spending:
    """What the trials of a run took.

    Args:
        plan: plan.json.
        config: resolved.json's.
        packs: packs.json of a packed sweep.
    """
    last = [record.rows[-1] for record in records if record.rows]
    planned = plan.get("packs") or {}
    return Spending(
        trained_s=sum(row["seconds"] for row in last),
        examples=sum(row["examples"] for row in last),
        held_s=(packs or {}).get(HELD_S),
        num_gpus=_num_gpus(plan, config, packs),
        planned=planned.get("cost"),
        price_per_gpu_hour=config.get("price_per_gpu_hour"),
    )


def _num_gpus(
    plan: Mapping[str, Any], config: Mapping[str, Any], packs: Mapping[str, Any] | None
) -> float:
    if packs is None or not (plan.get("inventory") or {}).get("num_gpus"):
        return 0
    each = config.get("gpus_per_worker", "auto")
    return packs["num_groups"] * packs["workers_per_group"] * (1 if each == "auto" else each)


@dataclass(frozen=True, kw_only=True)
class GroupMemory:
    """Bytes of the workers of one group.

    Args:
        planned: for a worker whose places are all taken, in the largest forward.
        peak: the most that a worker had at any evaluation of its trials; None where none was measured.
    """

    group: str
    num_trials: int
    planned: int | None
    peak: int | None

    @property
    def ratio(self) -> float | None:
        """Measured over planned."""
        return self.peak / self.planned if self.planned and self.peak else None


def group_memory(
    plan: Mapping[str, Any],
    records: Sequence[TrialRecord],
    packs: Mapping[str, Any] | None,
    homes: Mapping[str, str],
) -> list[GroupMemory]:
    """What each worker group was planned to need and had.

    Args:
        homes: trial -> the worker group that had it last.
    """
    needed = (packs or {}).get("needed_bytes") or (plan.get("packs") or {}).get("needed_bytes")
    names = sorted(set(homes.values())) or [""]
    found = []
    for name in names:
        mine = [r for r in records if r.rows and homes.get(r.name, "") == name]
        peaks = [row["peak_bytes"] for r in mine for row in r.rows if row.get("peak_bytes")]
        memory = GroupMemory(
            group=name, num_trials=len(mine), planned=needed, peak=max(peaks, default=None)
        )
        found.append(memory)
    return found


def homes_of(run: RunPaths) -> dict[str, str]:
    """Trial -> the worker group that had it last, in the order in which they entered."""
    files = sorted(run.composition("any").parent.glob("*.jsonl"))
    return {name: path.stem for path in files for name in members(path)}


def held_before(run: RunPaths) -> float:
    """Seconds for which earlier drivers of a run held its worker groups, as far as they lived to write it."""
    return read_state(run.packs).get(HELD_S, 0.0) if run.packs.is_file() else 0.0
