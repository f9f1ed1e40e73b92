"""`tenfold study` from config to report: arms on the warm pool until each has its optimum."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console

from cluster.inventory import Inventory, local_inventory, max_concurrent_trials, room_per_worker
from orchestration.console import PlainConsole
from orchestration.objective import objective_of
from orchestration.packs import trial_demand
from orchestration.planning import Plan
from orchestration.preflight import checked_inventory, needs_of
from orchestration.progress import Progress
from orchestration.rl_config import rl_spec
from orchestration.run import versions
from orchestration.run_folder import driving, run_at, run_in
from orchestration.runtime_env import share_cache
from orchestration.studies.agenda import Agenda, retry_failed
from orchestration.studies.arms import CURVE_KINDS, Arm, make_arms
from orchestration.studies.common import (
    begin,
    checked_plan,
    conclude,
    removed_if_refused,
    with_candidates,
)
from orchestration.studies.config import StudyConfig
from orchestration.studies.findings import findings
from orchestration.studies.frame import StudyFacts
from orchestration.studies.results import write_results
from search_spaces import doctrine
from trainers.paths import RunPaths

FULL_FT_BYTES = 20
"""Of a parameter in full fine-tuning: weight, gradient and two AdamW moments in fp32, and the copy of the
base that the next trial begins from."""
USABLE_SHARE = 0.8
"""Share of a worker's memory that is planned; the rest is the activations', the allocator's, the libraries'."""


def run_study(
    kind: str,
    config: StudyConfig,
    *,
    preset: str | None,
    command: str,
    reuse: Sequence[str] = (),
) -> int:
    """Runs a study, or goes on with it, and returns the exit code.

    Args:
        command: what reruns it, for the report.
        reuse: folders or URLs of other studies whose equal points are taken over.

    Raises:
        ValueError: anything that can be known before a trial starts.
    """
    run = run_in(config.storage, config.name or f"{kind}-{preset or 'study'}")
    _require_studies(kind, reuse)
    share_cache(config.address, config.storage)
    facts = StudyFacts(kind=kind, preset=preset, command=command, versions=versions())
    if kind == "capacity":
        from orchestration.studies.capacity_run import run_capacity

        return run_capacity(config, run, facts)
    if kind == "compute":
        from orchestration.studies.compute_run import run_compute_study

        return run_compute_study(config, run, facts)
    return _run_curves(config, run, facts, [run_at(place) for place in reuse])


def _run_curves(
    config: StudyConfig, run: RunPaths, facts: StudyFacts, reuse: Sequence[RunPaths]
) -> int:
    assert facts.kind in CURVE_KINDS
    plan = checked_plan(config)
    arms = make_arms(facts.kind, config, plan)
    _require_full_ft(config, plan, arms)
    console = PlainConsole()
    _say_arms(console, arms, config)
    with driving(run), removed_if_refused(run):
        begin(run, config, facts, fixed_facts(config, plan))
        for name in retry_failed(run):
            console.print(f"{name} failed before: it is tried once more", markup=False)
        agenda = Agenda(arms, config, run, lambda candidate: {})
        if not agenda.is_complete():
            train_arms(plan, arms, config, run, console, reuse)
        complete = agenda.is_complete()
        results = findings(facts, config, plan, arms, agenda.records(), complete=complete)
        write_results(run, results)
    return conclude(console, run, results)


def _require_studies(kind: str, places: Sequence[str]) -> None:
    if places and kind not in CURVE_KINDS:
        raise ValueError(f"--reuse is for {', '.join(CURVE_KINDS)}; leave it out of {kind}")
    for place in places:
        if not run_at(place).trials.is_dir():
            raise ValueError(f"--reuse {place}: must be the folder of a study (trials/), it is not")


def _require_full_ft(config: StudyConfig, plan: Plan, arms: Sequence[Arm]) -> None:
    """Full fine-tuning must be possible, and fit a worker.

    Raises:
        ValueError: it is not.
    """
    if not any(arm.full_finetune for arm in arms):
        return
    if config.quantization != "none" or config.dtype != "fp32":
        raise ValueError(
            "a study with a full-fine-tuning arm needs quantization: none and dtype: fp32 (in bf16 small "
            f"updates are lost and the ratio comes out too high), got {config.quantization} and {config.dtype}"
        )
    if config.address is None:
        _require_room(config, plan, arms, local_inventory())


def _require_room(
    config: StudyConfig, plan: Plan, arms: Sequence[Arm], inventory: Inventory
) -> None:
    """Full fine-tuning must fit one worker of a cluster.

    Raises:
        ValueError: it does not.
    """
    demand = trial_demand(config, inventory)
    room = room_per_worker(demand, max_concurrent_trials(demand, inventory), inventory)
    need = FULL_FT_BYTES * plan.shape.num_params
    if room is not None and any(a.full_finetune for a in arms) and need > USABLE_SHARE * room:
        raise ValueError(
            f"full fine-tuning of {plan.shape.num_params:,} parameters needs {need:,} bytes "
            f"({FULL_FT_BYTES} a parameter), {USABLE_SHARE:.0%} of the {room:,} bytes that one worker of "
            f"{inventory.where} has do not hold them; study a smaller model, or give a worker more (full "
            "fine-tuning is not sharded yet)"
        )


def _say_arms(console: Console, arms: Sequence[Arm], config: StudyConfig) -> None:
    for arm in arms:
        console.print(
            f"{arm.label}: {arm.trained_params:,} parameters, {len(arm.grid)} learning rates "
            f"{arm.grid[0]:.2e} to {arm.grid[-1]:.2e}, seeds {', '.join(map(str, config.seed_list))}",
            markup=False,
            soft_wrap=True,
        )


def fixed_facts(config: StudyConfig, plan: Plan) -> dict[str, Any]:
    """What every point of a study shares."""
    assert plan.audit is not None
    assert plan.budget is not None
    assert plan.data_spec is not None
    keys = (
        "quantization",
        "dtype",
        "lr_schedule",
        "warmup",
        "weight_decay",
        "max_grad_norm",
        "dropout",
        "variant",
    )
    spec = rl_spec(config)
    return {
        **({"rl": spec.described()} if spec else {}),
        "model": {"num_params": plan.shape.num_params, "hidden_size": plan.shape.hidden_size},
        "data": plan.audit.to_dict(),
        "budget": {
            "num_examples": plan.budget.num_examples,
            "eval_every": plan.budget.eval_every,
            "seq_len": plan.data_spec.seq_len,
        },
        "training": {key: getattr(config, key) for key in keys},
    }


def train_arms(
    plan: Plan,
    arms: Sequence[Arm],
    config: StudyConfig,
    run: RunPaths,
    console: Console,
    reuse: Sequence[RunPaths] = (),
) -> None:
    """Trains what the arms still need, on Ray."""
    from orchestration import engines, sweep
    from orchestration.studies.work import StudyWork, candidates_of

    plan = with_candidates(plan, candidates_of(arms))
    assert plan.budget is not None
    score = objective_of(config.method)
    progress = Progress([], 0, plan.budget.num_examples, console, _expected(arms, config), score)
    try:
        sweep.start_ray(config.address)
        local = config.address is None
        inventory = sweep.cluster_inventory(local=local)
        _require_room(config, plan, arms, inventory)
        full_ft = plan.shape.num_params if any(arm.full_finetune for arm in arms) else 0
        needs = needs_of(plan, run, inventory, keep_weights=False, full_ft_params=full_ft)
        inventory = checked_inventory(needs, inventory, local=local)
        demand = trial_demand(config, inventory)
        # A GPU's group holds many adapters: it must not be emptied for every full fine-tuning.
        in_turn = bool(demand.gpus_per_worker) or max_concurrent_trials(demand, inventory) == 1
        make_work = partial(StudyWork, arms, config, reuse, in_turn)
        engines.train(plan, inventory, run, progress, make_work, keep_weights=False)
    finally:
        sweep.stop_ray()


def _expected(arms: Sequence[Arm], config: StudyConfig) -> int:
    """Points of the study if no grid grows."""
    window = 1 + 2 * round(config.seed_window_decades / doctrine.LR_GRID_STEP_DECADES.value)
    others = len(config.seed_list) - 1
    return sum(len(arm.grid) + others * min(window, len(arm.grid)) for arm in arms)
