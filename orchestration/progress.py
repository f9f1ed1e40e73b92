"""Shows a running sweep: a live table on a terminal, one line per event elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestration.console import PlainConsole
from orchestration.objective import LOSS, Objective
from trainers.terminal import printable


class Progress:
    """State of all trials, drawn as they report. Use as a context manager."""

    def __init__(
        self,
        names: list[str],
        num_discarded: int,
        num_examples: int,
        console: Console | None = None,
        num_trials: int | None = None,
        objective: Objective = LOSS,
    ) -> None:
        self.objective = objective
        self.console = console or PlainConsole()
        self.rows: dict[str, dict[str, Any]] = {name: {"status": "waiting"} for name in names}
        self.last_line = ""
        self.num_trials = num_trials or len(names)
        self.num_discarded, self.num_examples, self.began = (
            num_discarded,
            num_examples,
            time.monotonic(),
        )
        self.live = (
            Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        )

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def note(self, text: str) -> None:
        """Says something of the sweep as a whole."""
        self._show(text)

    def say(self, text: str) -> None:
        """Says what must not be overlooked; it stays above the table."""
        if self.live:
            self.live.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)
        else:
            self._show(text)

    def added(self, name: str) -> None:
        """A trial that was not planned is to be run, too."""
        if name not in self.rows:
            self.rows[name] = {"status": "waiting"}
            self.num_trials += 1

    def started(self, name: str) -> None:
        self.rows.setdefault(name, {})["status"] = "starting"
        self._show(f"{name}: starting")

    def reported(self, name: str, result: dict[str, Any]) -> None:
        self.rows[name] |= {
            "status": "running",
            "examples": result["examples"],
            "eval_loss": result["eval_loss"],
        }
        self._show(
            f"{name}: {result['examples']}/{self.num_examples} examples, {self.objective.key} "
            f"{self.objective.text(result['eval_loss'])}"
        )

    def ended(self, name: str, status: str, reason: str) -> None:
        self.rows[name]["status"] = status
        self._show(f"{name}: {status}{f' ({reason})' if reason else ''}")

    def _show(self, line: str) -> None:
        line = printable(line)
        if self.live:
            self.last_line = line
            self.live.update(self.table(), refresh=True)
        else:
            self.console.print(
                f"[{time.monotonic() - self.began:5.0f} s] {line}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def table(self) -> Table:
        """The trials, running ones first."""
        losses = [row["eval_loss"] for row in self.rows.values() if "eval_loss" in row]
        score = self.objective
        best = f", best {score.key} {score.text(min(losses))}" if losses else ""
        done = sum(
            row["status"] not in ("waiting", "starting", "running") for row in self.rows.values()
        )
        table = Table(
            title=f"{done}/{self.num_trials} trials ended, {self.num_discarded} candidates discarded{best}, "
            f"{time.monotonic() - self.began:.0f} s",
            caption=Text(self.last_line),  # of a str, rich would read its [words] as markup
        )
        for column in ("trial", "status", "examples", score.key):
            table.add_column(column, justify="left" if column in ("trial", "status") else "right")
        for name, row in self.rows.items():
            loss = score.text(row["eval_loss"]) if "eval_loss" in row else ""
            cells = (name, row["status"], str(row.get("examples", "")), loss)
            table.add_row(*map(Text, cells))
        return table
