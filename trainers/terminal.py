"""Text for a terminal: what came from data, names or other people's errors must not steer it."""

import os
import re
import sys
from typing import TextIO

from trainers.credentials import masked

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""All control characters but tab and line feed, and those that turn the direction of a line."""


def is_coloured(stream: TextIO | None = None) -> bool:
    """Whether colours mean something on a stream (default: stdout), and nobody asked for none (https://no-color.org)."""
    is_terminal = (stream or sys.stdout).isatty()
    return is_terminal and takes_escapes() and not os.environ.get("NO_COLOR")


def takes_escapes() -> bool:
    """Whether a terminal that there is does more than show text."""
    return os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def printable(text: str) -> str:
    """A text as it may be shown: control characters as their escapes, no credentials."""
    return CONTROLS.sub(lambda found: _escape(found[0]), masked(text))


def _escape(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"
