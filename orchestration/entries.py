"""What a board keeps of trials and worker groups (board.py). Pure, no Ray."""

from dataclasses import dataclass, field
from typing import Any

from orchestration.suspects import Blame


@dataclass
class Entry:
    """One trial. rows: evaluation number -> row. ended: status and reason, when it has ended."""

    trial: dict[str, Any]
    asked: int
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    last_index: int | None = None
    ended: dict[str, str] | None = None
    group: str | None = None
    home: str | None = None
    """The group whose forwards it shared last: there they can be done again alike (trainers/replay.py)."""
    ahead: bool = False  # of all that were planned: a clone, see live_searcher.py
    blame: Blame = field(default_factory=Blame)

    @property
    def name(self) -> str:
        return self.trial["name"]

    @property
    def pack_key(self) -> str:
        """What trials must share to share a pack: base, quantization, data and sequence length."""
        return repr([sorted(self.trial[part].items()) for part in ("base", "data")])

    @property
    def full(self) -> bool:
        """Whether it trains the base itself, and so needs a group for itself."""
        return self.trial["candidate"]["full_finetune"]


@dataclass
class Group:
    """One worker group: its places, its trials in the order in which they came, what it must hear."""

    incarnation: str
    """Of its living workers; empty while it has none that are ready."""
    info: dict[str, Any]
    attempt: str = ""
    """The start of the Train run that its living workers belong to."""
    trials: list[Entry] = field(default_factory=list)
    commands: list[dict[str, Any]] = field(default_factory=list)
    lost: str = ""
    """Why it will not come back, when it will not."""
    leaving: bool = False
    """Whether its node is being taken away: it gets no more trials, and its death is no trial's fault."""
    num_heard: int = 0
    early: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Events that overtook others on their way, by number."""
