"""The doctrine: its numbers as data, and one small function per rule, each with its citation.

Nothing else in the project holds a doctrine number. A rule is a prior and a check, never a
verdict: `tenfold plan` prints the value, the source and what the evidence says.
"""

import math
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

T_co = TypeVar("T_co", covariant=True)
Method = Literal["sft", "rl"]

BLOG = "LoRA Without Regret (Thinking Machines, 2025)"
USER_DOCTRINE = "docs/doctrine.md, section 1"
STUDY_DOCTRINE = "docs/doctrine.md, section 4"
QLORA_DOCTRINE = "docs/doctrine.md, section 5"
TINKER = "tinker-cookbook hyperparam_utils.py (Thinking Machines, 2025)"
COOKBOOKS = "TRL and tinker-cookbook GRPO recipes"


@dataclass(frozen=True, kw_only=True)
class Rule(Generic[T_co]):
    """One doctrine number: what it is, who says so, and what was checked."""

    key: str
    value: T_co
    source: str
    evidence: str


LR_RATIO = Rule(
    key="lr_ratio",
    value=10.0,
    source=BLOG,
    evidence="fitted 9.8 over 14 Llama/Qwen models; B=0, alpha 32, alpha/r, Adam, constant LR; "
    "other published pairs: 10, 20, 20, 40; docs/studies: 2.5 at hidden 192 to 8.2 at 1024",
)
LR_RATIO_SHORT = Rule(
    key="lr_ratio_short_run",
    value=15.0,
    source=BLOG,
    evidence="about 15x in runs under about 100 steps, falling to 10x",
)
SHORT_RUN_STEPS = Rule(
    key="short_run_steps",
    value=100,
    source=BLOG,
    evidence="'about 100': read off curves, not fitted",
)
LR_RATIO_WIDTH_ALPHA = Rule(
    key="lr_ratio_width_alpha",
    value=2.0,
    source=STUDY_DOCTRINE,
    evidence="the rival law hidden / (2 alpha): 10 at hidden 640, alpha 32; one rough look only",
)
LR_RATIO_ROOT = Rule(
    key="lr_ratio_root",
    value=1.4,
    source="docs/studies",
    evidence="1.4 sqrt(hidden / alpha): read off three widths, then written down before a fourth, where it held; "
    "at hidden 192 the factor is 1.05; no plan or verdict uses it",
)
STUDY_LEAST = Rule(
    key="study_least", value=(300, 3), source=STUDY_DOCTRINE, evidence="optimizer steps and seeds"
)
LR_LEVEL_WIDTH = Rule(
    key="lr_level_width",
    value=2000.0,
    source=USER_DOCTRINE,
    evidence="LR_FullFT = (2000 / hidden_size) x 1e-4; the width is shared with the tinker law",
)
LR_LEVEL = Rule(
    key="lr_level",
    value=1e-4,
    source=USER_DOCTRINE,
    evidence="within about 0.2-1.5% of the best loss on the public tulu3 sweep; "
    "at H=1024 a published sweep collapses near it (2e-3)",
)
LR_CHECKED_HIDDEN = Rule(
    key="lr_checked_hidden",
    value=(2048, 8192),
    source=USER_DOCTRINE,
    evidence="hidden sizes for which the level was checked; outside them the prior is extrapolated",
)
TINKER_LR_LEVEL = Rule(
    key="tinker_lr_level",
    value=5e-5,
    source=TINKER,
    evidence="LR_LoRA = 5e-5 x 10 x (2000 / hidden_size)^P",
)
TINKER_EXPONENTS = Rule[dict[str, float]](
    key="tinker_exponents",
    value={"llama": 0.781, "qwen": 0.0775},
    source=TINKER,
    evidence="fitted on Llama and Qwen models only; no exponent is published for other families",
)
RL_FULL_FT_LR = Rule(
    key="rl_full_ft_lr",
    value=1e-6,
    source=COOKBOOKS,
    evidence="GRPO practice: FullFT about 1e-6, LoRA 1e-5 to 4e-5; ratio kept, not the SFT level",
)
RL_LR_GRID = Rule(
    key="rl_lr_grid",
    value=(1e-6, 1e-4),
    source=COOKBOOKS,
    evidence="one decade to each side of 1e-5",
)
LR_GRID_DECADES = Rule(
    key="lr_grid_decades",
    value=0.75,
    source="Tenfold default",
    evidence="half width of the SFT grid; covers 3x to 15x of FullFT with room on both sides",
)
LR_GRID_STEP_DECADES = Rule(
    key="lr_grid_step_decades",
    value=0.25,
    source=STUDY_DOCTRINE,
    evidence="10^0.25 between neighbours: 7 points over +-0.75 decade",
)
LR_EXTRAPOLATED_DECADES = Rule(
    key="lr_extrapolated_decades",
    value=0.5,
    source=USER_DOCTRINE,
    evidence="outside the checked widths the grid reaches half a decade further down",
)
LR_COVERAGE = Rule(
    key="lr_coverage",
    value=(3.0, 15.0),
    source="huggingface/trl#4207, thinking-machines-lab/tinker-feedback#67",
    evidence="others find ratios from about 3 up to 15 (short runs): a space must cover both",
)
BATCH_RANGE = Rule(
    key="global_batch_size",
    value=(16, 64),
    source=USER_DOCTRINE,
    evidence="global batch; the blog shows the effect of large batches, not this range",
)
ALPHA = Rule(
    key="lora_alpha",
    value=32.0,
    source=BLOG,
    evidence="PEFT's default is 8; alpha = rank also published",
)
DROPOUT = Rule(
    key="dropout",
    value=0.0,
    source=USER_DOCTRINE,
    evidence="fused experts cannot train with any dropout",
)
COMPONENTS = ("attn", "mlp", "experts", "unembed")
TARGET = Rule(
    key="target",
    value=COMPONENTS,
    source=BLOG,
    evidence="attention-only is worse: rank 256 attention (0.25B) < rank 128 MLP (0.24B), 8B",
)
BITS_PER_PARAM = Rule(
    key="bits_per_param",
    value=2,
    source="Physics of Language Models 3.3 (Allen-Zhu and Li, 2024)",
    evidence="adapter_params x 2 bits >= dataset bits; an estimate, not a law",
)
BITS_AT_EXPOSURES = Rule(
    key="bits_at_exposures",
    value=((1000, BITS_PER_PARAM.value), (100, 1)),
    source=BITS_PER_PARAM.source,
    evidence="how often each fact was seen in pretraining, and the bits a parameter then held; about 1 at 100",
)
BITS_PER_TOKEN = Rule(
    key="bits_per_token",
    value=1,
    source=BLOG,
    evidence="about 1 bit (0.69 nats) per loss-bearing token; an upper bound of the need",
)
BITS_PER_EPISODE = Rule(
    key="bits_per_episode", value=1, source=BLOG, evidence="policy gradient: O(1) bits per episode"
)
QUICK_PARAMS_FACTOR = Rule(
    key="quick_params_factor",
    value=20,
    source=USER_DOCTRINE,
    evidence="hidden x 2 x 10 x layers per rank: exact for Llama-3.1-8B and Mistral-7B only",
)
RL_RANK_WARNING = Rule(
    key="rl_rank_warning",
    value=64,
    source=USER_DOCTRINE,
    evidence="GRPO collapsed at 128 and 256 in a public report",
)
MOE_RANK = Rule(
    key="moe_rank",
    value=1,
    source=BLOG,
    evidence="rank of each expert = rank / ACTIVE experts, rounded down, never below 1",
)
COMPUTE = Rule(
    key="compute_frac",
    value=(2, 6, 3),
    source=BLOG,
    evidence="(2N^2 + 6NR) / (3N^2) multiply-adds; measured: slower than FullFT up to 2.3x faster",
)
ALPHA_LR_EXPONENT = Rule(
    key="alpha_lr_exponent",
    value=-0.5,
    source=USER_DOCTRINE,
    evidence="the best LR goes as (scale x rank)^-0.5: r^0 at constant alpha, r^-0.5 with alpha = r, r^-0.25 with "
    "rsLoRA; docs/studies: 2.1x higher at alpha 8 than at 32 (this says 2)",
)
VARIANT_LR = Rule[dict[str, float]](
    key="variant_lr",
    value={"dora": 0.7, "lora_plus": 0.25, "pissa": 0.1},
    source=QLORA_DOCTRINE,
    evidence="best LR over plain LoRA's: DoRA 0.5 to 1, PiSSA about 0.1, LoRA+ what leaves the geometric mean of both "
    "its rates (its authors: about half); one seed here, hidden 192: 0.94, 0.29, 0.17, and rsLoRA 0.47",
)
LORA_PLUS_RATIO = Rule(
    key="lora_plus_ratio",
    value=16.0,
    source=QLORA_DOCTRINE,
    evidence="LR of B over that of A: about 16; it depends on model and task",
)


