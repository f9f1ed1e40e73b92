"""A search space as data: domains of values, and the record of one domain for each key."""

import math
import random
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from search_spaces.priors import LearningRatePrior
from search_spaces.variants import Alpha, alpha_at, lr_factor

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, kw_only=True)
class LogUniform:
    """`num` log-spaced points from low to high, or any point between them for a sampler."""

    low: float
    high: float
    num: int

    def __post_init__(self) -> None:
        if not (0 < self.low <= self.high and math.isfinite(self.high)) or self.num < 1:
            raise ValueError(f"must hold 0 < low <= high and num >= 1, got {self}; mend the range")
        if self.num == 1 and self.low != self.high:
            raise ValueError(f"num must be >= 2 for low < high, got {self}; or give one value")

    def values(self) -> tuple[float, ...]:
        """The grid's points, ascending, both ends exact."""
        if self.num == 1:
            return (self.low,)
        ratio = math.log(self.high / self.low) / (self.num - 1)
        inner = (self.low * math.exp(ratio * step) for step in range(1, self.num - 1))
        return (self.low, *inner, self.high)

    def sample(self, rng: random.Random) -> float:
        """One value, uniform in the logarithm."""
        value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        # exp(log(x)) may leave the range by a rounding.
        return min(max(value, self.low), self.high)


@dataclass(frozen=True, kw_only=True)
class Choice(Generic[T_co]):
    """One of the given options, all different."""

    options: tuple[T_co, ...]

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError("a choice must have at least one option, got none; give a value")

    def values(self) -> tuple[T_co, ...]:
        """The options, in the order given."""
        return self.options

    def sample(self, rng: random.Random) -> T_co:
        """One option, uniformly."""
        return self.options[rng.randrange(len(self.options))]


FloatDomain = LogUniform | Choice[float]
AlphaDomain = LogUniform | Choice[Alpha]


class Note(NamedTuple):
    """One line of the plan: what a key got and who says so."""

    key: str
    value: str
    source: str


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What a sweep tries: a domain for each field of a candidate, the budget, and the reasons.

    Attributes:
        epochs: passes over the data, a single option; None where `examples` is the budget.
        examples: examples that a trial sees, a single option; None where `epochs` is.
        learning_rate: of plain LoRA at reference_alpha; see rate_factor.
        lora_alpha: numbers, or rules that say it of a rank; never both kinds.
        prior: where the learning rates are centred; `grid_candidates` starts there.
        reference_alpha: the constant alpha that `learning_rate` is meant for; None: every candidate has the
            learning rate as it stands, since the user gave it.
        notes: every value with its source, for the plan; more than one note may share a key.
    """

    learning_rate: FloatDomain
    lora_rank: Choice[int]
    lora_alpha: AlphaDomain
    global_batch_size: Choice[int]
    target: Choice[tuple[str, ...]]
    lr_schedule: Choice[str]
    warmup: FloatDomain
    weight_decay: FloatDomain
    max_grad_norm: FloatDomain
    dropout: Choice[float]
    seed: Choice[int]
    epochs: Choice[float | None]
    examples: Choice[int | None]
    prior: LearningRatePrior
    notes: tuple[Note, ...]
    variant: Choice[str] = Choice(options=("lora",))
    reference_alpha: float | None = None

    def rate_factor(self, variant: str, lora_alpha: float, lora_rank: int) -> float:
        """What a learning rate of this space is multiplied by for a variant and an alpha."""
        if self.reference_alpha is None:
            return 1.0
        return lr_factor(variant, lora_alpha, lora_rank, self.reference_alpha)

    def alphas(self) -> set[float]:
        """lora_alpha of all ranks."""
        pairs = ((a, r) for a in self.lora_alpha.values() for r in self.lora_rank.options)
        return {alpha_at(alpha, rank) for alpha, rank in pairs}


@dataclass(frozen=True, kw_only=True)
class TargetDomain:
    """What of a space is admissible for one target.

    Attributes:
        target: the layers.
        lora_ranks: ranks that hold the data, ascending; empty if none does.
        cut_lora_ranks: ranks that do not.
        dropouts: dropouts that can be trained on this target.
        cut_dropouts: dropouts that cannot.
        variants, cut_variants: the same of LoRA's variants.
        sufficient_rank: smallest rank that holds the data.
        unfit_lora_ranks: ranks that hold the data and have no room in memory.
    """

    target: tuple[str, ...]
    lora_ranks: tuple[int, ...]
    cut_lora_ranks: tuple[int, ...]
    dropouts: tuple[float, ...]
    cut_dropouts: tuple[float, ...]
    sufficient_rank: int
    unfit_lora_ranks: tuple[int, ...] = ()
    variants: tuple[str, ...] = ("lora",)
    cut_variants: tuple[str, ...] = ()

    @property
    def admissible(self) -> bool:
        """Whether any candidate is left."""
        return bool(self.lora_ranks and self.dropouts and self.variants)
