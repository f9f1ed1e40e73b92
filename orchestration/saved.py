"""What a run says of itself on disk: its config, its plan, its trials. Imports neither torch nor ray."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.config import SweepConfig, make_config
from orchestration.run_folder import storage_of
from trainers.paths import RunPaths, TrialPaths, read_state

SOURCE = "sweep_yaml"
"""resolved.json's key of sweep.yaml as it was given."""
MAX_SHOWN = 3
"""Names that a refusal lists."""


@dataclass(frozen=True)
class Saved:
    """A sweep's folder, read.

    Attributes:
        run: its paths.
        resolved: resolved.json.
        plan: plan.json.
    """

    run: RunPaths
    resolved: dict[str, Any]
    plan: dict[str, Any]

    @property
    def planned(self) -> list[str]:
        """Names of the trials that the plan has; of a search that proposes, none."""
        return [item["name"] for item in self.plan["candidates"]]

    @property
    def trials(self) -> list[str]:
        """Names of all trials: those of the plan, then those that came later."""
        found = sorted(path.parent.name for path in self.run.trials.glob("*/config.json"))
        return list(dict.fromkeys([*self.planned, *found]))


def saved_sweep(run: RunPaths, place: str) -> Saved:
    """A sweep from its folder.

    Args:
        place: the folder or URL as the user gave it.

    Raises:
        ValueError: the folder is none of a sweep, or a study's.
    """
    if (command := study_command_of(run)) is not None:
        raise ValueError(
            f"{place}: must be a sweep, is a study, whose points are fixed; its command is: {command}"
        )
    if not run.plan.is_file() or not run.resolved.is_file():
        raise ValueError(
            f"{place}: must be the folder of a sweep (plan.json, resolved.json), it is not"
        )
    return Saved(run, read_state(run.resolved), read_state(run.plan))


def study_command_of(run: RunPaths) -> str | None:
    """What began the study in a folder; None where there is no study."""
    return read_state(run.resolved).get("command") if run.resolved.is_file() else None


def saved_config(run: RunPaths, resolved: dict[str, Any], place: str, **flags: Any) -> SweepConfig:
    """The config that a run began with, where the run lies now.

    Args:
        flags: keys that are taken in the place of the config's, where they are not None.
    """
    values = resolved["config"] | {"name": run.root.resolve().name, "storage": storage_of(run)}
    values |= {key: value for key, value in flags.items() if value is not None}
    return make_config({k: v for k, v in values.items() if v is not None}, place)


def trial_named(names: Sequence[str], given: str, place: str) -> str:
    """The trial of a name, or of the beginning of one.

    Raises:
        ValueError: there is none, or there are several.
    """
    if given in names:
        return given
    found = [name for name in names if given and name.startswith(given)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{place}: {given!r} must be the beginning of one trial's name, is that of {len(found)}: {_listed(found)}"
        )
    raise ValueError(f"{place}: has no trial {given!r}; it has {_listed(names) or 'none yet'}")


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:MAX_SHOWN])}{' ...' if len(names) > MAX_SHOWN else ''}"


def has_ended(paths: TrialPaths) -> bool:
    """Whether a trial has an end on disk."""
    return paths.status.exists()
