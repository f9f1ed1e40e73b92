"""`tenfold sweep` and `tenfold resume` from config to report: check everything, then start Ray, train,
and write results."""

import difflib
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cluster.inventory import Inventory, local_inventory, max_concurrent_trials
from orchestration import signals
from orchestration.choice_config import judge_of
from orchestration.clones import clone_records
from orchestration.config import Config, SweepConfig
from orchestration.console import PlainConsole
from orchestration.exit_codes import INTERRUPTED, NO_RESULT
from orchestration.measured import measured_of
from orchestration.memory_rule import trial_demand
from orchestration.mending import mend
from orchestration.models import require_weights
from orchestration.objective import objective_named
from orchestration.packs import plan_packs
from orchestration.placing import packs_sentence, shown_packs, way_line
from orchestration.plan_json import plan_to_dict
from orchestration.planning import Plan, make_plan, run_name
from orchestration.preflight import checked_inventory, needs_of
from orchestration.progress import Progress
from orchestration.requirements import require_supported, require_trainable
from orchestration.results_table import show_results
from orchestration.run_folder import driving, run_at, run_in
from orchestration.runtime_env import share_cache
from orchestration.saved import SOURCE, saved_config, study_command_of
from orchestration.show import cut_ranks
from search_spaces.candidate import trial_name
from trainers.base_fetch import commit_of
from trainers.mirror import fetch_all_records, shown
from trainers.object_store import StoreError
from trainers.paths import RunPaths, read_state, remove_folder, write_state, write_text

if TYPE_CHECKING:
    from trainers.base_loss import BaseLoss
    from trainers.data import DataSpec

PACKAGES = ("tenfold", "ray", "torch", "transformers", "peft", "bitsandbytes", "tokenizers")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""What of a model's folder the adapter is served with."""


def run_sweep(
    config: SweepConfig, source: str, *, resume: bool = False, console: Console | None = None
) -> int:
    """Runs a sweep and returns the exit code.

    Args:
        source: sweep.yaml as the user wrote it, kept beside the results.
        resume: go on with the run where it began already, so that a preempted job can be submitted again.
        console: what is told, where; default: the terminal.

    Raises:
        ValueError: anything that can be known before a trial starts. Nothing is left behind.
    """
    run = run_in(config.storage, run_name(config))
    if resume and run.plan.is_file():
        _require_same_source(run, read_state(run.resolved)[SOURCE], source)
        return resume_sweep(shown(run.root), config.address, console)
    with signals.goes_on_by(lambda: how_to_go_on(run)):
        return _begin(config, source, run, console or PlainConsole())


def _begin(config: SweepConfig, source: str, run: RunPaths, console: Console) -> int:
    require_new(run)
    share_cache(config.address, config.storage)
    plan = _checked_plan(with_commit(config))
    _say_plan(console, plan, plan_to_dict(plan, shown_packs(plan)))

    def write_inputs(fitted: Plan, as_json: dict[str, Any]) -> None:
        write_text(run.config, source)
        resolved = {"config": fitted.config.model_dump(mode="json"), SOURCE: source}
        write_state(run.resolved, resolved | {"versions": versions()})
        write_state(run.plan, as_json)

    return _train(plan, run, console, write_inputs)


def resume_sweep(place: str, address: str | None, console: Console | None = None) -> int:
    """Goes on with a run whose driver died; returns the exit code.

    Trials that ended stay as they are; the others go on from their last checkpoints, judged by a
    scheduler that knows every rung that was recorded.

    Args:
        place: folder or URL of the run.
        address: a running Ray cluster; default: the config's, else a local one.
        console: see `run_sweep`.

    Raises:
        ValueError: no run, one that is still being driven, or a plan that came out otherwise.
    """
    run = run_at(place)
    with signals.goes_on_by(lambda: how_to_go_on(run)):
        return _go_on(run, place, address, console or PlainConsole())


def how_to_go_on(run: RunPaths) -> str:
    """What to do with a run whose driver was interrupted."""
    if run.plan.is_file():
        return f"`tenfold resume {shown(run.root)}` goes on"
    return "nothing was trained: the same command begins again"


