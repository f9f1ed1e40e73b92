"""Text for a terminal: what came from data, names or other people's errors must not steer it."""

import re

from trainers.credentials import masked

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""All control characters but tab and line feed, and those that turn the direction of a line."""


def printable(text: str) -> str:
    """A text as it may be shown: control characters as their escapes, no credentials."""
    return CONTROLS.sub(lambda found: _escape(found[0]), masked(text))


def _escape(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"
