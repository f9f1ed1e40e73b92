"""How our searchers are saved where Tune wants them saved; nothing of ours reads these files back."""

import pickle
from typing import Any


def save_state(searcher: Any, path: str) -> None:
    """Pickles what the searcher's `__getstate__` gives."""
    with open(path, "wb") as file:
        pickle.dump(searcher.__getstate__(), file)


def restore_state(searcher: Any, path: str) -> None:
    """Brings a searcher back to what Tune saved in this very process."""
    with open(path, "rb") as file:
        vars(searcher).update(pickle.load(file))
