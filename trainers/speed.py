"""How many tokens a forward should hold on a machine, as measured there once. Imports no torch: a plan
reads it too."""

import hashlib
import json
from pathlib import Path
from typing import Any

from trainers.data_cache import cache_root
from trainers.paths import read_json, write_json


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
    return read_json(path) if path.is_file() else None


def write_speed(path: Path, measured: dict[str, Any]) -> None:
    """Keeps a measurement."""
    write_json(path, measured)


def cpu_name() -> str:
    """The processor's name, as the kernel has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown CPU"
