"""Candidates: one configuration to train, its name, and the ways to draw many of a space."""

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from search_spaces import variants
from search_spaces.domains import Choice, FloatDomain, SearchSpace, TargetDomain
from search_spaces.values import check_value

MAX_TARGET_CHARS = 48
"""Longer target lists are counted in a trial's name, not spelled; the hash tells them apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One configuration of a sweep; the same fields as a search space.

    Attributes:
        learning_rate: peak, > 0.
        lora_rank: nominal rank; 0 where full_finetune.
        lora_alpha: scale numerator; an adapter's scale is lora_alpha / its rank (rsLoRA: its root).
        global_batch_size: examples of one optimizer step, all workers and accumulation together.
        target: component and module names of the model, as `ModelShape.normalize_target` gives.
        lr_schedule: 'constant', 'linear' or 'cosine'.
        warmup: below 1 a fraction of the steps, else a number of steps.
        weight_decay: of AdamW.
        max_grad_norm: clip; 0 is no clipping.
        dropout: in [0, 1).
        seed: of data order and of the adapter's start.
        full_finetune: train all parameters instead of an adapter.
        variant: 'lora', or what of variants.MEANINGS it is, joined by '+'.
    """

    learning_rate: float
    lora_rank: int
    lora_alpha: float
    global_batch_size: int
    target: tuple[str, ...]
    lr_schedule: str
    warmup: float
    weight_decay: float
    max_grad_norm: float
    dropout: float
    seed: int
    full_finetune: bool = False
    variant: str = variants.PLAIN

    @property
    def scale(self) -> float:
        """The factor on B A x; 0 where full_finetune. Experts, of a lower rank, have a larger one."""
        if self.full_finetune:
            return 0.0
        return variants.scale(self.lora_alpha, self.lora_rank, self.variant)

    @property
    def scaled_learning_rate(self) -> float:
        """learning_rate x scale: what a step moves the layer by, as far as rank and alpha decide it."""
        return self.learning_rate * self.scale

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields; equal candidates give equal dicts (1 and 1.0 are both 1.0). Plain LoRA is not
        named: the trials of before there were variants keep their names."""
        values = asdict(self)
        for key in _FLOAT_KEYS:
            values[key] = float(values[key])
        if self.variant == variants.PLAIN:
            del values["variant"]
        return {**values, "target": list(self.target)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Candidate":
        """The candidate that `to_dict` wrote.

        Raises:
            ValueError: a missing or unknown key, or a value out of range.
        """
        names = {field.name for field in fields(cls)}
        missing = names - {"full_finetune", "variant"} - set(values)
        unknown = set(values) - names
        if missing or unknown:
            raise ValueError(
                f"a candidate must have the keys {', '.join(sorted(names))}; "
                f"missing {sorted(missing)}, unknown {sorted(unknown)}"
            )
        full = values.get("full_finetune", False)
        if not isinstance(full, bool):
            raise ValueError(f"full_finetune must be true or false, got {full!r}")
        skipped = {"target", "full_finetune", *(["lora_rank"] if full else [])}
        checked = {key: check_value(key, values[key]) for key in values.keys() - skipped}
        rank = {"lora_rank": values["lora_rank"]} if full else {}
        return cls(**checked, **rank, target=_target(values["target"]), full_finetune=full)


_FLOAT_KEYS = tuple(field.name for field in fields(Candidate) if field.type is float)


def _target(value: object) -> tuple[str, ...]:
    if isinstance(value, (list, tuple)):
        names = tuple(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        if names and all(isinstance(name, str) for name in names):  # pyright: ignore[reportUnknownVariableType]
            return names  # pyright: ignore[reportUnknownVariableType]
    raise ValueError(f"target of a candidate must be a non-empty list of names, got {value!r}")


def trial_name(candidate: Candidate) -> str:
    """A readable file name plus 8 hex digits of the hash of the whole candidate.

    Example: r16-lr3.1e-04-b16-attn+mlp+unembed-1a2b3c4d
    """
    text = json.dumps(candidate.to_dict(), sort_keys=True, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    head = "full" if candidate.full_finetune else f"r{candidate.lora_rank}"
    parts = [] if candidate.variant == variants.PLAIN else [candidate.variant]
    parts += [head, f"lr{candidate.learning_rate:.1e}", f"b{candidate.global_batch_size}"]
    if not candidate.full_finetune:
        parts.append(_target_text(candidate.target))
    return "-".join([*parts, digest])


def _target_text(target: Sequence[str]) -> str:
    text = re.sub(r"[^A-Za-z0-9+._]", "_", "+".join(target))
    return text if len(text) <= MAX_TARGET_CHARS else f"{len(target)}layers"


def grid_candidates(space: SearchSpace) -> Iterator[Candidate]:
    """All combinations of the space's values, lazily.

    The learning rate nearest the prior comes first, with every combination of the other keys, then
    the next nearest: a sweep that is cut short has tried the doctrine's centre. Each variant and alpha
    has that rate multiplied by its own factor (SearchSpace.rate_factor).
    """
    # Rounded, so that of two equally near rates the lower one is first on every machine.
    rates = sorted(
        space.learning_rate.values(),
        key=lambda rate: (round(abs(math.log(rate / space.prior.lora)), 9), rate),
    )
    axes: list[tuple[Any, ...]] = [getattr(space, name).values() for name in GRID_FIELDS]
    for rate in rates:
        for values in itertools.product(*axes):
            yield make_candidate(
                space, learning_rate=rate, **dict(zip(GRID_FIELDS, values, strict=True))
            )


def grid_size(space: SearchSpace) -> int:
    """How many candidates `grid_candidates` gives."""
    axes = ("learning_rate", *GRID_FIELDS)
    return math.prod(len(getattr(space, name).values()) for name in axes)


GRID_FIELDS = (
    "target",
    "lora_rank",
    "global_batch_size",
    "lora_alpha",
    "lr_schedule",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "dropout",
    "seed",
    "variant",
)
"""Fields that a grid goes through for each learning rate, the last one fastest."""


def make_candidate(
    space: SearchSpace,
    *,
    learning_rate: float,
    lora_rank: int,
    lora_alpha: variants.Alpha,
    variant: str,
    **others: Any,
) -> Candidate:
    """The candidate of one point of a space's domains: alpha and learning rate as they are at its rank."""
    alpha = variants.alpha_at(lora_alpha, lora_rank)
    return Candidate(
        learning_rate=learning_rate * space.rate_factor(variant, alpha, lora_rank),
        lora_rank=lora_rank,
        lora_alpha=alpha,
        variant=variant,
        **others,
    )


