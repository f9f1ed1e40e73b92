"""The loss of a base on each row of a set."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from trainers.adapters import Pack
from trainers.base_model import DTYPES, device_name, load_base
from trainers.base_spec import BaseSpec
from trainers.batches import RowSource
from trainers.data.spec import DataSpec
from trainers.data.tokenizer import load_tokenizer
from trainers.head import LossHead, check_head

if TYPE_CHECKING:
    from trainers.data.token_set import TokenizedSet

FORWARD_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Of one forward, which keeps nothing for a backward pass."""


@dataclass(frozen=True, kw_only=True)
class RowNats:
    """nats: summed over the loss-bearing tokens of each row; dtype and device as people write them."""

    nats: list[float]
    dtype: str
    device: str


def row_nats(spec: DataSpec, base: BaseSpec, rows: "TokenizedSet") -> RowNats:
    """Nats of each row of a base that is loaded for it and let go.

    Raises:
        ValueError: a base that cannot be loaded, whose head is not known, or that does not fit.
    """
    pad_id = load_tokenizer(spec.model, revision=spec.revision).pad_id
    try:
        pack = Pack(load_base(base))
        check_head(pack)
        nats = nats_by_row(pack, RowSource(rows, pad_id, pack.device))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the base {base.model} must fit on this device to measure its loss, it does not "
            f"({str(error).splitlines()[0]})"
        ) from error
    device, dtype = pack.device, pack.model.dtype
    del pack
    if device.type == "cuda":
        torch.cuda.empty_cache()  # a sweep's workers come to this device next
    return RowNats(
        nats=nats.tolist(),
        dtype=next(name for name, known in DTYPES.items() if known == dtype),
        device=device_name(device),
    )


def nats_by_row(pack: Pack, source: RowSource) -> np.ndarray:
    """Nats of each row under a pack's base, float64 [R]."""
    head, nats = LossHead(pack), np.zeros(len(source))
    left = np.argsort(-source.lengths, kind="stable")
    while len(left):
        height = max(1, FORWARD_TOKENS[pack.device.type] // int(source.lengths[left[0]]))
        part, left = left[:height], left[height:]
        # A row is a segment, as the head sums by segments; nothing is trained, so no scale counts.
        batch = source.batch([part[k : k + 1] for k in range(len(part))], head.max_positions)
        nats[part] = head.train_nats(batch, (), [0.0] * len(part)).cpu().numpy()
    return nats