@dataclass(frozen=True, kw_only=True)
class SizeClass:
    """One row of the rank table; sizes in total parameters, ranks as (lowest, highest)."""

    name: str
    low_params: float
    high_params: float
    sft: tuple[int, int]
    rl: tuple[int, int]


RANK_TABLE = Rule(
    key="lora_rank",
    value=(
        SizeClass(name="1-3B", low_params=1e9, high_params=3e9, sft=(16, 32), rl=(4, 8)),
        SizeClass(name="7-8B", low_params=7e9, high_params=8e9, sft=(32, 64), rl=(8, 16)),
        SizeClass(name="13B", low_params=13e9, high_params=13e9, sft=(64, 128), rl=(16, 32)),
        SizeClass(name="34B", low_params=34e9, high_params=34e9, sft=(128, 192), rl=(32, 48)),
        SizeClass(name="70B", low_params=70e9, high_params=70e9, sft=(128, 256), rl=(32, 64)),
    ),
    source=USER_DOCTRINE,
    evidence="sizes in between: the nearest row edge in log size, ties to the smaller row",
)

RULES: tuple[Rule[object], ...] = (
    *(LR_RATIO, LR_RATIO_SHORT, SHORT_RUN_STEPS, LR_RATIO_WIDTH_ALPHA),
    *(LR_RATIO_ROOT, STUDY_LEAST),
    *(LR_LEVEL_WIDTH, LR_LEVEL, LR_CHECKED_HIDDEN),
    *(TINKER_LR_LEVEL, TINKER_EXPONENTS, RL_FULL_FT_LR, RL_LR_GRID, LR_GRID_DECADES),
    *(LR_GRID_STEP_DECADES, LR_EXTRAPOLATED_DECADES, LR_COVERAGE, BATCH_RANGE, ALPHA, DROPOUT),
    *(TARGET, BITS_PER_PARAM, BITS_AT_EXPOSURES, BITS_PER_TOKEN, BITS_PER_EPISODE),
    *(QUICK_PARAMS_FACTOR, RL_RANK_WARNING, MOE_RANK, COMPUTE, ALPHA_LR_EXPONENT),
    *(VARIANT_LR, LORA_PLUS_RATIO, RANK_TABLE),
)
"""Every rule, for `tenfold plan` and the documentation to print."""