def random_candidates(
    space: SearchSpace,
    num_candidates: int,
    seed: int,
    domains: Sequence[TargetDomain] | None = None,
) -> Iterator[Candidate]:
    """Random points of the space, lazily; equal seeds give equal points.

    Args:
        space: LogUniform is sampled between its grid points too; choices uniformly.
        num_candidates: how many, >= 0.
        seed: of this sequence alone.
        domains: what `pruner.cut_rank_domain` left: only admissible points are drawn.

    Raises:
        ValueError: num_candidates < 0, or no admissible domain.
    """
    if num_candidates < 0:
        raise ValueError(f"num_candidates must be >= 0, got {num_candidates}")
    cut = [domain for domain in domains or () if domain.admissible]
    if domains is not None and not cut:
        raise ValueError("domains must hold an admissible target, got none; set capacity_policy")
    return _draw(space, num_candidates, random.Random(seed), cut)


def _draw(
    space: SearchSpace, num_candidates: int, rng: random.Random, cut: Sequence[TargetDomain]
) -> Iterator[Candidate]:
    for _ in range(num_candidates):
        # One draw for each key in a fixed order, so that a seed means the same sequence.
        if cut:
            domain = cut[rng.randrange(len(cut))]
            target = domain.target
            ranks, dropouts = Choice(options=domain.lora_ranks), Choice(options=domain.dropouts)
            kinds: Choice[str] = Choice(options=domain.variants)
        else:
            target, ranks, dropouts = space.target.sample(rng), space.lora_rank, space.dropout
            kinds = space.variant
        yield make_candidate(
            space,
            learning_rate=space.learning_rate.sample(rng),
            lora_rank=ranks.sample(rng),
            lora_alpha=space.lora_alpha.sample(rng),
            global_batch_size=space.global_batch_size.sample(rng),
            target=target,
            lr_schedule=space.lr_schedule.sample(rng),
            warmup=_sample(space.warmup, rng),
            weight_decay=_sample(space.weight_decay, rng),
            max_grad_norm=_sample(space.max_grad_norm, rng),
            dropout=dropouts.sample(rng),
            seed=space.seed.sample(rng),
            # Last, and no draw for a single one: the draws of before there were variants stay.
            variant=kinds.sample(rng) if len(kinds.options) > 1 else next(iter(kinds.options)),
        )


def _sample(domain: FloatDomain, rng: random.Random) -> float:
    return domain.sample(rng)
