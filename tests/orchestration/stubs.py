"""`tenfold` with workers that train nothing: a real command line, Ray, Tune, pool and broker; only what a worker
would compute is made up. `python -m tests.orchestration.stubs VERB ...` takes the place of `tenfold VERB ...`.

A trial's losses are those that its dict names ("losses": one an evaluation, not finite where it diverges and None
where it fails), or follow from its learning rate.
"""

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

LOADER_VARIABLE = "TENFOLD_STUB_LOADERS"
"""How many processes of a torch DataLoader feed a group's first worker."""
PACE_VARIABLE = "TENFOLD_STUB_PACE_S"
"""What an evaluation takes."""
HELD_VARIABLE = "TENFOLD_STUB_HELD"
"""A file: workers load as long as it is there, and say so in files FILE.PID."""
REPORT_HELD_VARIABLE = "TENFOLD_STUB_REPORT_HELD"
"""The same of the driver, before it writes the report."""


def serve(config: dict[str, Any]) -> None:
    """A group's workers: the first tells each row that is asked for, the others follow its commands."""
    from orchestration.broker_link import link_of
    from trainers.comm import Comm
    from trainers.run_lock import hold_run

    comm, link = Comm(alone=len(config["groups"]) > 1), link_of(config)
    link.here()
    if not comm.share(link.begin() if comm.world_rank == 0 else None):
        return
    with hold_run(Path(config["warm"]["folder"])):
        _wait_while(os.environ.get(HELD_VARIABLE))
        if comm.world_rank == 0:
            link.hello({"device": "stub", "max_tokens": 512, "peak_bytes": 0, "loaded_in_s": 0.0})
        _serve(link, comm)


def _wait_while(held: str | None) -> None:
    if held:
        Path(f"{held}.{os.getpid()}").touch()
        while Path(held).exists():
            time.sleep(0.1)


def _serve(link: Any, comm: Any) -> None:
    members: dict[str, Member] = {}
    batches = _batches()
    while True:
        busy = any(member.may_train for member in members.values())
        for command in comm.share(link.commands(idle=not busy) if comm.world_rank == 0 else None):
            if command["kind"] == "stop":
                return
            _obey(command, members, link, comm)
        for name, member in list(members.items()):
            if member.may_train:
                next(batches)
                if not member.evaluate(link):
                    del members[name]


def _obey(command: dict[str, Any], members: "dict[str, Member]", link: Any, comm: Any) -> None:
    if command["kind"] == "enter":
        member = Member(command["trial"], command["index"], comm)
        if member.goes_on(link):
            members[member.name] = member
    elif command["kind"] == "cancel":
        members.pop(command["trial"], None)
    elif command["trial"] in members:
        members[command["trial"]].allowed = command["index"]


def _batches() -> Any:
    """Endless batches, from processes of their own where LOADER_VARIABLE asks for some."""
    from torch.utils.data import DataLoader

    return iter(DataLoader(range(1 << 30), num_workers=int(os.environ.get(LOADER_VARIABLE, "0"))))  # type: ignore


