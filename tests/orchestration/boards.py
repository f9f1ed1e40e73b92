"""A board between trials and groups, and what tests tell it and read from it."""

from orchestration.board import Board

BASE = {"model": "base", "quantization": "nf4"}
DATA = {"data": "rows.jsonl", "seq_len": 64}
ENDED_BY_SCHEDULER = {"status": "stopped", "reason": "stopped by its scheduler"}


def trial(name: str, *, full: bool = False, **other: dict) -> dict:
    """A trial's dict, as far as the board reads it."""
    parts = {"base": BASE, "data": DATA, "candidate": {"full_finetune": full}}
    return {"name": name} | parts | other


def row_event(name: str, index: int, *, last: bool = False) -> dict:
    return {"kind": "row", "trial": name, "index": index, "row": row(index), "last": last}


def end_event(name: str, status: str = "finished", reason: str = "") -> dict:
    return {"kind": "end", "trial": name, "status": status, "reason": reason}


def row(index: int) -> dict:
    return {"examples": 16 * (index + 1), "eval_loss": 3.0 - index}


def enter(name: str, index: int = 0) -> tuple:
    return ("enter", name, index)


def board_of(*groups: str, places: int = 2, one_run: bool = False) -> Board:
    """A board whose groups are ready and open."""
    board = Board(num_groups=len(groups), one_run=one_run)
    for name in groups:
        ready(board, name)
    board.open(places)
    return board


def ready(board: Board, group: str, incarnation: str = "first") -> None:
    """A group's workers start and have loaded the base."""
    assert board.begin(group, incarnation)
    board.hello(group, incarnation, {"max_tokens": 512})


def told(board: Board, group: str) -> list[tuple]:
    """What a group hears, as (kind, trial, index)."""
    return [
        (command["kind"], _name_of(command), command.get("index"))
        for command in board.take_commands(group)
    ]


def _name_of(command: dict) -> str | None:
    found = command.get("trial")
    return found["name"] if isinstance(found, dict) else found


def placed(board: Board) -> dict[str, list[str]]:
    """Group -> names of its trials, in the order in which they came."""
    return {name: [entry.name for entry in g.trials] for name, g in board.groups.items()}


def waiting(board: Board) -> list[str]:
    return [entry.name for entry in board.queue]


def ask_all(board: Board, *names: str) -> None:
    for name in names:
        board.ask(trial(name), 0)


def die(board: Board, group: str, incarnation: str) -> None:
    """A group's workers die while they train, and new ones come back."""
    board.take_commands(group)
    ready(board, group, incarnation)
