"""The arms of a study: what is compared, each with its own learning rates."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestration.config import values_of
from search_spaces import doctrine
from search_spaces.candidate import GRID_FIELDS, Candidate
from search_spaces.domains import LogUniform
from search_spaces.studies.points import rounded_rate
from search_spaces.variants import PLAIN, alpha_at, lr_factor

if TYPE_CHECKING:
    from orchestration.planning import Plan
    from orchestration.studies.config import StudyConfig
    from search_spaces.domains import SearchSpace

CURVE_KINDS = ("lr-ratio", "rank", "layers", "batch", "rl")
"""Studies whose arms are loss curves over learning rates."""
LAYER_TARGETS = (("attn",), ("mlp",), ("attn", "mlp"), ("attn", "mlp", "unembed"))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm: a candidate but for learning rate and seed, and where its grid begins.

    Attributes:
        label: unique in its study.
        template: the candidate at the prior's learning rate, seed 0.
        grid: learning rates, ascending.
        trained_params: parameters that get gradients.
    """

    label: str
    template: Candidate
    grid: tuple[float, ...]
    trained_params: int

    @property
    def full_finetune(self) -> bool:
        return self.template.full_finetune

    def candidate(self, learning_rate: float, seed: int) -> Candidate:
        """The candidate of one point."""
        return replace(self.template, learning_rate=learning_rate, seed=seed)

    def holds(self, candidate: Candidate) -> bool:
        """Whether a candidate is a point of this arm."""
        return self.candidate(candidate.learning_rate, candidate.seed) == candidate


def make_arms(kind: str, config: "StudyConfig", plan: "Plan") -> tuple[Arm, ...]:
    """The arms of a study, full fine-tuning first.

    Raises:
        ValueError: a kind that has no arms, or a key with several values that is no axis of the kind.
    """
    if kind not in CURVE_KINDS:
        raise ValueError(f"kind must be one of {', '.join(CURVE_KINDS)}, got {kind!r}")
    space = plan.space
    axes = {"lora_rank": True, "lora_alpha": kind == "lr-ratio", "target": False}
    axes |= {"global_batch_size": kind == "batch"}
    _require_single(space, axes)
    batches = space.global_batch_size.options
    full = (
        [_full_arm(config, plan, batch, batches) for batch in batches] if kind != "layers" else []
    )
    return (
        *full,
        *(
            _lora_arm(config, plan, template, batches, names_target=kind == "layers")
            for template in _templates(kind, plan)
        ),
    )


def _require_single(space: "SearchSpace", axes: dict[str, bool]) -> None:
    others = [key for key in GRID_FIELDS if key not in axes]
    for key in (*[key for key, varies in axes.items() if not varies], *others):
        values = getattr(space, key).values()
        if len(values) > 1:
            raise ValueError(f"{key} must be one value in this study, got {list(values)}; give one")


def _templates(kind: str, plan: "Plan") -> Iterator[Candidate]:
    space = plan.space
    for batch in space.global_batch_size.options:
        for alpha in space.lora_alpha.values():
            for lora_rank in space.lora_rank.options:
                for target, rank in _targets(kind, plan, lora_rank):
                    yield _candidate(
                        plan,
                        lora_rank=rank,
                        lora_alpha=alpha_at(alpha, rank),
                        batch=batch,
                        target=target,
                    )


def _targets(kind: str, plan: "Plan", lora_rank: int) -> list[tuple[tuple[str, ...], int]]:
    """(target, rank) pairs; in a layers study the ranks give each target as many parameters as the whole
    of them has at `lora_rank`, as nearly as whole ranks can."""
    if kind != "layers":
        return [(plan.space.target.options[0], lora_rank)]
    shape = plan.shape
    budget = shape.lora_params(lora_rank, shape.normalize_target(LAYER_TARGETS[-1]))
    found = []
    for parts in LAYER_TARGETS:
        target = shape.normalize_target(parts)
        found.append((target, max(1, round(budget / shape.lora_params(1, target)))))
    return found


def _candidate(
    plan: "Plan", *, lora_rank: int, lora_alpha: float, batch: int, target: tuple[str, ...]
) -> Candidate:
    space = plan.space
    variant = space.variant.options[0]
    # Alphas are an axis of these studies, so no law of theirs moves a grid; a variant's own factor does.
    factor = lr_factor(variant, lora_alpha, lora_rank, lora_alpha)
    return Candidate(
        learning_rate=space.prior.lora * factor,
        lora_rank=lora_rank,
        lora_alpha=float(lora_alpha),
        global_batch_size=batch,
        target=target,
        lr_schedule=space.lr_schedule.options[0],
        warmup=float(space.warmup.values()[0]),
        weight_decay=float(space.weight_decay.values()[0]),
        max_grad_norm=float(space.max_grad_norm.values()[0]),
        dropout=space.dropout.options[0],
        seed=0,
        variant=variant,
    )


def _full_arm(config: "StudyConfig", plan: "Plan", batch: int, batches: tuple[int, ...]) -> Arm:
    template = _candidate(
        plan,
        lora_rank=1,
        lora_alpha=doctrine.ALPHA.value,
        batch=batch,
        target=plan.shape.normalize_target(doctrine.TARGET.value),
    )
    prior = plan.space.prior.full_ft
    full = replace(
        template,
        full_finetune=True,
        lora_rank=0,
        learning_rate=prior,
        dropout=0.0,
        variant=PLAIN,
    )
    return Arm(
        label="FullFT" + _batch_text(batch, batches),
        template=full,
        grid=_grid(config.full_learning_rate, prior, config.lr_decades),
        trained_params=plan.shape.num_params,
    )


def _lora_arm(
    config: "StudyConfig",
    plan: "Plan",
    template: Candidate,
    batches: tuple[int, ...],
    *,
    names_target: bool,
) -> Arm:
    whole = plan.shape.normalize_target(doctrine.TARGET.value)
    where = f" {'+'.join(template.target)}" if names_target or template.target != whole else ""
    kind = f"{template.variant} " if template.variant != PLAIN else ""
    return Arm(
        label=f"{kind}r{template.lora_rank} alpha {template.lora_alpha:g}{where}"
        + _batch_text(template.global_batch_size, batches),
        template=template,
        grid=_grid(config.learning_rate, template.learning_rate, config.lr_decades),
        trained_params=plan.shape.trained_params(
            template.lora_rank, template.target, template.variant
        ),
    )


def _batch_text(batch: int, batches: tuple[int, ...]) -> str:
    return f" batch {batch}" if len(batches) > 1 else ""


def _grid(given: object, centre: float, decades: float) -> tuple[float, ...]:
    """Learning rates as given, else in steps of the doctrine's width around the prior."""
    if given is not None:
        return tuple(sorted(rounded_rate(rate) for rate in values_of("learning_rate", given)))
    step = doctrine.LR_GRID_STEP_DECADES.value
    half = math.ceil(round(decades / step, 6))
    num = 2 * half + 1
    domain = LogUniform(
        low=centre * 10 ** (-half * step), high=centre * 10 ** (half * step), num=num
    )
    return tuple(rounded_rate(rate) for rate in domain.values())
