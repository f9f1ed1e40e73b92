"""What the untouched base loses on the training data: the dataset's bits as they are, not as a rule of
thumb has them.

    measure_base_loss(spec, base)  -> BaseLoss, kept in the cache by content
    cached_base_loss(spec, base)   -> BaseLoss or None, without torch, numpy or tokenizers

The base predicts a sample of the training rows in the numbers in which the sweep holds it (row_nats.py).
Bits of the first epoch are its loss on all of them: an upper bound of what an adapter must hold.

Source: LoRA Without Regret (Thinking Machines, 2025): the bits of a data set are its total log loss in
the first epoch. Not counted: that the loss falls within the epoch.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from trainers.base_spec import BaseSpec
from trainers.data.cache import cache_root, digest_of, file_digest, read_json
from trainers.data.records import DataError
from trainers.data.spec import DataSpec
from trainers.data.tokenizer import local_folder, tokenizer_folder
from trainers.speed import measured_once

if TYPE_CHECKING:
    from trainers.data.token_set import TokenizedSet

SAMPLE_LOSS_TOKENS = 32_768
"""Loss-bearing tokens to measure on: a few percent of the loss, in seconds on a GPU."""
MIN_ROWS = 30
"""Fewer rows would say little of how much rows differ, and the interval leans on that."""
# Raise it whenever the same base and rows would be sampled or summed otherwise.
CODE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95% confidence interval; low = value = high where nothing was left out."""

    value: float
    low: float
    high: float

    def over(self, divisor: float) -> "Estimate":
        """The estimate in another unit. divisor: > 0."""
        return Estimate(
            value=self.value / divisor, low=self.low / divisor, high=self.high / divisor
        )


@dataclass(frozen=True, kw_only=True)
class BaseLoss:
    """Loss of a base on the loss-bearing tokens of a training set.

    Args:
        nats_per_token, bits_per_token: over loss-bearing tokens, of equal weight.
        bits_per_byte: over the UTF-8 bytes of the same text; None where it has none.
        num_rows, num_loss_tokens: that were measured.
        num_train_rows, num_train_loss_tokens: of the whole training set.
        quantization, dtype, device: the numbers of the base, and where they were computed.
    """

    nats_per_token: Estimate
    bits_per_token: Estimate
    bits_per_byte: Estimate | None
    num_rows: int
    num_loss_tokens: int
    num_train_rows: int
    num_train_loss_tokens: int
    quantization: str
    dtype: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BaseLoss":
        """What `to_dict` gave."""
        names = ("nats_per_token", "bits_per_token", "bits_per_byte")
        given = {name: values[name] for name in names if values[name] is not None}
        estimates: dict[str, Any] = {name: Estimate(**each) for name, each in given.items()}
        return cls(**(values | estimates))


def measure_base_loss(
    spec: DataSpec, base: BaseSpec, *, max_loss_tokens: int = SAMPLE_LOSS_TOKENS
) -> BaseLoss:
    """The base's loss on the training rows, measured once: later calls read it.

    Args:
        max_loss_tokens: about how many loss-bearing tokens to measure on; the sample is of whole
            rows, chosen by their content, at least MIN_ROWS of them.
    Raises:
        ValueError: data or base that cannot be read, or a loss that is not finite.
    """
    # numpy, which a known loss does not need.
    from trainers.data import prepare_data
    from trainers.data.token_set import TokenizedSet

    rows = prepare_data(replace(spec, packing=False)).train  # rows, not sequences of them
    assert isinstance(rows, TokenizedSet)
    path = _path(spec, base, max_loss_tokens)
    assert path is not None, "prepared data has a place in the cache"
    found = measured_once(path, lambda: _measured(spec, base, rows, max_loss_tokens).to_dict())
    return BaseLoss.from_dict(found)


def cached_base_loss(
    spec: DataSpec, base: BaseSpec, *, max_loss_tokens: int = SAMPLE_LOSS_TOKENS
) -> BaseLoss | None:
    """What `measure_base_loss` would give if it was measured before, else None.

    Raises: ValueError: no such data or base.
    """
    path = _path(spec, base, max_loss_tokens)
    values = read_json(path) if path else None
    return BaseLoss.from_dict(values) if values else None


def _path(spec: DataSpec, base: BaseSpec, max_loss_tokens: int) -> Path | None:
    """Where the loss is kept; None where the data was not prepared yet."""
    train = _train_hash(spec)
    if train is None:
        return None
    # Not the device, though "auto" may be fp32 here and bf16 there: bits that were planned with must
    # not move when a sweep is resumed on another machine. The record says what it was measured with.
    numbers = [base.quantization, base.dtype]
    key = [CODE_VERSION, train, weights_key(base), numbers, max_loss_tokens]
    return cache_root() / "base_loss" / f"{digest_of(key)}.json"


