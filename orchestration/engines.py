"""The two ways to run the trials of a sweep: packed on warm workers, or each on workers of its own."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from cluster.inventory import Inventory
from orchestration import signals, sweep
from orchestration.choosing import repeat_names
from orchestration.clones import clone_records, clones_of
from orchestration.config import SweepConfig
from orchestration.control import Control, stop_left
from orchestration.ledger import Ledger
from orchestration.mending import mend
from orchestration.packs import measured_tokens, measurement, plan_packs, trial_demand
from orchestration.planning import Plan
from orchestration.progress import Progress
from orchestration.results import mark_ended, notes_of, read_trial
from orchestration.rungs import RungLedger
from orchestration.schedulers import make_scheduler
from orchestration.spending import HELD_S, held_before, homes_of
from orchestration.time_limit import TimeLimit
from orchestration.tracking import make_trackers
from orchestration.trials import TrialMaker, history, known_names, settle, unended, untold
from search_spaces.candidate import trial_name
from trainers.mirror import fetch_all_records
from trainers.paths import RunPaths, read_state, write_state
from trainers.run_lock import claim_folders

NEVER_BEGAN = "the Ray actors that should have driven it died, time after time"


def train(
    plan: Plan,
    inventory: Inventory,
    run: RunPaths,
    progress: Progress,
    make_work: "Callable[[Plan, TrialMaker, RunPaths], Work] | None" = None,
    *,
    keep_weights: bool = True,
) -> None:
    """Runs every trial that has no end yet, on the connected cluster.

    Args:
        make_work: what is to be run; default: the plan's candidates.
        keep_weights: see `trainers.sft_trainer.TrialSpec`.

    Raises:
        ValueError: no worker can load the base; a scheduler other than the run began with; workers of
            an earlier driver that do not end.
    """
    engine = _packed if plan.config.engine == "packed" else _solo
    packs = plan_packs(plan, inventory)
    demand = trial_demand(plan.config, inventory, packs.workers_per_group)
    with progress:
        claim_folders(
            run, lambda: progress.note("waiting for the workers of an earlier driver to end")
        )
        planned = {trial_name(c) for c in plan.pruned.admitted} | set(clone_records(run))
        mend(run, planned, progress.say)
        progress.known(read_trial(run.trial(name)) for name in known_names(run))
        maker = TrialMaker(plan, demand, packs, run, keep_weights=keep_weights)
        if make_work is None:
            stop_left(run)
            Control(run, maker, progress).look_now()
        for name in clone_records(run):
            progress.added(name)
        engine(inventory, progress, (make_work or Work)(plan, maker, run))


def _packed(inventory: Inventory, progress: Progress, work: "Work") -> None:
    from orchestration.pool import Pool
    from orchestration.thin import ThinTrial

    plan, run, demand, packs = work.plan, work.run, work.maker.demand, work.maker.packs
    warm = work.first_trial()
    if warm is None:
        return
    storage = str((run.tune / "train").resolve())
    # A sharded base is not measured: its forwards are as large as its memory allows.
    measured = packs.strategy == "zero3" or measured_tokens(plan, demand) is not None
    one_run = plan.config.address is None and not inventory.num_gpus and demand.num_workers == 1
    measure = measurement(plan, demand, recomputed=packs.gradient_checkpointing)
    held_s, began = held_before(run), time.monotonic()
    with (
        Pool(demand, packs.num_groups, warm, measure, storage, one_run=one_run) as pool,
        progress.following(pool.packs, packs.num_groups),
    ):
        progress.note(f"starting {packs.num_groups} worker group(s), loading the base")
        if not measured:  # else Tune's own processes start beside the workers'
            packs = plan_packs(plan, inventory, pool.first_group()["max_tokens"], packs.way)
        facts = vars(packs) | {HELD_S: held_s}
        write_state(run.packs, facts)
        progress.note(f"{packs.num_groups} group(s) x {packs.places} adapters: {packs.reason}")
        homes = homes_of(run)
        order = {name: at for at, name in enumerate(homes)}
        limit = _limit(work, inventory, packs.num_groups, progress)
        for _ in work.rounds(limit):
            work.trials.sort(key=lambda trial: order.get(trial["name"], len(order)))
            pool.open(packs.places, [(t, work.seen.get(t["name"], 0)) for t in work.trials], homes)
            work.run_all(
                ThinTrial,
                {"broker": pool.address},
                # One more than there are places: a freed place is filled without waiting for Tune.
                packs.num_groups * packs.places + 1,
                partial(
                    Ledger,
                    run,
                    progress,
                    on_end=pool.cancel,
                    on_put_off=pool.put_off,
                    check=pool.require_group,
                ),
                limit,
                work.control(progress, pool.cancel, pool.put_ahead),
            )
        facts |= {HELD_S: round(held_s + time.monotonic() - began, 1)}
        write_state(run.packs, facts | {"groups": pool.groups()})


def _solo(inventory: Inventory, progress: Progress, work: "Work") -> None:
    from cluster.inventory import max_concurrent_trials
    from orchestration.solo import solo_trial

    run, demand = work.run, work.maker.demand
    workers = vars(demand) | {"storage": str((run.tune / "train").resolve())}
    max_concurrent = max_concurrent_trials(demand, inventory)
    limit = _limit(work, inventory, max_concurrent, progress)
    for _ in work.rounds(limit):
        make_ledger = partial(Ledger, run, progress)
        work.run_all(
            solo_trial,
            {"workers": workers},
            max_concurrent,
            make_ledger,
            limit,
            work.control(progress),
            reuse_actors=False,
        )


def _limit(work: "Work", inventory: Inventory, num_groups: int, progress: Progress) -> TimeLimit:
    """What the sweep may take, with the GPUs that its groups hold."""
    demand = work.maker.demand
    num_gpus = num_groups * demand.num_workers * demand.gpus_per_worker
    held = min(num_gpus, inventory.num_gpus)
    return TimeLimit(work.config, held, work.run, progress.say)


class Work:
    """What of a run is left to do, whatever the engine."""

    def __init__(self, plan: Plan, maker: TrialMaker, run: RunPaths) -> None:
        self.plan, self.maker, self.run = plan, maker, run
        self.config: SweepConfig = plan.config
        self.is_confirming = False
        self.look()
        self.num_notes = {t["name"]: len(notes_of(run.trial(t["name"]))) for t in self.trials}

    def look(self) -> None:
        """Reads from disk what has ended and what has not."""
        fetch_all_records(self.run.root)
        self.seen = settle(self.run)
        self.clones = clones_of(self.run)
        planned = {trial_name(candidate): candidate for candidate in self.plan.pruned.admitted}
        for name, candidate in (planned | self.clones).items():
            if not self.run.trial(name).config.exists():
                self.maker.write(candidate)
        names = [*planned, *self.clones] if planned else known_names(self.run)
        self._take(unended(self.run, names))
        if self.first_trial() is None and self.config.confirm:
            self.is_confirming = True
            self._take(unended(self.run, repeat_names(self.run, self.maker.write, self.config)))

    def _take(self, names: list[str]) -> None:
        self.trials = [read_state(self.run.trial(name).config) for name in names]

    def rounds(self, limit: TimeLimit) -> Iterator[None]:
        """The search, and then, where that is asked for, the best two once more on new seeds: as long as there is
        something to run, and time."""
        while limit.reason is None and self.first_trial() is not None:
            was = self.is_confirming
            yield
            if limit.reason is not None:
                break
            if signals.received() or self.is_confirming == was:
                return
        if limit.reason is not None:
            self._end_all(limit.reason)

    def _end_all(self, reason: str) -> None:
        """Ends what is left as the time is up: what a resume is to go on with is nothing."""
        while self.trials:
            for trial in self.trials:
                paths = self.run.trial(trial["name"])
                has_begun = paths.metrics.exists()
                mark_ended(paths, "stopped", reason if has_begun else f"{reason} before it began")
            self.look()  # what would be confirmed now ends with the others

    def run_all(
        self,
        trainable: Any,
        common: dict[str, Any],
        max_concurrent: int,
        make_ledger: Callable[..., Ledger],
        limit: TimeLimit,
        control: Control | None = None,
        *,
        reuse_actors: bool = True,
    ) -> None:
        """Runs what is left to its ends, with trials that Tune gave up before they began once more.

        Args:
            common: what the engine adds to every trial's config.
            make_ledger: is given the trackers, how many notes of each trial were said before, and what of control it
                needs.
            control: obeys what is asked of the sweep meanwhile; None: nothing can be.
            reuse_actors: see sweep.run_trials.
        """
        trackers = make_trackers(list(self.config.tracking), self.plan.name, self.run)
        never_began: list[str] = []
        for _ in range(1 + sweep.ACTOR_FAILURES):
            steered = {"on_step": control.look, "reasons": control.stopped} if control else {}
            ledger = make_ledger(trackers=trackers, num_notes=self.num_notes, **steered)
            searcher, scheduler = self.searcher(common), self.scheduler()
            if control is not None:
                scheduler.withdrawn = control.stopped
                searcher = self._live(searcher, common, max_concurrent, control, ledger)
            sweep.run_trials(
                trainable,
                searcher,
                scheduler,
                self.run,
                max_concurrent=max_concurrent + (control.beside if control else 0),
                callback=ledger,
                stopper=limit,
                reuse_actors=reuse_actors,
            )
            limit.keep()
            self.look()
            never_began = ledger.never_began
            if not never_began or len(self.trials) > len(never_began):  # more: it was interrupted
                return
        for name in never_began:
            mark_ended(self.run.trial(name), "failed", NEVER_BEGAN)

    def control(
        self,
        progress: Progress,
        cancel: Callable[[str, str], None] | None = None,
        put_ahead: Callable[[dict[str, Any]], None] | None = None,
    ) -> Control | None:
        """What obeys the commands to this sweep; see Control. None: it takes none."""
        control = Control(self.run, self.maker, progress, cancel, put_ahead)
        control.is_search_over = self.is_confirming
        return control

    def _live(
        self, searcher: Any, common: dict[str, Any], most: int, control: Control, ledger: Ledger
    ) -> Any:
        """A searcher of the plan's trials, made one that takes clones up and leaves out who is stopped."""
        from orchestration.live_searcher import LiveSearcher

        live = LiveSearcher(
            searcher,
            common | {"seen": self.seen},
            clones=[trial for trial in self.trials if trial["name"] in self.clones],
            most=most,
            beside=control.beside,
            put_ahead=control.put_ahead,
            look=control.look_now,
        )
        control.attach(live, partial(ledger.end, status="stopped"))
        return live

    def first_trial(self) -> dict[str, Any] | None:
        """A trial whose base and data the workers load before anything else."""
        if self.trials or self.is_confirming or not self.plan.num_proposed:
            return self.trials[0] if self.trials else None
        if len(known_names(self.run)) - len(self.clones) >= self.plan.num_proposed:
            return None
        from orchestration.searchers import AdmittedSpace

        domains = tuple(domain for domain in self.plan.domains if domain.admissible)
        return self.maker.make(next(AdmittedSpace(self.plan.space, domains).grid()))

    def searcher(self, common: dict[str, Any]) -> Any:
        """What gives Tune the trials; `common` is the engine's part of their configs."""
        from orchestration.searchers import ListSearcher, OptunaSearcher

        common = common | {"seen": self.seen}
        trials = [trial for trial in self.trials if trial["name"] not in self.clones]
        if self.is_confirming or not self.plan.num_proposed:
            return ListSearcher(trials, common)
        return OptunaSearcher(
            self.plan.space,
            self.plan.domains,
            self.plan.num_proposed,
            self.config.seed,
            self.maker.write,
            common,
            first=trials,
            history=history(self.run, self.clones),
            others=self.clones.values(),
        )

    def scheduler(self) -> Any:
        """Tune's scheduler, as it was when the last driver of this run died."""
        budget = self.plan.budget
        assert budget is not None
        if self.is_confirming:
            most = budget.num_examples
            return make_scheduler("fifo", most, most, 2, RungLedger(self.run.confirmed))
        scheduler = make_scheduler(
            self.config.scheduler,
            budget.grace_period,
            budget.num_examples,
            self.config.reduction_factor,
            RungLedger(self.run.rungs),
        )
        for name, examples, loss in untold(self.run):
            scheduler.complete(name, examples, loss)
        return scheduler