def check_method(method: str) -> Method:
    """The method itself, if it is one.

    Raises:
        ValueError: neither 'sft' nor 'rl'.
    """
    if method == "sft" or method == "rl":
        return method
    raise ValueError(f"method must be 'sft' or 'rl', got {method!r}; set method: sft")


def size_class_of(num_params: int, size_class: str | None = None) -> SizeClass:
    """The row of the rank table for a model.

    Args:
        num_params: total parameters, embeddings and all experts counted, >= 1.
        size_class: name of a row ('7-8B'), which then wins over num_params.

    Raises:
        ValueError: num_params < 1, or no row of that name.

    Source: docs/doctrine.md, section 1: distance in log size to the row's nearest edge, ties to the
        smaller row; below 1B the first row, above 70B the last.
    """
    if size_class is not None:
        return _named_size_class(size_class)
    if num_params < 1:
        raise ValueError(f"num_params must be >= 1, got {num_params}; count the model's parameters")
    # min() keeps the first of equals: ties go to the smaller row. The distances are compared as
    # ratios of sizes, so that a tie is a tie (log differences would round).
    return min(RANK_TABLE.value, key=lambda row: _size_ratio(num_params, row))


def _named_size_class(name: str) -> SizeClass:
    for row in RANK_TABLE.value:
        if row.name == name:
            return row
    legal = ", ".join(row.name for row in RANK_TABLE.value)
    raise ValueError(
        f"size_class must be one of {legal}, got {name!r}; leave it out to use the size"
    )


def _size_ratio(num_params: int, row: SizeClass) -> float:
    """How many times num_params lies outside the row, >= 1."""
    return max(row.low_params / num_params, num_params / row.high_params, 1.0)


