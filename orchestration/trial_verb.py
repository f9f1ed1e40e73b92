"""`tenfold trial stop` and `tenfold trial clone`: what is asked of a sweep that somebody else may be driving. Imports
neither torch nor ray."""

from collections.abc import Mapping
from typing import Any

from orchestration.clones import Admission, checked_changes
from orchestration.commands import Answer, Command, post, wait_for_answer
from orchestration.own_folder import require_no_way_out, require_own
from orchestration.results import read_trial
from orchestration.run_folder import driver_of, run_at
from orchestration.saved import Saved, has_ended, saved_sweep, trial_named
from search_spaces.candidate import trial_name
from trainers.mirror import mirror_of
from trainers.paths import RunPaths

WAIT_S, STORE_WAIT_S = 8.0, 20.0
"""How long an answer is waited for; on a store the driver looks every few seconds."""
POLL_S, STORE_POLL_S = 0.2, 2.0


def stop_trial(place: str, trial: str) -> list[str]:
    """Asks for the end of a trial; returns what there is to say, a line each.

    Args:
        place: folder or URL of a sweep.
        trial: its name, or the beginning of it.

    Raises:
        ValueError: no such sweep or trial, or a trial that has ended.
    """
    saved = _asked_of(place)
    name = trial_named(saved.trials, trial, place)
    paths = saved.run.trial(name)
    if has_ended(paths):
        status = read_trial(paths).status
        raise ValueError(f"{name}: must be a trial that has not ended, it is {status}")
    command = post(saved.run, "stop", name)
    return _told(saved.run, place, command, f"stop of {name}")


def clone_trial(place: str, trial: str, changes: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Asks for a new trial, made of another's candidate; returns its name, and what there is to say.

    Args:
        place, trial: as `stop_trial`.
        changes: key of a candidate -> its value.

    Raises:
        ValueError: no such sweep or trial; a change that is none; a candidate that the sweep has, or that its
            pruner discards.
    """
    saved = _asked_of(place)
    name = trial_named(saved.trials, trial, place)
    checked = checked_changes(changes)
    judge = Admission(saved, place)
    candidate = judge.clone(name, checked)
    command = post(saved.run, "clone", name, checked)
    new = trial_name(candidate)
    told = _told(saved.run, place, command, f"clone of {name}: {new}")
    return new, [*told, *judge.warnings(candidate, name)]


def _asked_of(place: str) -> Saved:
    """A sweep that this user may ask for something."""
    run = run_at(place)
    saved = saved_sweep(run, place)
    if mirror_of(run.root) is None:
        require_own(run.root)
        require_no_way_out(run.root)
    return saved


def _told(run: RunPaths, place: str, command: Command, what: str) -> list[str]:
    """What became of a command.

    Raises:
        ValueError: the driver refused it.
    """
    goes_on = f"`tenfold resume {place}`"
    if driver_of(run, watch_s=None) is None:
        return [f"{what} is written down: nothing drives {place} now, {goes_on} obeys it"]
    if (answer := _answer(run, command)) is None:
        return [f"{what} is written down: its driver obeys it when it looks next, or {goes_on}"]
    if not answer.ok:
        raise ValueError(answer.line)
    return [answer.line]


def _answer(run: RunPaths, command: Command) -> Answer | None:
    if mirror_of(run.root):
        return wait_for_answer(run, command, STORE_WAIT_S, STORE_POLL_S)
    return wait_for_answer(run, command, WAIT_S, POLL_S)
