"""Where a sweep is told of: a terminal on which text is text, whoever wrote it."""

from typing import Any

from rich.console import Console

from trainers.terminal import printable


class PlainConsole(Console):
    """Reads no markup in what it prints, shows control characters as their escapes, and no credentials."""

    def __init__(self) -> None:
        super().__init__(highlight=False, markup=False)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's."""
        plain = (printable(one) if isinstance(one, str) else one for one in objects)
        super().print(*plain, **options)
