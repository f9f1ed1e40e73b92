"""How many tokens a forward should hold on a machine, as measured there once. Imports no torch: a plan
reads it too."""

import fcntl
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.data.cache import cache_root, read_json, write_json

WIDEST = (("avx512f", "AVX-512"), ("avx2", "AVX2"))


def speed_path(model_config: dict[str, Any], **how: Any) -> Path:
    """Where the measurement of a base on a machine is kept.

    Args:
        model_config: config.json, parsed.
        how: everything else that it depends on (device, threads, quantization, dtype, seq_len).
    """
    text = json.dumps([model_config, how], sort_keys=True, default=str)
    return cache_root() / "speed" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def read_speed(path: Path) -> dict[str, Any] | None:
    """A measurement: max_tokens and what each size tried took; None where there is none."""
    return read_json(path)


def measured_once(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The measurement that is kept, else a new one, which is then kept.

    Who comes while another measures waits for that one: two at once would disturb each other, and
    forwards of different sizes round differently.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (found := read_speed(path)) is None:
            found = measure()
            write_json(path, found)
    return found


def cpu_name() -> str:
    """The processor's name, as the kernel has it, with its widest vectors: processors of one name differ
    threefold in how fast they multiply."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    flags = facts.get("flags", "").split()
    widest = next((f" ({word})" for flag, word in WIDEST if flag in flags), "")
    return facts.get("model name", "unknown CPU") + widest
