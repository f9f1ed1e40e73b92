"""`tenfold sweep` from config to report: check everything, then start Ray, train, and write results."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.inventory import Inventory, TrialDemand, local_inventory, max_concurrent_trials
from cluster.placement import split_global_batch
from orchestration.config import SweepConfig
from orchestration.exit_codes import INTERRUPTED, NO_RESULT
from orchestration.models import require_weights
from orchestration.planning import (
    DEFAULT_MICRO_BATCH_SIZE,
    Budget,
    Plan,
    make_plan,
    plan_to_dict,
    run_name,
)
from orchestration.progress import Progress
from orchestration.results_table import show_results
from orchestration.show import cut_ranks
from search_spaces.candidate import Candidate, trial_name
from trainers.paths import RunPaths, write_json, write_text

PACKAGES = ("tenfold", "ray", "torch", "transformers", "peft", "bitsandbytes", "tokenizers")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


def run_sweep(config: SweepConfig, source: str) -> int:
    """Runs a sweep and returns the exit code.

    Args:
        source: sweep.yaml as the user wrote it, kept beside the results.

    Raises:
        ValueError: anything that can be known before a trial starts. Nothing is left behind.
    """
    run = RunPaths(Path(config.storage) / run_name(config))
    _require_new(run)
    require_weights(config.model)
    _require_supported(config)
    inventory = local_inventory() if config.address is None else None
    if inventory:
        max_concurrent_trials(trial_demand(config, inventory), inventory)
    plan = make_plan(config)
    _require_trainable(plan)
    console = Console(highlight=False)
    as_json = plan_to_dict(plan)
    _say_plan(console, plan, as_json)

    from orchestration import sweep  # ray.tune costs 2 s: bad input is told before it

    try:
        sweep.start_ray(config.address)
        inventory = sweep.cluster_inventory()
        demand = trial_demand(config, inventory)
        concurrent = max_concurrent_trials(demand, inventory)
        _write_inputs(run, plan, as_json, source)
        _train(plan, demand, concurrent, run, console)
    finally:
        sweep.stop_ray()
    return _conclude(run, plan, console)


def _require_new(run: RunPaths) -> None:
    if run.root.exists():
        raise ValueError(
            f"{run.root}: the run folder exists already; give another name (--name) or remove it"
        )


def _require_supported(config: SweepConfig) -> None:
    if config.data is None:
        raise ValueError("a sweep needs data; dataset_tokens alone is enough for plan only")
    if config.method != "sft":
        raise ValueError(
            "method: rl can be planned but not trained by this version; set method: sft"
        )


def _require_trainable(plan: Plan) -> None:
    for target in sorted({candidate.target for candidate in plan.pruned.admitted}):
        if any(linear.component == "experts" for linear in plan.shape.resolve_target(target)):
            raise ValueError(
                f"target {'+'.join(target)}: fused experts can be planned but not trained by this version; "
                "set target: [attn, unembed]"
            )


def trial_demand(config: SweepConfig, inventory: Inventory) -> TrialDemand:
    """What one trial reserves on a cluster."""
    gpus = config.gpus_per_worker
    if gpus == "auto":
        gpus = 1 if inventory.num_gpus else 0
    return TrialDemand(
        num_workers=config.workers_per_trial,
        cpus_per_worker=config.cpus_per_worker,
        gpus_per_worker=gpus,
    )


def _say_plan(console: Console, plan: Plan, as_json: dict[str, Any]) -> None:
    discarded = plan.pruned.discarded
    console.print(
        f"{plan.name}: {len(plan.pruned.admitted) + len(discarded)} candidates planned, {len(discarded)} discarded, "
        f"{len(plan.pruned.admitted)} to train; {plan.dataset_bits:,} dataset bits",
    )
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


def _write_inputs(run: RunPaths, plan: Plan, as_json: dict[str, Any], source: str) -> None:
    write_text(run.config, source)
    write_json(
        run.resolved, {"config": plan.config.model_dump(mode="json"), "versions": versions()}
    )
    write_json(run.plan, as_json)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found, "platform": platform.platform()}


def _train(
    plan: Plan, demand: TrialDemand, concurrent: int, run: RunPaths, console: Console
) -> None:
    from orchestration import sweep
    from orchestration.tracking import make_trackers

    assert plan.budget is not None
    trials = [trial_dict(plan, candidate, demand, run) for candidate in plan.pruned.admitted]
    progress = Progress(
        [trial["name"] for trial in trials],
        len(plan.pruned.discarded),
        plan.budget.num_examples,
        console,
    )
    scheduler = {
        "kind": plan.config.scheduler,
        "grace_period": plan.budget.grace_period,
        "max_t": plan.budget.num_examples,
        "reduction_factor": plan.config.reduction_factor,
    }
    trackers = make_trackers(list(plan.config.tracking), plan.name, run)
    sweep.run_trials(
        trials, demand, concurrent, run, scheduler=scheduler, progress=progress, trackers=trackers
    )


def trial_dict(
    plan: Plan, candidate: Candidate, demand: TrialDemand, run: RunPaths
) -> dict[str, Any]:
    """A trial as JSON: what `trainers.sft_trainer.TrialSpec.from_dict` reads."""
    config, budget, data = plan.config, plan.budget, plan.data_spec
    assert isinstance(budget, Budget)
    assert data is not None
    name = trial_name(candidate)
    split = split_global_batch(
        candidate.global_batch_size,
        demand.num_workers,
        config.micro_batch_size or DEFAULT_MICRO_BATCH_SIZE,
    )
    return {
        "name": name,
        "folder": str(run.trial(name).root.resolve()),
        "base": {
            "model": config.model,
            "revision": config.revision,
            "quantization": config.quantization,
            "dtype": config.dtype,
        },
        "data": _absolute(vars(data)),
        "candidate": candidate.to_dict(),
        "num_examples": budget.num_examples,
        "eval_every": budget.eval_every,
        "micro_batch_size": split.micro_batch_size,
        "num_threads": demand.cpus_per_worker,
    }


def _absolute(data: dict[str, Any]) -> dict[str, Any]:
    """Local paths made absolute: a worker's working directory is not the driver's."""

    def resolved(value: Any) -> Any:
        return (
            str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value
        )

    paths = ("data", "model", "eval", "chat_template")
    return {key: resolved(value) if key in paths else value for key, value in data.items()}


def _conclude(run: RunPaths, plan: Plan, console: Console) -> int:
    from orchestration.report import write_report
    from orchestration.sweep import finish

    assert plan.data_spec is not None
    tokenizer = [Path(str(plan.data_spec.model)) / name for name in TOKENIZER_FILES]
    records, best = finish(run, [path for path in tokenizer if path.is_file()])
    write_report(run)
    show_results(records, best, run, len(plan.pruned.discarded), console)
    unended = sum(record.status == "unfinished" for record in records)
    if unended:  # Tune answers Ctrl-C by ending its loop: what has no end was interrupted
        console.print(f"interrupted: {unended} trials did not end")
        return INTERRUPTED
    return 0 if best else NO_RESULT
