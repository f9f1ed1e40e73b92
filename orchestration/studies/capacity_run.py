"""capacity: the sets of facts, each a sweep of its own, one after the other on one Ray."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestration import signals
from orchestration.config import SweepConfig, make_config, values_of
from orchestration.console import PlainConsole
from orchestration.models import model_shape, require_weights
from orchestration.planning import Plan
from orchestration.preflight import checked_inventory, needs_of
from orchestration.progress import Progress
from orchestration.results import read_trials
from orchestration.run_folder import driving
from orchestration.studies.agenda import retry_failed
from orchestration.studies.capacity import (
    LAPTOP,
    SMOKE,
    FactSet,
    FactTrial,
    Recipe,
    check_prepared,
    fact_trial,
)
from orchestration.studies.capacity_findings import findings
from orchestration.studies.common import (
    begin,
    checked_plan,
    conclude,
    removed_if_refused,
    with_candidates,
)
from orchestration.studies.config import StudyConfig
from orchestration.studies.frame import StudyFacts, frame
from orchestration.studies.results import model_facts, write_results
from search_spaces.architecture import ModelShape
from search_spaces.candidate import trial_name
from search_spaces.values import parse_targets
from trainers.data.facts import make_facts
from trainers.data.tokenizer import load_tokenizer
from trainers.paths import RunPaths

FACT_TOKENS = 64
"""Context that a fact needs: key, value and end token, with room for tokenizers that cut words."""


def run_capacity(config: StudyConfig, run: RunPaths, facts: StudyFacts) -> int:
    """Runs the study, or goes on with it, and returns the exit code.

    Raises:
        ValueError: a model or tokenizer that cannot hold the facts.
    """
    recipe = recipe_of(config, facts.preset)
    console = PlainConsole()
    require_weights(config.model)
    shape = model_shape(config.model, config.revision)
    model = model_facts(config, shape)
    wanted_sets = recipe.fact_sets(shape)
    with driving(run), removed_if_refused(run):
        begin(run, config, facts, {"model": model, "recipe": _fixed(recipe)})
        sets = _planned(config, wanted_sets, run)
        _train(config, sets, console)
        trials = [t for one, _, folder in sets for t in fact_trials(one, folder, shape)]
        wanted = sum(len(one.candidates) for one, _, _ in sets)
        complete = sum(trial.status != "unfinished" for trial in trials) == wanted
        data = {"name": "synthetic facts", "sets": [one.facts.num_facts for one, _, _ in sets]}
        results = frame(facts, run.root.name, complete=complete, model=model, data=data)
        results |= findings(trials, recipe)
        write_results(run, results)
    return conclude(console, run, results)


def _fixed(recipe: Recipe) -> dict[str, Any]:
    """What may not change when a study goes on: loads, ranks, rates and seeds may grow."""
    grows = ("loads", "lora_ranks", "learning_rates", "seeds")
    values = {key: value for key, value in vars(recipe).items() if key not in grows}
    return values | {"target": list(recipe.target)}  # as JSON gives it back


def recipe_of(config: StudyConfig, preset: str | None) -> Recipe:
    """The preset's recipe with what the user set over it.

    Raises:
        ValueError: a key that this study does not have, or a value that is no list of numbers.
    """
    recipe = SMOKE if preset == "smoke" else LAPTOP
    given: dict[str, Any] = {}
    for key in ("lora_rank", "learning_rate"):
        if (value := getattr(config, key)) is not None:
            given[f"{key}s"] = values_of(key, value)
    if config.loads is not None:
        given["loads"] = tuple(config.loads)
    for key in ("exposures", "global_batch_size"):
        if (value := getattr(config, key)) is not None:
            given[key] = value
    if config.target is not None:
        given["target"] = _one_target(config.target)
    if "seeds" in config.model_fields_set:
        given["seeds"] = config.seed_list
    return replace(recipe, **given)


def _one_target(value: object) -> tuple[str, ...]:
    targets = parse_targets(value)
    if len(targets) != 1:
        raise ValueError(f"target must be one target in this study, got {value!r}; give one")
    names = targets[0]
    return tuple(names.split("+")) if isinstance(names, str) else names


Planned = tuple[FactSet, Plan, RunPaths]


def _planned(config: StudyConfig, sets: Sequence[FactSet], run: RunPaths) -> list[Planned]:
    """Every set written, tokenized and counted, before anything is trained."""
    found = []
    for one in sets:
        folder = RunPaths(run.root / f"facts-{one.facts.num_facts}")
        plan = checked_plan(_set_config(config, one, folder.root))
        assert plan.audit is not None
        check_prepared(one.facts, plan.audit)
        found.append((one, with_candidates(plan, one.candidates), folder))
    return found


def _set_config(config: StudyConfig, one: FactSet, folder: Path) -> SweepConfig:
    tokenizer = load_tokenizer(config.model, revision=config.revision)
    files = {"facts": folder / "facts.jsonl", "control": folder / "control.jsonl"}
    make_facts(one.facts, tokenizer).write(files["facts"])
    make_facts(one.control, tokenizer).write(files["control"])
    values = {
        "model": config.model,
        "revision": config.revision,
        "data": str(files["facts"]),
        "eval": str(files["facts"]),
        "retention": str(files["control"]),
        "seq_len": FACT_TOKENS,
        "examples": one.num_examples,
        "eval_every": one.eval_every,
        "quantization": config.quantization,
        "dtype": config.dtype,
        "scheduler": "fifo",
        "capacity_policy": "advisory",
        "lora_rank": sorted({c.lora_rank for c in one.candidates}),
        "learning_rate": one.candidates[0].learning_rate,
        "global_batch_size": one.candidates[0].global_batch_size,
        "address": config.address,
        "storage": str(folder.parent),
        "name": folder.name,
    }
    return make_config({k: v for k, v in values.items() if v is not None}, "capacity study")


def _train(config: StudyConfig, sets: Sequence[Planned], console: Console) -> None:
    from orchestration import engines, sweep

    left = [(one, plan, run) for one, plan, run in sets if not _is_done(one, run)]
    if not left:
        return
    try:
        sweep.start_ray(config.address)
        local = config.address is None
        inventory = sweep.cluster_inventory(local=local)
        for _, plan, run in left:
            needs = needs_of(plan, run, inventory, keep_weights=False)
            inventory = checked_inventory(needs, inventory, local=local)
        for one, plan, run in left:
            if signals.received():  # it ended the set before this one
                break
            console.print(
                f"{one.facts.num_facts} facts, {one.facts.known_bits:,.0f} bits", markup=False
            )
            for name in retry_failed(run):
                console.print(f"{name} failed before: it is tried once more", markup=False)
            names = [trial_name(candidate) for candidate in one.candidates]
            progress = Progress(names, 0, one.num_examples, console)
            engines.train(plan, inventory, run, progress, keep_weights=False)
    finally:
        sweep.stop_ray()


def _is_done(one: FactSet, run: RunPaths) -> bool:
    return all(run.trial(trial_name(c)).status.exists() for c in one.candidates)


def fact_trials(one: FactSet, run: RunPaths, shape: ModelShape) -> list[FactTrial]:
    """The trials of a set that there are."""
    if not run.trials.is_dir():
        return []
    return [fact_trial(record, one, shape) for record in read_trials(run)]
