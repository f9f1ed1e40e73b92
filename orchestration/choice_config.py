"""What sweep.yaml says of choosing and of stopping: metric, select, max_forgetting, confirm, time_budget, max_cost;
checked and as the trials are told. Imports neither torch nor ray."""

import re
from typing import TYPE_CHECKING

from trainers.metrics import Judge

if TYPE_CHECKING:
    from orchestration.config import SweepConfig
    from trainers.rl_spec import TaskSpec

LOSS_KEYS = {"eval_loss": "eval_loss", "bits_per_byte": "eval_bits_per_byte"}
"""A metric that every evaluation measures -> its key in metrics.jsonl."""
READY = ("exact_match", "numeric_answer")
"""The names of trainers/rewards.READY, which a plan without rewards need not import."""
ROWS_ANSWERED, MAX_COMPLETION_LENGTH = 128, 256
"""Held-out rows that are answered at an evaluation (a share of right answers is then known to 0.04 or better), and
tokens of an answer or of an episode's completion: TRL's default of GRPOConfig (1.16)."""
SELECT = re.compile(r"lowest_lr_within (\d+(?:\.\d+)?)\s*%")
DURATION = re.compile(r"(?:(\d+)d)?\s*(?:(\d+)h)?\s*(?:(\d+)m)?\s*(?:(\d+)s)?")
UNITS_S = (86_400, 3_600, 60, 1)


def check_metric(value: object) -> None:
    """Raises:
    ValueError: names that no metric has.
    """
    names = value if isinstance(value, dict) else [value]
    for name in names:
        ready = name in (READY if isinstance(value, dict) else (*LOSS_KEYS, *READY))
        if not ready and not (isinstance(name, str) and ":" in name):
            raise ValueError(
                f"metric must be {', '.join(LOSS_KEYS)}, or what an answer to a held-out row earns "
                f"({', '.join(READY)}, regex:PATTERN, format:PATTERN, FILE.py:FUNCTION or MODULE:FUNCTION), "
                f"got {value!r}"
            )


def check_select(value: str) -> None:
    """Raises:
    ValueError: no way to choose.
    """
    if value != "best" and not (SELECT.fullmatch(value) and lr_tolerance(value) < 1):
        raise ValueError(
            "select must be best, or lowest_lr_within with a percentage below 100 (lowest_lr_within 0.5%), got "
            f"{value!r}"
        )


def lr_tolerance(select: str) -> float:
    """What fraction of the best score a trial may be worse by and still be chosen for its learning rate."""
    found = SELECT.fullmatch(select)
    return float(found[1]) / 100 if found else 0.0


def seconds_of(duration: str) -> int:
    """Seconds of a duration with units: 90m, 2h, 1h30m, 1d.

    Raises:
        ValueError: none, or one of no length.
    """
    found = DURATION.fullmatch(duration.strip())
    seconds = sum(
        int(count or 0) * unit
        for count, unit in zip(found.groups() if found else (), UNITS_S, strict=False)
    )
    if not seconds:
        raise ValueError(
            f"time_budget must be a duration with units (90m, 2h, 1h30m, 1d), got {duration!r}"
        )
    return seconds


def require_choice_keys(config: "SweepConfig") -> None:
    """Raises:
    ValueError: keys of choosing that do not go together.
    """
    asks = asks_answers(config)
    if config.method == "rl" and config.metric != "eval_loss":
        raise ValueError(
            "metric is for method: sft; a sweep by rewards is judged by its reward; leave it out"
        )
    if config.metric_rows is not None and not asks:
        raise ValueError(
            "metric_rows is for a metric of answers (exact_match and the like), got metric "
            f"{config.metric!r}; leave it out"
        )
    if config.max_forgetting is not None and config.retention is None:
        raise ValueError("max_forgetting needs retention: general text that must not be forgotten")
    if config.confirm == 1:
        raise ValueError(
            "confirm must be 0 or at least 2: what one more seed gives has no spread, got 1"
        )
    if config.max_cost is not None and config.price_per_gpu_hour is None:
        raise ValueError("max_cost needs price_per_gpu_hour, what an hour of one GPU costs")
    if asks and config.packing:
        raise ValueError(
            "metric: an answer needs held-out rows one by one, got packing true; leave packing out"
        )
    if asks and config.strategy == "zero3":
        raise ValueError(
            "metric: an answer needs a whole base on each worker, which samples token by token, got strategy zero3; "
            "set strategy: ddp or single"
        )


def asks_answers(config: "SweepConfig") -> bool:
    """Whether held-out rows are answered and the answers scored, in supervised fine-tuning."""
    return config.method == "sft" and not (
        isinstance(config.metric, str) and config.metric in LOSS_KEYS
    )


def judge_of(config: "SweepConfig") -> Judge:
    """By what a config's trials are judged."""
    if config.method == "rl":
        key = "eval_reward"
    elif isinstance(config.metric, str) and config.metric in LOSS_KEYS:
        key = LOSS_KEYS[config.metric]
    else:
        key = "eval_score"
    return Judge(
        key=key, max_forgetting=config.max_forgetting, lr_tolerance=lr_tolerance(config.select)
    )


def task_spec(config: "SweepConfig") -> "TaskSpec | None":
    """What a trial is told of its task metric; None where it has none."""
    if not asks_answers(config):
        return None
    from trainers.rl_spec import TaskSpec  # a plan without rewards need not pay for them

    given = config.metric
    return TaskSpec(
        reward={given: 1.0} if isinstance(given, str) else given,
        max_completion_length=answer_length_of(config),
        num_rows=config.metric_rows or ROWS_ANSWERED,
    )


def answer_length_of(config: "SweepConfig") -> int:
    """Tokens of an answer at most; 0 where none is asked for."""
    return (config.max_completion_length or MAX_COMPLETION_LENGTH) if asks_answers(config) else 0
