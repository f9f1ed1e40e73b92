"""A forward that does not fit: the forwards of its pack are halved, the global batch stays, and what was done of
it is done again. A single row that does not fit fails its trial alone."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from trainers.comm import Comm
from trainers.composer import ForwardLimits

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
"""What CUDA's, the CPU's and cuBLAS' allocators say."""


class NoRoomError(ValueError):
    """One row of a trial does not fit. On all workers alike."""


@dataclass(frozen=True)
class Shortage:
    """A forward that did not fit.

    Args:
        tokens: of the forward, padding included; on several workers the mean of those that had none.
        is_single: it was of one row.
        text: what the allocator said; empty on a worker that had room.
    """

    tokens: int
    is_single: bool
    text: str = ""

    def reason(self, peak_bytes: int) -> str:
        """Why a trial failed of it."""
        told = self.text or "on another worker"
        return (
            f"out of memory in a forward of a single row ({self.tokens} tokens): {told}; this worker's peak: "
            f"{peak_bytes:,} bytes"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of an allocator without room."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def shortage_of(error: BaseException, rows: int, width: int) -> Shortage:
    """What is known of a forward of so many rows and tokens a row."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return Shortage(rows * width, rows == 1, text[:300])


def shortage_in(
    work: Callable[[], None],
    parts: Sequence[np.ndarray] = (),
    lengths: np.ndarray | None = None,
    *,
    waited_for: bool = False,
) -> Shortage | None:
    """Does work; what it had no room for, else None.

    Args:
        parts: the rows that it is for, [rows] each, some perhaps empty.
        lengths: tokens of every row.
        waited_for: other workers wait in a gather for this one (a sharded base): it must end without room, and
            they with it.
    """
    try:
        work()
        return None
    except (RuntimeError, MemoryError) as error:
        if waited_for or not is_out_of_memory(error):
            raise
        widths = [int(lengths[part].max()) for part in parts if lengths is not None and len(part)]
        return shortage_of(error, sum(map(len, parts)), max(widths, default=0))


def give_back() -> None:
    """Frees what the failed forward left; to be called when its error is no longer held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def halved(limits: ForwardLimits, shortages: Sequence[Shortage]) -> ForwardLimits:
    """Limits under which forwards like these are half as large."""
    tokens = max(shortage.tokens for shortage in shortages)
    return replace(limits, max_tokens=min(limits.max_tokens, max(1, tokens // 2)))


def shared(
    found: Sequence[Shortage | None], comm: Comm, device: torch.device
) -> list[Shortage | None]:
    """The shortages of several batches over all workers, alike on each."""
    if comm.world_size == 1:
        return list(found)
    numbers = [_numbers(shortage) for shortage in found]
    summed = comm.sum(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()
    return [_shortage(each, own) for each, own in zip(summed, found, strict=True)]


def _numbers(shortage: Shortage | None) -> list[float]:
    return [0, 0, 0] if shortage is None else [1, shortage.tokens, shortage.is_single]


def _shortage(numbers: Sequence[float], own: Shortage | None) -> Shortage | None:
    count, tokens, single = numbers
    if not count:
        return None
    return Shortage(int(tokens / count), single > 0, own.text if own else "")


def require_room(shortage: Shortage | None, comm: Comm, device: torch.device) -> None:
    """Raises:
    NoRoomError: a worker had no room for a single row. On all workers alike.
    """
    (found,) = shared([shortage], comm, device)
    if found is not None:
        raise NoRoomError(found.reason(comm.peak_bytes(device)))
