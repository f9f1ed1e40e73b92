"""The retention set: general text whose loss tells what training costs the base of what it knew."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainers.data.cache import read_json, write_json
from trainers.data.records import DataError
from trainers.data.spec import DataSpec

if TYPE_CHECKING:
    from trainers.data.token_set import TokenizedSet

RETENTION_LOSS_TOKENS = 32_768
"""Most loss-bearing tokens of it that are used. Every evaluation of every trial pays for them, and the
difference to the base on the same rows, which is what is read from them, is settled by fewer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RetentionSet:
    """The rows that are evaluated, and how many rows and loss-bearing tokens they were chosen from."""

    rows: "TokenizedSet"
    num_all_rows: int
    num_all_loss_tokens: int


@contextmanager
def _told() -> Iterator[None]:
    """Says of an error in which of a sweep's files it is."""
    try:
        yield
    except DataError as error:
        raise DataError(f"retention: {error}") from error


def retention_facts(spec: DataSpec) -> dict[str, Any] | None:
    """What of the retention set is evaluated, in numbers; None where the spec names none. Known ones
    are read without numpy.

    Raises: DataError: as `retention_set`.
    """
    if spec.retention is None:
        return None
    from trainers.data.prepared import whole_folder

    with _told():
        folder = whole_folder(spec, spec.retention)
    kept = folder / f"retention-{RETENTION_LOSS_TOKENS}.json"
    facts = read_json(kept)
    if facts is None:
        found = retention_set(spec)
        assert found is not None
        facts = {
            "num_rows": len(found.rows),
            "num_loss_tokens": found.rows.num_loss_tokens,
            "num_all_rows": found.num_all_rows,
            "num_all_loss_tokens": found.num_all_loss_tokens,
        }
        write_json(kept, facts)
    return {"data": spec.retention} | facts


def retention_set(spec: DataSpec) -> RetentionSet | None:
    """The retention set of a spec: its first rows by a hash of their content, up to
    RETENTION_LOSS_TOKENS, one at least. None where the spec names none.

    Raises: DataError: it cannot be read, or nothing of it is left.
    """
    if spec.retention is None:
        return None
    # numpy costs 0.1 s, which a plan without a retention set need not pay.
    import numpy as np

    from trainers.data.prepared import prepare_whole
    from trainers.data.sampling import content_order, taken

    with _told():
        rows, _ = prepare_whole(spec, spec.retention)
    order = content_order(rows)
    running = np.cumsum(rows.loss_token_counts[order])
    fitting = int(np.searchsorted(running, RETENTION_LOSS_TOKENS, side="right"))
    return RetentionSet(
        rows=taken(rows, order[: max(1, fitting)]),
        num_all_rows=len(rows),
        num_all_loss_tokens=rows.num_loss_tokens,
    )