def _train_hash(spec: DataSpec) -> str | None:
    from trainers.data.parts import parts_of
    from trainers.data.prepared import set_folder

    folder = set_folder(spec, parts_of(spec), tokenizer_folder(spec.model, spec.revision))
    facts = read_json(folder / "train" / "set.json")
    return facts["content_hash"] if facts else None


def weights_key(base: BaseSpec) -> Any:
    """What stands for a base's weights: the bytes of a folder's files, or the commit of a hub id.

    Raises: DataError: a folder without weights, or a hub id that cannot be read.
    """
    folder = local_folder(base.model)
    if folder is None:
        return [base.model, tokenizer_folder(base.model, base.revision).name]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(
            f"model {base.model}: the folder must hold *.safetensors weights, it has none"
        )
    return [[file.name, file_digest(file)] for file in (folder / "config.json", *files)]


def _measured(
    spec: DataSpec, base: BaseSpec, rows: "TokenizedSet", max_loss_tokens: int
) -> BaseLoss:
    from trainers.data.sampling import content_order, taken

    size = sample_size(len(rows), rows.num_loss_tokens, max_loss_tokens)
    sample = taken(rows, content_order(rows)[:size])
    print(
        f"measuring the loss of the base {base.model} on {size:,} of {len(rows):,} training rows "
        f"({sample.num_loss_tokens:,} loss-bearing tokens), once; large bases take minutes",
        file=sys.stderr,
    )
    from trainers.row_nats import row_nats  # torch and transformers, after it was said why

    measured = row_nats(spec, base, sample)
    if not math.isfinite(sum(measured.nats)):
        raise ValueError(
            f"the loss of the base {base.model} must be finite, got {sum(measured.nats)} nats over "
            f"{sample.num_loss_tokens:,} tokens in {measured.dtype}; check its weights, or set "
            "another dtype"
        )
    tokens, num_bytes = sample.loss_token_counts.tolist(), sample.row_loss_bytes.tolist()
    nats = ratio_estimate(measured.nats, tokens, len(rows))
    per_byte = ratio_estimate(measured.nats, num_bytes, len(rows)) if any(num_bytes) else None
    return BaseLoss(
        nats_per_token=nats,
        bits_per_token=nats.over(math.log(2)),
        bits_per_byte=per_byte.over(math.log(2)) if per_byte else None,
        num_rows=size,
        num_loss_tokens=sample.num_loss_tokens,
        num_train_rows=len(rows),
        num_train_loss_tokens=rows.num_loss_tokens,
        quantization=base.quantization,
        dtype=measured.dtype,
        device=measured.device,
    )


def sample_size(num_rows: int, num_loss_tokens: int, max_loss_tokens: int) -> int:
    """Rows whose loss-bearing tokens come to about max_loss_tokens: a number that is known before any
    row is drawn, so that long and short rows are drawn alike."""
    wanted = -(-max_loss_tokens * num_rows // max(1, num_loss_tokens))
    return min(num_rows, max(MIN_ROWS, wanted))


def ratio_estimate(
    numerators: Sequence[float], denominators: Sequence[float], num_rows: int
) -> Estimate:
    """sum(numerators) / sum(denominators) over all rows, from a sample drawn without replacement.

    Args:
        numerators, denominators: of each sampled row; two rows or more, unless they are all.
        num_rows: of which the sample was drawn.

    Source: the ratio estimator with its linearised variance and the finite-population correction,
        Cochran, Sampling Techniques (1977), chapter 6; rows are the unit, as the tokens of one row
        depend on each other. Not counted: its bias, of the order of 1/n.
    """
    count, total = len(numerators), sum(denominators)
    ratio = sum(numerators) / total
    if count == num_rows:
        return Estimate(value=ratio, low=ratio, high=ratio)
    pairs = zip(numerators, denominators, strict=True)
    squares = sum((y - ratio * x) ** 2 for y, x in pairs)
    left_frac = 1 - count / num_rows
    error = math.sqrt(left_frac * count / (count - 1) * squares) / total
    margin = student_t95(count - 1) * error
    return Estimate(value=ratio, low=max(0.0, ratio - margin), high=ratio + margin)


def student_t95(dof: int) -> float:
    """Two-sided 95% point of Student's t, to four decimals from 20 degrees of freedom on.

    Source: Abramowitz and Stegun (1964), 26.7.5, the first terms.
    """
    z = NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / dof + second / dof**2 + third / dof**3