class Member:
    """A trial that a worker serves; `is_first`: of its group, the one that writes and tells."""

    def __init__(self, trial: dict[str, Any], allowed: int, comm: Any) -> None:
        from trainers.paths import TrialPaths, read_json_lines

        self.is_first = comm.world_rank == 0
        self.trial, self.allowed, self.name = trial, allowed, trial["name"]
        self.paths = TrialPaths(Path(trial["folder"]))
        # Of all workers alike: the first may soon write more.
        known = comm.share(read_json_lines(self.paths.metrics) if self.is_first else None)
        self.rows = known or [row_of(trial, 0, 3.5)]

    @property
    def next_index(self) -> int:
        return len(self.rows) - 1

    @property
    def may_train(self) -> bool:
        return self.allowed >= self.next_index

    def goes_on(self, link: Any) -> bool:
        """Tells what a driver that died may not have heard; False: that was all."""
        from trainers.paths import write_json_lines

        if self.is_first:
            write_json_lines(self.paths.metrics, self.rows)
        for index, row in enumerate(self.rows[1:] if self.is_first else ()):
            self._tell_row(link, index, row)
        ended = self.rows[-1]["examples"] >= self.trial["num_examples"]
        if ended:
            self._end(link, "finished", "", self.rows[-1])
        return not ended

    def evaluate(self, link: Any) -> bool:
        """The next evaluation; False: the trial has ended with it."""
        from trainers.paths import write_json_lines

        time.sleep(float(os.environ.get(PACE_VARIABLE, "0")))
        index = self.next_index
        loss = loss_of(self.trial, index)
        row = row_of(self.trial, index + 1, loss)
        (self.paths.root / "evaluated").open("a").write(f"{os.getpid()} {row['examples']}\n")
        if loss is None or not math.isfinite(loss):
            status = "failed" if loss is None else "diverged"
            self._end(link, status, f"eval_loss {loss} at step {row['steps']}", row)
            return False
        self.rows.append(row)
        last = row["examples"] >= self.trial["num_examples"]
        if self.is_first:
            write_json_lines(self.paths.metrics, self.rows)
            self._save()
            self._tell_row(link, index, row)
        if last:
            self._end(link, "finished", "", row)
        return not last

    def _tell_row(self, link: Any, index: int, row: dict[str, Any]) -> None:
        last = row["examples"] >= self.trial["num_examples"]
        if last:
            self._write_status("finished", "", row)
        link.tell({"kind": "row", "trial": self.name, "index": index, "row": row, "last": last})

    def _write_status(self, status: str, reason: str, row: dict[str, Any]) -> None:
        from trainers.recorder import Recorder

        Recorder.write_status(self.paths, status, reason, row["examples"], row["steps"])

    def _end(self, link: Any, status: str, reason: str, row: dict[str, Any]) -> None:
        if self.is_first:
            self._write_status(status, reason, row)
            link.tell({"kind": "end", "trial": self.name, "status": status, "reason": reason})

    def _save(self) -> None:
        """Weights that hold the trial's name."""
        from trainers.integrity import seal_folder
        from trainers.paths import replace_folder, temporary_folder, write_json

        folder = temporary_folder(self.paths.best)
        write_json(folder / "adapter_config.json", {"r": 1, "trial": self.name})
        seal_folder(folder)
        replace_folder(folder, self.paths.best)


def loss_of(trial: dict[str, Any], index: int) -> float | None:
    """Loss of an evaluation (from 0)."""
    if "losses" in trial:
        return trial["losses"][min(index, len(trial["losses"]) - 1)]
    return 2 + abs(math.log10(trial["candidate"]["learning_rate"]) + 2.5) + 1 / (2 + index)


def row_of(trial: dict[str, Any], number: int, loss: float | None) -> dict[str, Any]:
    """The row of evaluation `number` (0: the untouched base)."""
    examples = min(number * trial["eval_every"], trial["num_examples"])
    row: dict[str, Any] = dict.fromkeys(("examples", "tokens", "loss_tokens"), examples)
    row |= {"steps": number, "train_loss": loss if number else None, "eval_loss": loss}
    row |= {"eval_bits_per_byte": loss, "lr": 1e-3, "grad_norm": 1.0, "seconds": 0.1}
    return row | {"peak_bytes": 0}


def main() -> int:
    """`tenfold`, with `serve` in the place of its workers."""
    from orchestration import cli, pool

    pool._serve = serve
    if held := os.environ.get(REPORT_HELD_VARIABLE):
        _hold_report(held)
    return cli.main()


def _hold_report(held: str) -> None:
    from orchestration import report

    write = report.write_report

    def held_back(*arguments: Any) -> Any:
        _wait_while(held)
        return write(*arguments)

    report.write_report = held_back


if __name__ == "__main__":
    # What __main__ holds would travel to the workers by value.
    from tests.orchestration import stubs

    sys.exit(stubs.main())
