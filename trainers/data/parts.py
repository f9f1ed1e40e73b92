"""What a dataset is made of: files, folders or hub ids, their weights, and what of them is held out."""

from dataclasses import dataclass

from trainers.data.sources import Source, resolve_source
from trainers.data.spec import DataSpec

DIGEST_RANGE = 2**64


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file, folder or hub id of a dataset.

    Args:
        data: as the user wrote it.
        weight: how often its rows stand in an epoch; below 1, the part of them (by content hash).
        held_out_frac: part of its rows that is held out, by content hash.
    """

    data: str
    source: Source
    weight: float = 1.0
    held_out_frac: float = 0.0

    def copies(self, digest: bytes) -> int:
        """How often a row stands in an epoch. Its own half of the hash decides, so that the split
        does not move with the weight."""
        whole, rest = divmod(self.weight, 1)
        return int(whole) + (position(digest[8:16]) < rest)


def parts_of(spec: DataSpec) -> list[Part]:
    """What a spec trains on and holds out. Raises: DataError: no such data."""
    frac = 0.0 if isinstance(spec.eval, str) else spec.eval
    parts = [
        Part(
            data=data,
            source=resolve_source(data, spec.data_revision),
            weight=weight,
            held_out_frac=frac,
        )
        for data, weight in spec.weights.items()
    ]
    if isinstance(spec.eval, str):
        parts.append(Part(data=spec.eval, source=resolve_source(spec.eval), held_out_frac=1.0))
    return parts


def position(digest: bytes) -> float:
    """Where a hash falls within 0..1."""
    return int.from_bytes(digest, "big") / DIGEST_RANGE


def file_names(source: Source) -> list[str]:
    """The names by which rows of a source are placed, in reading order."""
    if source.hub_id is not None:
        return [source.hub_id]
    return [str(source.saved)] if source.saved is not None else [str(path) for path in source.files]
