"""What a value of each search key must be, and how a user writes several of them."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from search_spaces.domains import Choice, LogUniform
from search_spaces.variants import WRITTEN, RankMultiple, canonical, parse_alpha

SCHEDULES = ("constant", "linear", "cosine")
MIN_NUMBER, MAX_NUMBER = 1e-30, 10**15
"""Sizes between which every number lies, but for 0: beyond them no count, rate or price means anything, and
products of them leave the range of a float."""
MAX_POINTS = 1000
"""Of a range, or a list."""


@dataclass(frozen=True, kw_only=True)
class _Key:
    must: str
    holds: Callable[[Any], bool]
    whole: bool = False
    """Counts: log ranges are rounded to integers."""
    single: bool = False
    """Only one value for the whole sweep."""
    word: bool = False
    """A name, not a number."""


KEYS: Mapping[str, _Key] = {
    "learning_rate": _Key(must="a finite number > 0", holds=lambda v: v > 0),
    "lora_rank": _Key(must="an integer >= 1", holds=lambda v: v >= 1, whole=True),
    "lora_alpha": _Key(must="a finite number > 0", holds=lambda v: v > 0),
    "global_batch_size": _Key(must="an integer >= 1", holds=lambda v: v >= 1, whole=True),
    "lr_schedule": _Key(
        must=f"one of {', '.join(SCHEDULES)}", holds=lambda v: v in SCHEDULES, word=True
    ),
    "variant": _Key(must=WRITTEN, holds=lambda v: bool(canonical(v)), word=True),
    "warmup": _Key(must="a finite number >= 0", holds=lambda v: v >= 0),
    "weight_decay": _Key(must="a finite number >= 0", holds=lambda v: v >= 0),
    "max_grad_norm": _Key(must="a finite number >= 0 (0: no clipping)", holds=lambda v: v >= 0),
    "dropout": _Key(must="a number >= 0 and < 1", holds=lambda v: 0 <= v < 1),
    "seed": _Key(must="an integer >= 0", holds=lambda v: v >= 0, whole=True),
    "epochs": _Key(must="a finite number > 0", holds=lambda v: v > 0, single=True),
    "examples": _Key(must="an integer >= 1", holds=lambda v: v >= 1, whole=True, single=True),
}


def check_value(key: str, value: object) -> Any:
    """The value of a search key, numbers as int or float by key.

    Raises:
        ValueError: names the key, what must hold and what was found.
    """
    rule = KEYS[key]
    if rule.word:
        good = isinstance(value, str)
    else:
        kinds = int if rule.whole else (int, float)
        good = not isinstance(value, bool) and isinstance(value, kinds) and abs(value) < math.inf
    if not good or not rule.holds(value):
        raise ValueError(f"{key} must be {rule.must}, got {value!r}")
    check_sizes(key, value)
    if key == "variant":
        return canonical(cast(str, value))
    if rule.word or rule.whole:
        return value
    return float(cast(float, value))


def check_sizes(key: str, value: object) -> None:
    """The numbers of a value, at any depth, are of a size that can be computed with.

    Raises:
        ValueError: one is not.
    """
    if isinstance(value, Mapping):
        for item in cast(Mapping[object, object], value).values():
            check_sizes(key, item)
    elif isinstance(value, (list, tuple)):
        for item in cast(Sequence[object], value):
            check_sizes(key, item)
    elif isinstance(value, (int, float)) and not (value == 0 or _is_sized(abs(value))):
        raise ValueError(
            f"{key} must be 0 or of a size between {MIN_NUMBER:g} and {MAX_NUMBER:g}, got {value!r}"
        )


def _is_sized(size: int | float) -> bool:
    # What infinity and NaN are to a key, its own rule says.
    return MIN_NUMBER <= size <= MAX_NUMBER or not size < math.inf


def check_keys(overrides: Mapping[str, object]) -> None:
    """Raises ValueError for a key that a search space does not have, with the nearest legal one."""
    legal = [*KEYS, "target"]
    for key in overrides:
        if key not in legal:
            close = difflib.get_close_matches(key, legal, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"legal: {', '.join(legal)}"
            raise ValueError(f"{key!r} is not a key of the search space; {hint}")


def parse_domain(key: str, value: object) -> LogUniform | Choice[Any]:
    """The domain that a user wrote: a scalar, a list, or {low, high, num}.

    Raises:
        ValueError: a value out of range, an empty list, a value listed twice, a range of a key
            that has none, or several values of a key that is one for the whole sweep.
    """
    if isinstance(value, Mapping):
        return _parse_range(key, cast(Mapping[str, object], value))
    listed = isinstance(value, (list, tuple))
    items = list(cast(Sequence[object], value)) if listed else [value]
    if len(items) > MAX_POINTS:
        raise ValueError(f"{key} must have at most {MAX_POINTS:,} values, got {len(items):,}")
    options = tuple(_option(key, item) for item in items)
    if not options:
        raise ValueError(f"{key} must have at least one value, got an empty list")
    if len(set(options)) < len(options):
        raise ValueError(f"{key} must not list a value twice, got {value!r}")
    if KEYS[key].single and len(options) > 1:
        raise ValueError(f"{key} must be one value for the whole sweep, got {value!r}")
    if len({isinstance(option, RankMultiple) for option in options}) > 1:
        raise ValueError(
            f"{key} must follow one convention, numbers or multiples of the rank, got {value!r}; of the two "
            "together nobody can tell rank and learning rate apart"
        )
    return Choice(options=options)


def _option(key: str, item: object) -> Any:
    if key == "lora_alpha" and isinstance(item, str):
        return parse_alpha(item)
    return check_value(key, item)


def _parse_range(key: str, value: Mapping[str, object]) -> LogUniform | Choice[Any]:
    rule = KEYS[key]
    if (
        set(value) != {"low", "high", "num"}
        or rule.single
        or rule.word
        or key in ("seed", "dropout")
    ):
        raise ValueError(
            f"{key} must be a value, a list, or (numbers) {{low, high, num}}, got {value!r}"
        )
    low, high, num = (_number(key, name, value[name]) for name in ("low", "high", "num"))
    whole = 1 <= num <= MAX_POINTS and num == int(num)
    if not 0 < low <= high or not whole or (num == 1 and low != high):
        raise ValueError(
            f"{key} must hold 0 < low <= high and a whole num from 1 (only for low = high) to "
            f"{MAX_POINTS:,}, got {value!r}"
        )
    for end in (low, high):
        check_value(key, int(end) if rule.whole and end == int(end) else end)
    domain = LogUniform(low=low, high=high, num=int(num))
    if not rule.whole:
        return domain
    # Rounding makes neighbours equal in a narrow range; each count is tried once.
    return Choice(options=tuple(dict.fromkeys(round(point) for point in domain.values())))


def _number(key: str, name: str, value: object) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    if not good:
        raise ValueError(f"{key}: {name} must be a finite number, got {value!r}")
    check_sizes(key, value)
    return float(cast(float, value))


def parse_targets(value: object) -> tuple[str | tuple[str, ...], ...]:
    """The targets that a user wrote, not yet checked against a model.

    'attn+mlp' is one target, and so is a flat list of names without '+', [attn, mlp] (as in
    PEFT's target_modules). Several targets are a list of lists, or a list in which a name holds a
    '+': ['attn+mlp', 'attn'].

    Raises:
        ValueError: not names, or nothing.
    """
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"target must be a name, 'attn+mlp' or a non-empty list, got {value!r}")
    items = list(cast(Sequence[object], value))
    if all(isinstance(item, str) for item in items):
        names = cast(list[str], items)
        if not any("+" in name for name in names):
            return (tuple(names),)
        return tuple(names)
    return tuple(item if isinstance(item, str) else _names(item) for item in items)


def _names(item: object) -> tuple[str, ...]:
    if isinstance(item, (list, tuple)):
        names = list(cast(Sequence[object], item))
        if names and all(isinstance(name, str) for name in names):
            return tuple(cast(list[str], names))
    raise ValueError(f"target must be a list of names, or a list of such lists, got {item!r} in it")
