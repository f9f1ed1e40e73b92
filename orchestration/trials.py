"""The trials of a run: their dicts, and what of them is left to do."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.choice_config import judge_of, task_spec
from orchestration.results import mark_ended, read_trial
from orchestration.rl_config import rl_spec
from orchestration.rungs import BY_SCHEDULER, CLOCK, RungLedger, stopped_trials
from search_spaces.candidate import Candidate, trial_name
from trainers.base_fetch import is_hub_id
from trainers.mirror import shown
from trainers.paths import RunPaths, TrialPaths, read_state, write_state

if TYPE_CHECKING:
    from cluster.inventory import TrialDemand
    from cluster.packing import PackPlan
    from orchestration.planning import Plan


class TrialMaker:
    """Makes the dicts that `trainers.sft_trainer.TrialSpec.from_dict` reads, and keeps each on disk."""

    def __init__(
        self,
        plan: "Plan",
        demand: "TrialDemand",
        packs: "PackPlan",
        run: RunPaths,
        *,
        keep_weights: bool = True,
    ) -> None:
        self.plan, self.demand, self.packs, self.run = plan, demand, packs, run
        self.keep_weights = keep_weights

    def make(self, candidate: Candidate, repeats: str | None = None) -> dict[str, Any]:
        """A trial's dict, not written. repeats: see TrialSpec."""
        config, budget, data = self.plan.config, self.plan.budget, self.plan.data_spec
        assert budget is not None
        assert data is not None
        name = trial_name(candidate)
        return {
            "name": name,
            "folder": shown(self.run.trial(name).root.resolve()),
            "base": {
                "model": _absolute_path(config.model),
                "revision": config.revision,
                "quantization": config.quantization,
                "dtype": config.dtype,
                "keep_dequantized": self.packs.keep_dequantized,
                "sharded": self.packs.strategy == "zero3",
                "gradient_checkpointing": self.packs.gradient_checkpointing,
            },
            "data": _absolute(vars(data)) | self._tokenizer(),
            "candidate": candidate.to_dict(),
            "num_examples": budget.num_examples,
            "eval_every": budget.eval_every,
            "group_by_length": config.group_by_length,
            "micro_batch_size": config.micro_batch_size,
            "max_tokens": self.packs.max_tokens,
            "num_threads": self.demand.cpus_per_worker,
            "keep_weights": self.keep_weights,
            "rl": rl.for_workers() if (rl := rl_spec(config)) else None,
            "task": task.for_workers() if (task := task_spec(config)) else None,
            "judge": vars(judge_of(config)),
            "repeats": repeats,
        }

    def _tokenizer(self) -> dict[str, Any]:
        """Where a worker finds the tokenizer of a hub model: by its id, as it does the base; the driver's
        own copy is on another node's disk."""
        config = self.plan.config
        if not is_hub_id(config.model):
            return {}
        return {"model": config.model, "revision": config.revision}

    def write(self, candidate: Candidate, repeats: str | None = None) -> dict[str, Any]:
        """A trial's dict, kept as its config.json."""
        trial = self.make(candidate, repeats)
        write_state(self.run.trial(trial["name"]).config, trial)
        return trial


def _absolute(data: dict[str, Any]) -> dict[str, Any]:
    """Local paths made absolute: a worker's working directory is not the driver's."""
    paths = ("data", "model", "eval", "chat_template", "retention")
    return {key: _absolute_path(value) if key in paths else value for key, value in data.items()}


def _absolute_path(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_absolute_path(path): weight for path, weight in value.items()}
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value


def settle(run: RunPaths) -> dict[str, int]:
    """Writes the ends that a dead driver decided but did not write, and tells how many evaluations of
    each trial its scheduler saw."""
    records = RungLedger(run.rungs).records()
    for name in sorted(stopped_trials(records)):
        paths = run.trial(name)
        if paths.config.exists() and not paths.status.exists():
            end_stopped(paths, BY_SCHEDULER)
    seen: dict[str, set[int]] = {}
    for record in records:
        seen.setdefault(record.trial, set()).add(record.examples)
    return {name: len(examples) for name, examples in seen.items()}


def end_stopped(paths: TrialPaths, reason: str) -> None:
    """Writes the end of a trial that was stopped, unless it had come to its own by then."""
    config, rows = read_state(paths.config), read_trial(paths).rows
    done = bool(rows) and rows[-1]["examples"] >= config["num_examples"]
    mark_ended(paths, "finished" if done else "stopped", "" if done else reason)


def untold(run: RunPaths) -> list[tuple[str, int, float]]:
    """(trial, examples, eval_loss) of last results that no driver lived to tell its scheduler: a trial
    that finishes ends on its worker, and one that somebody stopped had a result that was judged before."""
    records = RungLedger(run.rungs).records()
    told, left = stopped_trials(records), []
    judged = {record.trial: (record.examples, record.eval_loss) for record in records}
    for name in known_names(run):
        record = read_trial(run.trial(name))
        if record.status == "finished" and name not in told:
            last = record.rows[-1]
            left.append((name, last[CLOCK], record.judge.loss(last)))
        elif record.status == "stopped" and name in judged.keys() - told:
            left.append((name, *judged[name]))
    return left


def unended(run: RunPaths, names: list[str]) -> list[str]:
    """Trials that have no end: those that had begun first, else in the given order."""
    left = [name for name in names if not run.trial(name).status.exists()]
    return sorted(left, key=lambda name: not run.trial(name).metrics.exists())


def known_names(run: RunPaths) -> list[str]:
    """Every trial of the search that has a config.json; not those that repeat one to confirm it."""
    configs = sorted(run.trials.glob("*/config.json"))
    return [path.parent.name for path in configs if read_state(path).get("repeats") is None]


def history(run: RunPaths, without: Container[str] = ()) -> list[tuple[Candidate, float | None]]:
    """Candidates that ended, with the last eval_loss of those that ended well, but for some trials."""
    found = []
    for name in known_names(run):
        if name in without:
            continue
        record = read_trial(run.trial(name))
        if record.status == "unfinished":
            continue
        loss = record.judge.loss(record.rows[-1]) if record.is_usable else None
        found.append((Candidate.from_dict(record.candidate), loss))
    return found
