"""The two ways to run the trials of a sweep: packed on warm workers, or each on workers of its own."""

from typing import Any

from cluster.inventory import Inventory
from orchestration import sweep
from orchestration.config import SweepConfig
from orchestration.ledger import Ledger
from orchestration.packs import measured_tokens, measurement, plan_packs, trial_demand
from orchestration.planning import Plan
from orchestration.progress import Progress
from orchestration.rungs import RungLedger
from orchestration.schedulers import make_scheduler
from orchestration.tracking import make_trackers
from orchestration.trials import TrialMaker, history, known_names, settle, unended
from search_spaces.candidate import trial_name
from trainers.paths import RunPaths, read_json, write_json


def train(plan: Plan, inventory: Inventory, run: RunPaths, progress: Progress) -> None:
    """Runs every trial of a plan that has no end yet, on the connected cluster.

    Raises:
        ValueError: no worker can load the base; a scheduler other than the run began with.
    """
    engine = _packed if plan.config.engine == "packed" else _solo
    with progress:
        engine(plan, inventory, run, progress)


def _packed(plan: Plan, inventory: Inventory, run: RunPaths, progress: Progress) -> None:
    from orchestration.pool import Pool
    from orchestration.thin import ThinTrial

    demand, packs = trial_demand(plan.config, inventory), plan_packs(plan, inventory)
    work = _Work(plan, TrialMaker(plan, demand, packs, run), run)
    warm = work.first_trial()
    if warm is None:
        return
    storage = str((run.tune / "train").resolve())
    measured = measured_tokens(plan, demand) is not None
    one_run = plan.config.address is None and not inventory.num_gpus and demand.num_workers == 1
    measure = measurement(plan, demand)
    with Pool(demand, packs.num_groups, warm, measure, storage, one_run=one_run) as pool:
        progress.note(f"starting {packs.num_groups} worker groups, loading the base")
        if not measured:  # else Tune's own processes start beside the workers'
            packs = plan_packs(plan, inventory, pool.first_group()["max_tokens"])
        facts = vars(packs) | {"workers_per_group": demand.num_workers}
        write_json(run.packs, facts)
        progress.note(f"{packs.num_groups} groups x {packs.places} adapters: {packs.reason}")
        pool.open(packs.places)
        sweep.run_trials(
            ThinTrial,
            work.searcher({"broker": pool.address}),
            work.scheduler(),
            run,
            # One more than there are places: a freed place is filled without waiting for Tune.
            max_concurrent=packs.num_groups * packs.places + 1,
            callback=Ledger(
                run, progress, work.trackers(), on_end=pool.cancel, check=pool.require_group
            ),
        )
        write_json(run.packs, facts | {"groups": pool.groups()})


def _solo(plan: Plan, inventory: Inventory, run: RunPaths, progress: Progress) -> None:
    from cluster.inventory import max_concurrent_trials
    from orchestration.solo import solo_trial

    demand, packs = trial_demand(plan.config, inventory), plan_packs(plan, inventory)
    work = _Work(plan, TrialMaker(plan, demand, packs, run), run)
    workers = vars(demand) | {"storage": str((run.tune / "train").resolve())}
    sweep.run_trials(
        solo_trial,
        work.searcher({"workers": workers}),
        work.scheduler(),
        run,
        max_concurrent=max_concurrent_trials(demand, inventory),
        callback=Ledger(run, progress, work.trackers()),
    )


class _Work:
    """What of a run is left to do, whatever the engine."""

    def __init__(self, plan: Plan, maker: TrialMaker, run: RunPaths) -> None:
        self.plan, self.maker, self.run = plan, maker, run
        self.config: SweepConfig = plan.config
        self.seen = settle(run)
        planned = {trial_name(candidate): candidate for candidate in plan.pruned.admitted}
        for name, candidate in planned.items():
            if not run.trial(name).config.exists():
                maker.write(candidate)
        names = list(planned) if planned else known_names(run)
        self.trials = [read_json(run.trial(name).config) for name in unended(run, names)]

    def first_trial(self) -> dict[str, Any] | None:
        """A trial whose base and data the workers load before anything else."""
        if self.trials or not self.plan.num_proposed:
            return self.trials[0] if self.trials else None
        if len(known_names(self.run)) >= self.plan.num_proposed:
            return None
        from orchestration.searchers import AdmittedSpace

        domains = tuple(domain for domain in self.plan.domains if domain.admissible)
        return self.maker.make(next(AdmittedSpace(self.plan.space, domains).grid()))

    def searcher(self, common: dict[str, Any]) -> Any:
        """What gives Tune the trials; `common` is the engine's part of their configs."""
        from orchestration.searchers import ListSearcher, OptunaSearcher

        common = common | {"seen": self.seen}
        if not self.plan.num_proposed:
            return ListSearcher(self.trials, common)
        return OptunaSearcher(
            self.plan.space,
            self.plan.domains,
            self.plan.num_proposed,
            self.config.seed,
            self.maker.write,
            common,
            first=self.trials,
            history=history(self.run),
        )

    def scheduler(self) -> Any:
        """Tune's scheduler, as it was when the last driver of this run died."""
        budget = self.plan.budget
        assert budget is not None
        return make_scheduler(
            self.config.scheduler,
            budget.grace_period,
            budget.num_examples,
            self.config.reduction_factor,
            RungLedger(self.run.rungs),
        )

    def trackers(self) -> list[Any]:
        """The trackers that sweep.yaml asks for."""
        return make_trackers(list(self.config.tracking), self.plan.name, self.run)
