"""Numbers that a user sets in the environment."""

import math
import os


def seconds_from(variable: str, default: float) -> float:
    """A variable's seconds, or the default where it is not set.

    Raises:
        ValueError: no number above 0.
    """
    text = os.environ.get(variable, "")
    try:
        seconds = float(text or default)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(
            f"{variable} must be a number of seconds above 0, got {text!r}; unset it for {default:g}"
        )
    return seconds
