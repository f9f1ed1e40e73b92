"""What the drivers of all kinds of study share: plan, folder, and what is said at the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rich.console import Console

from orchestration.config import SweepConfig
from orchestration.exit_codes import INTERRUPTED, NO_RESULT
from orchestration.models import require_weights
from orchestration.planning import Plan, make_plan
from orchestration.requirements import require_supported, require_trainable
from orchestration.run import difference
from orchestration.studies.config import StudyConfig, write_study_yaml
from orchestration.studies.frame import StudyFacts
from search_spaces.candidate import Candidate
from search_spaces.pruner import DiscardedList, PruneResult
from trainers.mirror import fetch_all_records, shown
from trainers.object_store import StoreError
from trainers.paths import RunPaths, read_state, remove_folder, write_state


def checked_plan(config: SweepConfig) -> Plan:
    """The plan of everything but arms: model, data, budget.

    Raises:
        ValueError: what cannot be trained.
    """
    require_weights(config.model)
    require_supported(config)
    plan = make_plan(config)
    require_trainable(plan)
    return plan


def with_candidates(plan: Plan, candidates: tuple[Candidate, ...]) -> Plan:
    """The plan with these candidates in the place of its search's."""
    nothing = DiscardedList()
    admitted = PruneResult(admitted=candidates, discarded=nothing, advised=nothing)
    return replace(plan, pruned=admitted)


@contextmanager
def removed_if_refused(run: RunPaths) -> Iterator[None]:
    """A new study that is refused before anything is trained must not be in the way of the next attempt.

    Args:
        run: a folder in which nothing but the driver's lock may be: else it is kept.
    """
    is_new = all(path.name == run.lock.name for path in run.root.iterdir())
    try:
        yield
    except StoreError:
        raise  # nobody can say what is there
    except ValueError:
        fetch_all_records(run.root)  # what workers elsewhere wrote
        if is_new and not any(run.root.rglob("metrics.jsonl")):
            remove_folder(run.root)
        raise


def begin(run: RunPaths, config: StudyConfig, facts: StudyFacts, fixed: dict[str, Any]) -> None:
    """Writes what the study is, or finds it as it was.

    Args:
        fixed: what may not change when it goes on; seeds, arms and grids may grow.

    Raises:
        ValueError: the folder is another study's, or no study's.
    """
    now = {"kind": facts.kind, **fixed}
    if (was := fixed_of(run)) is not None:
        for key in now:
            if was.get(key) != now[key]:
                raise ValueError(
                    f"{shown(run.root)}: a study that goes on must keep its {key} "
                    f"({difference(was.get(key), now[key])}); give another name (--name)"
                )
    elif run.root.exists() and any(path.name != run.lock.name for path in run.root.iterdir()):
        raise ValueError(
            f"{shown(run.root)}: must be a study's folder or a new one; give another --name"
        )
    write_study_yaml(run.root / "study.yaml", config)
    resolved = {"config": config.model_dump(mode="json"), "versions": facts.versions}
    write_state(run.resolved, resolved | {"command": facts.command, "fixed": now})


def fixed_of(run: RunPaths) -> dict[str, Any] | None:
    """What may not change of the study in a folder; None where there is no study."""
    return read_state(run.resolved).get("fixed") if run.resolved.is_file() else None


def conclude(console: Console, run: RunPaths, results: dict[str, Any]) -> int:
    """Says what was found, and gives the exit code."""
    for table in results["tables"][:1]:
        console.print(f"{table['title']}:", markup=False)
        for row in table["rows"]:
            console.print("  " + "  ".join(row), markup=False, soft_wrap=True)
    verdict = results["verdict"]
    console.print(f"{verdict['status']}: {verdict['sentence']}", markup=False, soft_wrap=True)
    if verdict["would_decide"]:
        console.print(
            f"what would decide it: {verdict['would_decide']}", markup=False, soft_wrap=True
        )
    console.print(f"report: {shown(run.report)}", markup=False, soft_wrap=True)
    if results["status"] == "unfinished":
        console.print("interrupted: the same command goes on with it")
        return INTERRUPTED
    measured = any(p["eval_loss"] is not None for arm in results["arms"] for p in arm["points"])
    return 0 if measured or not results["arms"] else NO_RESULT