def _go_on(run: RunPaths, place: str, address: str | None, console: Console) -> int:
    if (command := study_command_of(run)) is not None:
        raise ValueError(f"{place}: is a study, which goes on with its command: {command}")
    if not run.plan.is_file() or not run.resolved.is_file():
        raise ValueError(
            f"{place}: must be the folder of a sweep (plan.json, resolved.json), it is not"
        )
    with driving(run):
        pass  # told before the data is read again
    resolved = read_state(run.resolved)
    if run.config.is_file():
        _require_same_source(run, resolved[SOURCE], run.config.read_text(encoding="utf-8"))
    config = saved_config(run, resolved, place, address=address)
    share_cache(config.address, config.storage)
    was = read_state(run.plan)
    # Judged by the memory it was planned for: another machine must not change what the sweep is.
    planned_for = was.get("inventory")
    plan = _checked_plan(
        config, measured_of(was), Inventory(**planned_for) if planned_for else None
    )
    require_same_plan(run, plan)
    console.print(f"resuming {place}", markup=False)
    return _train(plan, run, console, lambda fitted, as_json: None)


def _require_same_source(run: RunPaths, was: str, now: str) -> None:
    lines = difflib.unified_diff(was.splitlines(), now.splitlines(), lineterm="", n=0)
    changed = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    if changed:
        raise ValueError(
            f"{shown(run.config)}: a run goes on with what it began with, which differs now "
            f"({'; '.join(changed)[:300]}); take that back, or start a new run with another name (--name)"
        )


def with_commit(config: Config) -> Config:
    """The config with the commit that the revision of a hub model stands for now: every node of the run, and
    every resume of it, loads the same.

    Raises:
        ValueError: no such model or revision.
    """
    return config.model_copy(update={"revision": commit_of(config.model, config.revision)})


def _checked_plan(
    config: SweepConfig,
    known: "BaseLoss | None" = None,
    planned_for: Inventory | None = None,
) -> Plan:
    """A plan that can be trained here.

    Args:
        known: the base's loss, where an earlier plan measured it.
        planned_for: the machines of an earlier plan; None: this one, or a cluster that is asked later.
    """
    require_weights(config.model)
    require_supported(config)
    here = local_inventory() if config.address is None else None
    if here is not None:
        max_concurrent_trials(trial_demand(config, here), here)
    plan = make_plan(config, known, planned_for or here)
    require_trainable(plan)
    if here is not None:
        plan_packs(plan, here)
    return plan


def _fitted(plan: Plan, inventory: Inventory, console: Console) -> Plan:
    """The plan without the candidates that have no room on a cluster that was joined.

    Raises:
        NothingAdmittedError: none has.
    """
    if plan.inventory is not None:
        return plan
    fitted = make_plan(plan.config, measured_of(plan_to_dict(plan)), inventory)
    if len(fitted.pruned.discarded) > len(plan.pruned.discarded) or fitted.domains != plan.domains:
        _say_plan(console, fitted, plan_to_dict(fitted, shown_packs(fitted, inventory)))
    return fitted


def require_same_plan(run: RunPaths, plan: Plan) -> None:
    """A resumed sweep trains what was planned, on data that did not change."""
    was, now = read_state(run.plan), plan_to_dict(plan)
    for key in (
        "candidates",
        "num_proposed",
        "dataset_bits",
        "budget",
        "seq_len",
        "data",
        "retention",
        "rl",
        "task",
        "choice",
    ):
        if key in was and was[key] != now[key]:  # an earlier version knew fewer
            raise ValueError(
                f"{shown(run.plan)}: a resumed sweep must plan the same {key}, the data, the model or Tenfold "
                f"changed ({difference(was[key], now[key])}); start a new run with another name"
            )


def difference(was: Any, now: Any) -> str:
    if isinstance(was, dict) and isinstance(now, dict):
        changed = [key for key in was if was[key] != now.get(key)]
        return ", ".join(f"{key} {was[key]} -> {now.get(key)}" for key in changed)[:300]
    if isinstance(was, list):
        return f"{len(was)} candidates, now {len(now)}"
    return f"{was} -> {now}"


def _train(plan: Plan, run: RunPaths, console: Console, write_inputs: Any) -> int:
    from orchestration import engines, sweep  # ray.tune costs 2 s: bad input is told before it

    local = plan.config.address is None
    try:
        sweep.start_ray(plan.config.address)
        found = sweep.cluster_inventory(local=local)
        fitted = _fitted(plan, found, console)
        inventory = checked_inventory(needs_of(fitted, run, found), found, local=local)
        # Again where a node has a smaller GPU than the one that was asked first.
        plan = fitted if inventory == found else _fitted(plan, inventory, console)
        plan_packs(plan, inventory)
        as_json = plan_to_dict(plan, shown_packs(plan, None if local else inventory))
        with driving(run), removed_if_refused(run):
            write_inputs(plan, as_json)
            engines.train(plan, inventory, run, _progress(plan, as_json, console))
    finally:
        sweep.stop_ray()
    return _conclude(run, plan, console)