def rank_range(
    num_params: int, method: str = "sft", *, size_class: str | None = None
) -> tuple[int, int]:
    """Lowest and highest lora_rank of the doctrine's table for a size and method.

    Args:
        num_params: total parameters, >= 1.
        method: 'sft' or 'rl'.
        size_class: name of a row, which wins over num_params.

    Raises:
        ValueError: unknown method or size_class, num_params < 1.

    Source: RANK_TABLE.
    """
    row = size_class_of(num_params, size_class)
    return row.sft if check_method(method) == "sft" else row.rl


def ranks_in_range(low: int, high: int) -> tuple[int, ...]:
    """The ranks tried in a range: both ends and every power of two between them."""
    powers = (2**exponent for exponent in range(high.bit_length() + 1))
    return tuple(sorted({low, high, *(power for power in powers if low < power < high)}))


def full_ft_learning_rate(hidden_size: int) -> float:
    """Full fine-tuning learning rate of the doctrine, (2000 / hidden_size) x 1e-4.

    Args:
        hidden_size: model width, >= 1; checked for 2048-8192.

    Source: LR_LEVEL, LR_LEVEL_WIDTH.
    """
    return LR_LEVEL_WIDTH.value / _checked_width(hidden_size) * LR_LEVEL.value


def lora_learning_rate(full_ft_learning_rate: float) -> float:
    """Starting LoRA learning rate, 10 x full fine-tuning; under ~100 steps 15x is not modelled.

    Source: LR_RATIO.
    """
    return LR_RATIO.value * full_ft_learning_rate


def rival_lr_ratio(hidden_size: int, lora_alpha: float) -> float:
    """LoRA / FullFT learning rate by the rival law; alpha > 0. Source: LR_RATIO_WIDTH_ALPHA."""
    return _checked_width(hidden_size) / (LR_RATIO_WIDTH_ALPHA.value * lora_alpha)


def root_lr_ratio(hidden_size: int, lora_alpha: float) -> float:
    """LoRA / FullFT learning rate as Tenfold's own studies measured it; alpha > 0. Source: LR_RATIO_ROOT."""
    return LR_RATIO_ROOT.value * math.sqrt(_checked_width(hidden_size) / lora_alpha)


def tinker_lora_learning_rate(hidden_size: int, model_type: str) -> float:
    """LoRA learning rate of the tinker law, 5e-5 x 10 x (2000 / hidden_size)^P.

    Raises:
        ValueError: a family without a published exponent, or hidden_size < 1.

    Source: TINKER_LR_LEVEL, TINKER_EXPONENTS.
    """
    for family, exponent in TINKER_EXPONENTS.value.items():
        if model_type.startswith(family):
            width = LR_LEVEL_WIDTH.value / _checked_width(hidden_size)
            return TINKER_LR_LEVEL.value * LR_RATIO.value * width**exponent
    raise ValueError(
        f"lr_prior 'tinker' is known for llama and qwen only, got model_type {model_type!r}; "
        "set lr_prior: doctrine, or a number"
    )


def _checked_width(hidden_size: int) -> int:
    if hidden_size < 1:
        raise ValueError(f"hidden_size must be >= 1, got {hidden_size}; read it from config.json")
    return hidden_size


def expert_rank(lora_rank: int, num_active_experts: int) -> int:
    """Rank of each expert's adapter: lora_rank / active experts, rounded down, at least 1.

    Raises:
        ValueError: lora_rank or num_active_experts < 1.

    Source: MOE_RANK.
    """
    if lora_rank < 1 or num_active_experts < 1:
        raise ValueError(
            "lora_rank and num_active_experts must be >= 1, got "
            f"{lora_rank} and {num_active_experts}; read the active count from config.json"
        )
    return max(MOE_RANK.value, lora_rank // num_active_experts)


def expert_rank_note(lora_rank: int, num_active_experts: int) -> str:
    """One line for the plan: the rank that each expert gets, and whether the floor was used."""
    rank = expert_rank(lora_rank, num_active_experts)
    floored = " (floor: never below 1)" if lora_rank < num_active_experts else ""
    return f"rank {lora_rank} / {num_active_experts} active experts = {rank} per expert{floored}"


def lora_compute_frac(hidden_size: int, lora_rank: int) -> float:
    """Estimated multiply-adds of a LoRA pass over those of a FullFT pass, on an N x N matrix.

    An estimate: it counts no optimizer, no attention and no quantization.

    Source: COMPUTE; 0.68 at N=4096 and R=32, 0.79 at R=256.
    """
    square, low_rank, full = COMPUTE.value
    n = _checked_width(hidden_size)
    return (square * n * n + low_rank * n * lora_rank) / (full * n * n)
