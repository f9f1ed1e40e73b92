"""Faults for the workers of a real sweep. Python imports this file at the start of every process that has its folder on
PYTHONPATH; the variable TENFOLD_TEST_FAULT names what happens there when trainers.loop is imported (one; another).

    kill RATE STEP      kills the worker whenever a run of that learning rate has done so many steps
    kill-once PATH N..  kills the worker at its Nth forward, once for each N: a file PATH-N says that it happened
    no-room TOKENS      forwards of more tokens find no memory
    no-room-for RATE    no forward of a run of that learning rate finds memory
"""

import importlib.abc
import importlib.util
import os
import signal
import sys

TARGET = "trainers.loop"
BYTES = 1 << 50


def kill(trainer_class, rate: str, step: str) -> None:
    advance = trainer_class.advance

    def advanced(self, active):
        if any(run.spec.learning_rate == float(rate) and run.steps >= int(step) for run in active):
            os.kill(os.getpid(), signal.SIGKILL)
        return advance(self, active)

    trainer_class.advance = advanced


def kill_once(trainer_class, path: str, *numbers: str) -> None:
    advance, count = trainer_class.advance, [0]

    def advanced(self, active):
        count[0] += 1
        mark = f"{path}-{count[0]}"
        if str(count[0]) in numbers and not os.path.exists(mark):
            open(mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return advance(self, active)

    trainer_class.advance = advanced


def no_room(trainer_class, tokens: str) -> None:
    _limit(trainer_class, lambda run, size: size > int(tokens))


def no_room_for(trainer_class, rate: str) -> None:
    _limit(trainer_class, lambda run, size: run.spec.learning_rate == float(rate))


def _limit(trainer_class, has_none) -> None:
    micro_step = trainer_class._micro_step

    def limited(self, chosen, source, rows):
        import torch

        width = max(int(source.lengths[part].max()) for part in rows)
        if any(has_none(run, sum(map(len, rows)) * width) for run in chosen):
            torch.empty(BYTES, dtype=torch.uint8)  # the allocator's own error
        return micro_step(self, chosen, source, rows)

    trainer_class._micro_step = limited


FAULTS = {"kill": kill, "kill-once": kill_once, "no-room": no_room, "no-room-for": no_room_for}


class Finder(importlib.abc.MetaPathFinder):
    """Finds the module as everybody does, and changes it once it is loaded."""

    def find_spec(self, fullname, path, target=None):
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def loaded(module) -> None:
            load(module)
            for fault in os.environ["TENFOLD_TEST_FAULT"].split(";"):
                name, *arguments = fault.split()
                FAULTS[name](module.Trainer, *arguments)

        spec.loader.exec_module = loaded
        return spec


if "TENFOLD_TEST_FAULT" in os.environ:
    sys.meta_path.insert(0, Finder())
