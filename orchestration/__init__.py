"""Tenfold from Python: `from orchestration import Sweep` (docs/api.md). Imported when it is asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestration.api import Sweep

__all__ = ["Sweep"]


def __getattr__(name: str) -> Any:
    if name != "Sweep":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orchestration.api import Sweep

    return Sweep
