"""What a sweep may take, over all its drivers: time_budget, and max_cost in hours of its GPUs."""

import time
from collections.abc import Callable
from typing import Any

from ray.tune import Stopper

from orchestration.choice_config import seconds_of
from orchestration.config import SweepConfig
from orchestration.results import read_trials
from trainers.integrity import DamagedError
from trainers.paths import RunPaths, read_state, write_state

KEEP_S = 10.0
"""How often what was used up is written: a killed driver forgets no more."""


class TimeLimit(Stopper):
    """Ends Tune's loop when the time is up.

    Args:
        num_gpus: that the sweep's workers hold.

        say: is told of a clock that is damaged.

    Raises:
        ValueError: a cost without a GPU.
    """

    def __init__(
        self, config: SweepConfig, num_gpus: float, run: RunPaths, say: Callable[[str], None]
    ) -> None:
        self.run, self.num_gpus = run, num_gpus
        self.limits_s = _limits_s(config, num_gpus)
        self.used_before_s = _used_before(run, say) if self.limits_s else 0.0
        self.began, self.kept_s = time.monotonic(), self.used_before_s

    @property
    def used_s(self) -> float:
        """Seconds of all drivers."""
        return self.used_before_s + time.monotonic() - self.began

    @property
    def reason(self) -> str | None:
        """Which limit is reached; None: none is."""
        return next((key for key, most in self.limits_s.items() if self.used_s >= most), None)

    def keep(self) -> None:
        """Writes what is used up, where there is a limit."""
        if not self.limits_s:
            return
        self.kept_s = self.used_s
        write_state(self.run.clock, {"seconds": round(self.kept_s, 1), "num_gpus": self.num_gpus})

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False  # no trial ends for itself

    def stop_all(self) -> bool:
        if self.used_s - self.kept_s > KEEP_S:
            self.keep()
        return self.reason is not None


def _used_before(run: RunPaths, say: Callable[[str], None]) -> float:
    """Seconds of earlier drivers."""
    if not run.clock.is_file():
        return 0.0
    try:
        return read_state(run.clock)["seconds"]
    except DamagedError as error:
        longest = max((r.rows[-1]["seconds"] for r in read_trials(run) if r.rows), default=0.0)
        say(f"{error}; the longest trial's {longest:.0f} s are counted")
        return longest


def _limits_s(config: SweepConfig, num_gpus: float) -> dict[str, float]:
    """What ends a sweep, in words -> after how many seconds."""
    limits: dict[str, float] = {}
    if config.time_budget is not None:
        limits[f"time_budget {config.time_budget} was used up"] = seconds_of(config.time_budget)
    if config.max_cost is not None:
        assert config.price_per_gpu_hour is not None
        if not num_gpus:
            raise ValueError(
                f"max_cost is counted in GPU-hours, and the workers hold no GPU (max_cost {config.max_cost:g}); "
                "give time_budget instead"
            )
        hours = config.max_cost / config.price_per_gpu_hour / num_gpus
        limits[f"max_cost {config.max_cost:g} was used up"] = hours * 3600
    return limits