def _progress(plan: Plan, as_json: dict[str, Any], console: Console) -> Progress:
    num_trials = len(plan.pruned.admitted) + plan.num_proposed
    names = [item["name"] for item in as_json["candidates"]]
    assert plan.budget is not None
    num_discarded = len(plan.pruned.discarded)
    return Progress(
        names,
        num_discarded,
        plan.budget.num_examples,
        console,
        num_trials,
        objective_named(judge_of(plan.config).key),
        eval_every=plan.budget.eval_every,
        discarded=Counter(item["rule"] for item in as_json["discarded"]),
    )


@contextmanager
def removed_if_refused(run: RunPaths) -> Iterator[None]:
    """A new run in which nothing could be trained must not be in the way of the next attempt."""
    is_new = not run.plan.exists()
    try:
        yield
    except StoreError:
        raise  # nobody can say what is there
    except ValueError:
        fetch_all_records(run.root)  # what workers elsewhere wrote
        if is_new and not any(run.trials.glob("*/metrics.jsonl")):
            remove_folder(run.root)
        raise


def require_new(run: RunPaths) -> None:
    """A driver that died before plan.json, the last of the inputs, has left nothing to go on with."""
    inputs = {run.config.name, run.resolved.name, run.lock.name, run.workers.name}
    found = run.root.iterdir() if run.root.is_dir() else ()
    if run.root.is_file() or any(p.name not in inputs and p.suffix != ".tmp" for p in found):
        raise ValueError(
            f"{shown(run.root)}: the run folder exists already; give another name (--name) or remove it"
        )


def _say_plan(console: Console, plan: Plan, as_json: dict[str, Any]) -> None:
    discarded = plan.pruned.discarded
    to_train = len(plan.pruned.admitted) + plan.num_proposed
    console.print(
        f"{plan.name}: {to_train + len(discarded)} candidates planned, {len(discarded)} discarded, "
        f"{to_train} to train; {plan.dataset_bits:,} dataset bits",
    )
    if as_json["packs"]:
        console.print(f"  {packs_sentence(as_json['packs'])}", markup=False, soft_wrap=True)
        console.print(way_line(as_json["packs"]), markup=False, soft_wrap=True)
    for sentence in cut_ranks(as_json):
        console.print(f"  cut before any draw: {sentence}", markup=False, soft_wrap=True)
    for reason in sorted({item.reason for item in discarded}):
        console.print(f"  discarded: {reason}", markup=False, soft_wrap=True)
    for pitfall in plan.pitfalls:
        console.print(
            f"  {pitfall.severity}: {pitfall.evidence}: {pitfall.symptom}. Fix: {pitfall.fix}",
            markup=False,
            soft_wrap=True,
        )


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found, "platform": platform.platform()}


def tokenizer_files(spec: "DataSpec") -> dict[str, Path]:
    """The tokenizer that the data was tokenized with, name -> file; with the chat template that was
    given in the place of the model's own (field case A08)."""
    folder = Path(str(spec.model))
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if spec.chat_template is not None:
        files.pop("chat_template.json", None)
        files["chat_template.jinja"] = Path(spec.chat_template).expanduser()
    return files


def _conclude(run: RunPaths, plan: Plan, console: Console) -> int:
    from orchestration.report import write_report
    from orchestration.sweep import finish

    assert plan.data_spec is not None
    planned = {trial_name(candidate) for candidate in plan.pruned.admitted}
    planned |= set(clone_records(run))
    mend(run, planned, console.print)
    records, best = finish(run, tokenizer_files(plan.data_spec), console.print)
    write_report(run)
    show_results(records, best, run, len(plan.pruned.discarded), console)
    unended = sum(record.status == "unfinished" for record in records)
    unended += len(planned - {record.name for record in records})
    if signals.received():
        proposed = sum(not record.repeats for record in records) - len(clone_records(run))
        unended += max(0, plan.num_proposed - proposed)  # nobody has asked for those yet
    if unended:  # Tune answers a signal by ending its loop: what has no end was interrupted
        console.print(
            f"interrupted: {unended} trials did not end; `tenfold resume {shown(run.root)}` goes on"
        )
        return INTERRUPTED
    return 0 if best else NO_RESULT
