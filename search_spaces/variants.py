"""LoRA's variants and alpha rules: what a candidate changes of plain LoRA, and what that does to its learning
rates."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from search_spaces import doctrine

PLAIN = "lora"
RSLORA, DORA, LORA_PLUS, PISSA = "rslora", "dora", "lora_plus", "pissa"
MEANINGS: Mapping[str, str] = {
    RSLORA: "scale alpha / sqrt(rank) (arXiv 2312.03732)",
    DORA: "a trained length for each output (arXiv 2402.09353)",
    LORA_PLUS: f"B learns {doctrine.LORA_PLUS_RATIO.value:g} times as fast as A (arXiv 2402.12354)",
    PISSA: "A and B start at the weight's largest singular vectors (arXiv 2404.02948)",
}
"""The variants, in the order in which a combination is written: 'rslora+dora'."""
WRITTEN = f"{PLAIN}, or one or more of {', '.join(MEANINGS)} joined by '+'"
"""What a variant must be, for a message."""
ON_EXPERTS = frozenset({RSLORA, LORA_PLUS})
"""Variants that fused experts can have: PEFT's ParamWrapper has no magnitudes, and no start of its own."""
WHOLE_WEIGHTS = frozenset({DORA, PISSA})
"""Variants that read the frozen weights as a matrix: they need a whole base on every worker."""


def canonical(text: str) -> str:
    """A variant, or a combination of several joined by '+', in the order of MEANINGS.

    Raises:
        ValueError: an unknown name, one that comes twice, or 'lora' beside others.
    """
    names = text.split("+")
    if names == [PLAIN]:
        return PLAIN
    if len(set(names)) < len(names) or not set(names) <= MEANINGS.keys():
        raise ValueError(f"variant must be {WRITTEN}, got {text!r}")
    return "+".join(name for name in MEANINGS if name in names)


@cache
def parts_of(variant: str) -> frozenset[str]:
    """The names in a variant; empty for plain LoRA."""
    return frozenset(variant.split("+")) - {PLAIN}


def scale(lora_alpha: float, lora_rank: int, variant: str = PLAIN) -> float:
    """The factor on B A x: lora_alpha / lora_rank, of rsLoRA lora_alpha / sqrt(lora_rank)."""
    return float(lora_alpha / (lora_rank**0.5 if RSLORA in parts_of(variant) else lora_rank))


def stored_rank(lora_rank: int, variant: str) -> int:
    """The rank that is held and saved: PiSSA's start is subtracted by as many frozen ranks again."""
    return 2 * lora_rank if PISSA in parts_of(variant) else lora_rank


def lr_factor(
    variant: str, lora_alpha: float, lora_rank: int, reference_alpha: float | None = None
) -> float:
    """What the best learning rate is multiplied by, against plain LoRA at a constant alpha.

    Args:
        variant: as `canonical` gives it.
        lora_alpha: of the candidate.
        lora_rank: nominal, >= 1.
        reference_alpha: the constant alpha of the known rate; None: the doctrine's 32.

    Source: doctrine.ALPHA_LR_EXPONENT, doctrine.VARIANT_LR.
    """
    alpha = scale(lora_alpha, lora_rank, variant) * lora_rank
    reference = doctrine.ALPHA.value if reference_alpha is None else reference_alpha
    factor = 1.0 if alpha == reference else (alpha / reference) ** doctrine.ALPHA_LR_EXPONENT.value
    for name in sorted(parts_of(variant)):
        factor *= doctrine.VARIANT_LR.value.get(name, 1.0)
    return factor


@dataclass(frozen=True)
class RankMultiple:
    """lora_alpha as a multiple of the rank, written 'rank' or '2*rank'."""

    multiple: float

    def __str__(self) -> str:
        return "rank" if self.multiple == 1 else f"{self.multiple:g}*rank"


Alpha = float | RankMultiple
"""What a user may write for lora_alpha."""


def parse_alpha(text: str) -> RankMultiple:
    """The rule that a user wrote.

    Raises:
        ValueError: not 'rank' or NUMBER*rank.
    """
    number, star, rest = text.replace(" ", "").rpartition("*")
    try:
        multiple = float(number) if star else 1.0
    except ValueError:
        multiple = 0.0
    if rest != "rank" or not 0 < multiple < float("inf"):
        raise ValueError(
            f"lora_alpha must be a finite number > 0, 'rank' or a multiple such as '2*rank', got {text!r}"
        )
    return RankMultiple(multiple)


def alpha_at(alpha: Alpha, lora_rank: int) -> float:
    """lora_alpha of an adapter of a rank."""
    return alpha.multiple * lora_rank if isinstance(alpha, RankMultiple) else alpha
