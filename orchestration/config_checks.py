"""Checks of sweep.yaml's values that no type can say."""

import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.gpus import parse_inventory
from orchestration.yaml_file import texts_in

if TYPE_CHECKING:
    from orchestration.config import SweepConfig

MAX_TEXT, MAX_PART_BYTES = 1000, 255
"""Characters of a text; bytes between the slashes of a path."""
MAX_WEIGHT = 1000
"""Of a file of the data: its rows are written that often."""


def has_switch(value: Any) -> bool:
    """Whether a value, or one in its list, is true or false, which Python would take for 1 or 0."""
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, bool) for item in items)


def check_data(value: Any) -> None:
    """A file, folder or hub id, or several with weights.

    Raises:
        ValueError: something else.
    """
    if value is None or (isinstance(value, str) and value):
        return
    weights = value.values() if isinstance(value, dict) else ()
    numbers = [w for w in weights if isinstance(w, int | float) and not isinstance(w, bool)]
    usable = [w for w in numbers if 0 < w <= MAX_WEIGHT]
    if not usable or len(usable) < len(value) or not all(isinstance(name, str) for name in value):
        raise ValueError(
            f"data must be a file, folder or hub id, or several with weights above 0 (at most {MAX_WEIGHT:,}; "
            f"{{a.jsonl: 1, b.jsonl: 0.5}}), got {value!r}"
        )


def check_reward(key: str, value: Any) -> None:
    """A reward's name, or several with weights.

    Raises:
        ValueError: something else.
    """
    if value is None or isinstance(value, str):
        return
    weights = list(value.values()) if isinstance(value, dict) else []
    is_number = [isinstance(w, int | float) and not isinstance(w, bool) for w in weights]
    names = all(isinstance(name, str) for name in value) if weights else False
    if not names or not all(is_number) or not all(0 < abs(w) <= MAX_WEIGHT for w in weights):
        raise ValueError(
            f"{key} must be a name, or several with weights (not 0, at most {MAX_WEIGHT:,}; "
            f"{{numeric_answer: 1}}), got {value!r}"
        )


def check_texts(key: str, value: Any) -> None:
    """Texts are names and paths: not empty, on one line, and as long as names are.

    Raises:
        ValueError: one is not.
    """
    for text in texts_in(value):
        if not text:
            raise ValueError(f"{key} must not be empty, got {value!r}; leave it out")
        odd = next((c for c in text if unicodedata.category(c) in ("Cc", "Zl", "Zp")), None)
        if odd is not None:
            raise ValueError(f"{key} must be text of one line, without {odd!r}, got {text!r}")
        if len(text) > MAX_TEXT or any(len(p.encode()) > MAX_PART_BYTES for p in text.split("/")):
            raise ValueError(
                f"{key} must be text of at most {MAX_TEXT:,} characters ({MAX_PART_BYTES} bytes between two "
                f"slashes), got {text!r}"
            )
        if text.startswith("~"):
            _require_home(key, text)


def _require_home(key: str, path: str) -> None:
    try:
        Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{key} must be a path, {path!r} begins with no user's home") from error


def check_prior(value: Any) -> None:
    """Of a mapping: {from: a run}.

    Raises:
        ValueError: another one.
    """
    if not isinstance(value, dict):
        return
    folder = value.get("from")
    if set(value) != {"from"} or not isinstance(folder, str) or not folder:
        raise ValueError(
            f"lr_prior must be doctrine, tinker, a number > 0, or {{from: runs/NAME}}, got {value!r}"
        )


def require_strategy(config: "SweepConfig") -> None:
    """How workers share a pack, and how many there are.

    Raises:
        ValueError: they do not go together, or an inventory that names no GPUs.
    """
    workers, share = config.workers_per_trial, config.gpus_per_worker
    if config.strategy == "single" and workers not in ("auto", 1):
        raise ValueError(
            f"strategy: single is one worker, got workers_per_trial {workers}; set strategy: ddp"
        )
    if config.strategy in ("ddp", "zero3") and (
        workers == 1 or (share != "auto" and 0 < share < 1)
    ):
        raise ValueError(
            f"strategy: {config.strategy} needs workers_per_trial of at least 2 and whole GPUs, got "
            f"workers_per_trial {workers} and gpus_per_worker {share}"
        )
    if config.strategy == "zero3" and config.gradient_checkpointing is False:
        raise ValueError(
            "strategy: zero3 computes layers again in the backward pass, got gradient_checkpointing "
            "false; leave it out"
        )
    if config.inventory is not None:
        parse_inventory(config.inventory)
