"""Where a learning-rate grid is centred: the laws of the doctrine, or what the user knows."""

import math
from dataclasses import dataclass

from search_spaces import doctrine


@dataclass(frozen=True, kw_only=True)
class LearningRatePrior:
    """Where the learning-rate grid is centred, and why.

    `full_ft` and `lora` are learning rates; `extrapolated` says that the law was not checked at
    this width; `source` is printed by the plan; `interval` is the 95% interval of `lora` where it was
    measured (carried_prior.py), which the grid must cover.
    """

    name: str
    full_ft: float
    lora: float
    extrapolated: bool
    source: str
    interval: tuple[float, float] | None = None


def learning_rate_prior(
    lr_prior: str | float | LearningRatePrior | None = None,
    *,
    hidden_size: int,
    model_type: str,
    method: str = "sft",
    full_ft_learning_rate: float | None = None,
) -> LearningRatePrior:
    """The learning-rate prior of a sweep.

    Args:
        lr_prior: 'doctrine' (also None), 'tinker', 'user' (needs full_ft_learning_rate), or a
            number: the LoRA learning rate ITSELF, whose FullFT counterpart is a tenth of it. A prior
            that was made elsewhere is given back.
        hidden_size: model width, >= 1.
        model_type: as in config.json; only the tinker law looks at it.
        method: 'sft' or 'rl'; RL has its own level (FullFT 1e-6) and the same ratio.
        full_ft_learning_rate: a known FullFT learning rate; the LoRA prior is 10x it. Goes with
            lr_prior None, 'doctrine' (whose ratio is used) and 'user'.

    Raises:
        ValueError: unknown prior, a learning rate that is not a number > 0, two sources of one
            number, or tinker for a family that it does not know.
    """
    doctrine.check_method(method)
    if isinstance(lr_prior, LearningRatePrior):
        if full_ft_learning_rate is not None:
            raise ValueError(
                "lr_prior {from: ...} and full_ft_learning_rate must not both set the level, got "
                f"{full_ft_learning_rate:g}; give one"
            )
        return lr_prior
    if full_ft_learning_rate is not None:
        return _user_prior(lr_prior, _positive_lr("full_ft_learning_rate", full_ft_learning_rate))
    if isinstance(lr_prior, (int, float)):
        return _number_prior(_positive_lr("lr_prior", lr_prior))
    if lr_prior == "user":
        raise ValueError("lr_prior 'user' needs full_ft_learning_rate, got none; set one, > 0")
    if lr_prior not in (None, "doctrine", "tinker"):
        raise ValueError(
            f"lr_prior must be 'doctrine', 'tinker', 'user' or a number > 0, got {lr_prior!r}; "
            "set lr_prior: doctrine"
        )
    return _law_prior(lr_prior or "doctrine", hidden_size, model_type, method)


def _law_prior(name: str, hidden_size: int, model_type: str, method: str) -> LearningRatePrior:
    low, high = doctrine.LR_CHECKED_HIDDEN.value
    extrapolated = not low <= hidden_size <= high
    if name == "tinker":
        lora = doctrine.tinker_lora_learning_rate(hidden_size, model_type)
        full_ft, law = lora / doctrine.LR_RATIO.value, doctrine.TINKER_LR_LEVEL
    elif method == "rl":
        # The RL level does not depend on the width, so no width is extrapolated.
        full_ft, law, extrapolated = doctrine.RL_FULL_FT_LR.value, doctrine.RL_FULL_FT_LR, False
        lora = doctrine.lora_learning_rate(full_ft)
    else:
        full_ft, law = doctrine.full_ft_learning_rate(hidden_size), doctrine.LR_LEVEL
        lora = doctrine.lora_learning_rate(full_ft)
    where = (
        f"; extrapolated: checked for hidden {low}-{high}, got {hidden_size}"
        if extrapolated
        else ""
    )
    source = f"{law.source}; x{doctrine.LR_RATIO.value:g} FullFT: {doctrine.LR_RATIO.source}{where}"
    return LearningRatePrior(
        name=name, full_ft=full_ft, lora=lora, extrapolated=extrapolated, source=source
    )


def _user_prior(lr_prior: str | float | None, full_ft: float) -> LearningRatePrior:
    if lr_prior not in (None, "doctrine", "user"):
        raise ValueError(
            f"lr_prior and full_ft_learning_rate must not both set the level, got {lr_prior!r} and "
            f"{full_ft:g}; give one"
        )
    return LearningRatePrior(
        name="user",
        full_ft=full_ft,
        lora=doctrine.lora_learning_rate(full_ft),
        extrapolated=False,
        source=f"full_ft_learning_rate {full_ft:g}, given; x{doctrine.LR_RATIO.value:g}: "
        f"{doctrine.LR_RATIO.source}",
    )


def _number_prior(lora: float) -> LearningRatePrior:
    return LearningRatePrior(
        name="user",
        full_ft=lora / doctrine.LR_RATIO.value,
        lora=lora,
        extrapolated=False,
        source=f"lr_prior {lora:g}, given as the LoRA learning rate; FullFT is a tenth of it",
    )


def _positive_lr(key: str, value: float) -> float:
    if isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{key} must be a finite number > 0, got {value!r}; set e.g. {key}: 1e-4")
    return float(value)
