"""Whether Ray's own output is shown: `--verbose`. A variable, so that every process of a command knows."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

VARIABLE = "TENFOLD_VERBOSE"
FLAG_HELP = "show Ray's own output, with a line per evaluation in the place of the live view"


def is_verbose() -> bool:
    """Whether this command was asked to show what Ray says."""
    return os.environ.get(VARIABLE) == "1"


@contextmanager
def told(verbose: bool) -> Iterator[None]:
    """Shows Ray's own output meanwhile, where that was asked for."""
    before = os.environ.get(VARIABLE)
    if verbose:
        os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if verbose:
            os.environ.pop(VARIABLE)
            os.environ |= {} if before is None else {VARIABLE: before}


def ray_options() -> dict[str, Any]:
    """What `ray.init` is told of its output: all of it, the workers' too, or errors alone."""
    verbose = is_verbose()
    return {
        "log_to_driver": verbose,
        "logging_level": "info" if verbose else "error",
        "configure_logging": True,
    }


def tune_level() -> int:
    """Ray Tune's `verbose`: its own tables, or nothing."""
    return 2 if is_verbose() else 0
