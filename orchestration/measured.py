"""Bits per loss-bearing token: the doctrine's, the user's, or as the base itself loses them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.bars import working
from orchestration.config import SweepConfig
from orchestration.models import require_weights
from search_spaces import doctrine
from search_spaces.capacity import Real, dataset_bits
from search_spaces.space import DatasetFacts

if TYPE_CHECKING:
    from trainers.base_loss import BaseLoss
    from trainers.data.spec import DataSpec


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How many bits a loss-bearing token counts for, and who says so.

    Args:
        source: doctrine, measured or user.
        bits_per_token: > 0; of reinforcement learning None: an episode counts for BITS_PER_EPISODE.
        doctrine_bits: what the data would count for by the doctrine.
        base_loss: the measurement, where it is one.
    """

    source: str
    bits_per_token: Real | None
    doctrine_bits: int
    base_loss: "BaseLoss | None" = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "source": self.source,
            "bits_per_token": self.bits_per_token,
            "doctrine_bits": self.doctrine_bits,
            "measured": self.base_loss.to_dict() if self.base_loss else None,
        }


def episode_capacity(facts: DatasetFacts) -> Capacity:
    """Of reinforcement learning."""
    return Capacity(source="doctrine", bits_per_token=None, doctrine_bits=facts.bits)


def make_capacity(
    config: SweepConfig,
    spec: "DataSpec | None",
    num_tokens: int,
    known: "BaseLoss | None" = None,
) -> Capacity:
    """The bits per token that a config asks for.

    Args:
        num_tokens: loss-bearing tokens of the training data.
        known: what an earlier plan of the same sweep measured; None: measured now, or found in the
            cache.
    Raises:
        ValueError: a measurement without data or weights, or one that failed.
    """
    by_doctrine = dataset_bits(num_tokens)
    if config.capacity == "measured":
        loss = known or base_loss(config, spec)
        return Capacity(
            source="measured",
            bits_per_token=loss.bits_per_token.value,
            doctrine_bits=by_doctrine,
            base_loss=loss,
        )
    if config.capacity == "doctrine":
        per_token: Real = doctrine.BITS_PER_TOKEN.value
        return Capacity(source="doctrine", bits_per_token=per_token, doctrine_bits=by_doctrine)
    return Capacity(source="user", bits_per_token=config.capacity, doctrine_bits=by_doctrine)


def base_loss(config: SweepConfig, spec: "DataSpec | None") -> "BaseLoss":
    """The loss of a sweep's base on its training data, held as the sweep holds it; from the cache
    where it was measured before.

    Raises:
        ValueError: no data, no weights, or a loss that cannot be measured.
    """
    # 0.1 s of numpy and more, which a plan by the doctrine need not pay.
    from trainers.base_loss import cached_base_loss, measure_base_loss
    from trainers.base_spec import BaseSpec

    if spec is None:
        raise ValueError(
            "the base's loss is measured on data, got dataset_tokens alone; give data, or set "
            "capacity: doctrine"
        )
    if Path(config.model).expanduser().is_file():
        raise ValueError(
            f"the base's loss needs a model folder with weights, got the file {config.model}; give "
            "the folder, or set capacity: doctrine"
        )
    base = BaseSpec(
        model=config.model,
        revision=config.revision,
        quantization=config.quantization,
        dtype=config.dtype,
    )
    found = cached_base_loss(spec, base)
    if found is None:
        require_weights(config.model)
        with working("loading the base and measuring its loss"):
            found = measure_base_loss(spec, base)
    return found


def measured_of(plan: dict[str, Any]) -> "BaseLoss | None":
    """The measurement that a plan.json holds, so that who goes on with the sweep need not repeat it."""
    from trainers.base_loss import BaseLoss

    found = (plan.get("capacity") or {}).get("measured")
    return BaseLoss.from_dict(found) if found else None


def capacity_sentence(plan: dict[str, Any]) -> str:
    """Bits per token of a plan and where they are from, in one line."""
    capacity = plan["capacity"]
    if capacity["bits_per_token"] is None:
        return f"{doctrine.BITS_PER_EPISODE.value} bit per episode ({doctrine.BITS_PER_EPISODE.source})"
    found, by_doctrine = capacity["measured"], f"{capacity['doctrine_bits']:,} bits"
    rule = f"the doctrine's {doctrine.BITS_PER_TOKEN.value} bit/token gives {by_doctrine}"
    if capacity["source"] == "doctrine":
        return f"{doctrine.BITS_PER_TOKEN.value} bit per loss-bearing token ({doctrine.BITS_PER_TOKEN.source})"
    if found is None:
        return f"{capacity['bits_per_token']:g} bits per loss-bearing token, as given; {rule}"
    return f"{measured_text(found)}; {rule}"


def measured_text(found: dict[str, Any]) -> str:
    """A measurement in words: bits with their interval, and on how much of the data."""
    per_token, per_byte = found["bits_per_token"], found["bits_per_byte"]
    of_bytes = f" ({interval_text(per_byte)} bits/byte)" if per_byte else ""
    rows = f"{found['num_rows']:,} of {found['num_train_rows']:,} training rows"
    return (
        f"the base loses {interval_text(per_token)} bits per loss-bearing token{of_bytes}, measured on "
        f"{rows} ({found['num_loss_tokens']:,} tokens, {found['quantization']}, {found['dtype']}, "
        f"{found['device']})"
    )


def interval_text(estimate: dict[str, float]) -> str:
    """A value with its 95% interval; exact where everything was measured."""
    if estimate["low"] == estimate["high"]:
        return f"{estimate['value']:.3f} (exact)"
    return f"{estimate['value']:.3f} (95%: {estimate['low']:.3f} to {estimate['high']:.3f})"
