"""How long the rows are: exact counts by length, and from them percentiles and a histogram."""

from collections import Counter
from collections.abc import Mapping

NUM_BINS = 12
PERCENTILES = (50, 90, 99)
STEPS = (1, 2, 5)


def percentiles(counts: Mapping[int, int]) -> dict[str, int]:
    """Length in tokens that so many percent of the rows do not exceed; empty without rows.

    Args:
        counts: length -> rows.
    """
    total, seen, found = sum(counts.values()), 0, {}
    for length in sorted(counts):
        seen += counts[length]
        for percent in PERCENTILES:
            if str(percent) not in found and 100 * seen >= percent * total:
                found[str(percent)] = length
    return found


def histogram(counts: Mapping[int, int]) -> tuple[tuple[int, int], ...]:
    """(most tokens, rows) of bins of one round width, from the shortest row's to the longest's."""
    if not counts:
        return ()
    width = _round_width(max(counts))
    bins: Counter[int] = Counter()
    for length, rows in counts.items():
        bins[-(-length // width)] += rows
    return tuple((index * width, bins[index]) for index in range(min(bins), max(bins) + 1))


def _round_width(longest: int) -> int:
    scale = 1
    while True:
        for step in STEPS:
            if step * scale * NUM_BINS >= longest:
                return step * scale
        scale *= 10
