"""A trial made of another while a sweep runs: its candidate, judged as the plan judged all others, and its record.

trials/TRIAL/clone.json holds the candidate, whose it was, what was changed and by whose command: what plan.json is to
the other trials. Imports neither torch nor ray.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cluster.inventory import Inventory
from cluster.packing import PackPlan
from cluster.placement import split_global_batch
from orchestration.commands import Command
from orchestration.config import SweepConfig
from orchestration.memory_rule import MemoryRule
from orchestration.models import model_shape
from orchestration.planning import longest_row_tokens
from orchestration.rl_config import generations_of
from orchestration.saved import Saved, saved_config
from orchestration.yaml_file import read_value
from search_spaces import pitfalls
from search_spaces.architecture import ModelShape
from search_spaces.candidate import Candidate, trial_name
from search_spaces.pruner import Verdict, why_not
from search_spaces.values import KEYS, check_value, parse_targets
from search_spaces.variants import alpha_at, parse_alpha
from trainers.integrity import DamagedError
from trainers.mirror import shown
from trainers.paths import RunPaths, read_state, write_state

WHOLE_SWEEP = ("full_finetune",)
"""Keys of a candidate that are one for a whole sweep."""
LEGAL = tuple(field.name for field in fields(Candidate) if field.name not in WHOLE_SWEEP)


def parsed_changes(given: Sequence[str]) -> dict[str, Any]:
    """--set KEY=VALUE, as a user wrote them.

    Raises:
        ValueError: not of that form, a key that a candidate does not have, or one given twice.
    """
    changes: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"--set must be KEY=VALUE, got {text!r}")
        if key in changes:
            raise ValueError(f"--set {key}: must be given once, is given twice")
        changes[key] = read_value(value, f"--set {key}")
    return changes


def checked_changes(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of a candidate as JSON holds them; a rule for alpha and a target stay as they were written.

    Raises:
        ValueError: none, an unknown key, or a value out of range.
    """
    if not changes:
        raise ValueError(f"--set must be given: what is changed, one of {', '.join(LEGAL)}")
    return {key: _checked(key, value) for key, value in changes.items()}


def _checked(key: str, value: Any) -> Any:
    if key not in LEGAL:
        close = difflib.get_close_matches(key, LEGAL, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"legal: {', '.join(LEGAL)}"
        one = "is one for the whole sweep" if key in SweepConfig.model_fields else "is none"
        raise ValueError(f"{key}: must be a key of a candidate, {one}; {hint}")
    if key == "target":
        (target, *others) = parse_targets(value)
        if others:
            raise ValueError(f"target of a clone must be one target, got {value!r}")
        return target if isinstance(target, str) else list(target)
    if key == "lora_alpha" and isinstance(value, str):
        return str(parse_alpha(value))
    if KEYS[key].whole and isinstance(value, float) and value.is_integer():
        value = int(value)  # 2e1, as YAML reads it
    return check_value(key, value)


class Admission:
    """Says of a candidate whether a sweep that was planned can have it, from what is on disk.

    Args:
        saved: the sweep.
        place: its folder or URL, for messages.

    Raises:
        ValueError: the model's config cannot be read here.
    """

    def __init__(self, saved: Saved, place: str) -> None:
        self.saved, self.place = saved, place
        self.config = saved_config(saved.run, saved.resolved, place)
        self.shape = self._shape()

    def _shape(self) -> ModelShape:
        model = self.config.model
        configs = sorted(self.saved.run.trials.glob("*/config.json"))
        if configs:  # a trial's is absolute, the config's as its driver's folder had it
            model = read_state(configs[0])["base"]["model"]
        return model_shape(model, self.config.revision)

    def clone(self, of: str, changes: Mapping[str, Any]) -> Candidate:
        """The candidate of a trial with keys changed, if the sweep can have it.

        Raises:
            ValueError: it cannot, with the numbers.
        """
        candidate = self._changed(self._candidate_of(of), changes)
        name = trial_name(candidate)
        if name in self.saved.trials:
            raise ValueError(
                f"a clone must be a new candidate, this is {name}, which the sweep has already; set another value"
            )
        plan = self.saved.plan
        bits, policy = plan["dataset_bits"], plan["capacity_policy"]
        if verdict := why_not(candidate, self.shape, bits, policy, self._outside):
            raise ValueError(verdict.reason)
        self._require_whole_batches(candidate)
        return candidate

    def _candidate_of(self, name: str) -> Candidate:
        config = self.saved.run.trial(name).config
        if config.is_file():
            return Candidate.from_dict(read_state(config)["candidate"])
        (item,) = (item for item in self.saved.plan["candidates"] if item["name"] == name)
        return Candidate.from_dict(item["candidate"])

    def _changed(self, candidate: Candidate, changes: Mapping[str, Any]) -> Candidate:
        values = candidate.to_dict() | dict(changes)
        if isinstance(values["lora_alpha"], str):
            values["lora_alpha"] = alpha_at(parse_alpha(values["lora_alpha"]), values["lora_rank"])
        values["target"] = self.shape.normalize_target(values["target"])
        return Candidate.from_dict(values)

    def _outside(self, candidate: Candidate) -> Verdict | None:
        plan = self.saved.plan
        if plan["inventory"] is None:
            return None
        audit = plan["data"] or {}
        row = longest_row_tokens(self.config, plan["seq_len"], audit.get("max_row_tokens"))
        rule = MemoryRule(self.config, self.shape, None, row, Inventory(**plan["inventory"]))
        packs = packs_of(self.saved.run)
        return rule.by_candidate(candidate) or (packs and rule.in_packs(candidate, packs)) or None

    def _require_whole_batches(self, candidate: Candidate) -> None:
        packs, workers = packs_of(self.saved.run), self.config.workers_per_trial
        num_workers = packs.workers_per_group if packs else 1 if workers == "auto" else workers
        rows = candidate.global_batch_size * generations_of(self.config)
        split_global_batch(rows, num_workers, 1)

    def _pitfalls(self, candidate: Candidate) -> list[pitfalls.Pitfall]:
        budget = self.saved.plan["budget"]
        return pitfalls.find(
            shape=self.shape,
            candidates=[candidate],
            method=self.config.method,
            num_examples=budget["num_examples"],
            dataset_bits=self.saved.plan["dataset_bits"],
        )

    def warnings(self, candidate: Candidate, of: str) -> list[str]:
        """Pitfalls that a clone has and its trial had not."""
        known = {found.code for found in self._pitfalls(self._candidate_of(of))}
        return [
            f"{found.severity}: {found.evidence}: {found.symptom}. Fix: {found.fix}"
            for found in self._pitfalls(candidate)
            if found.code not in known and found.severity == "warning"
        ]


def packs_of(run: RunPaths) -> PackPlan | None:
    """The packs of a run as they were planned last; None before that, and of engine solo."""
    if not run.packs.is_file():
        return None
    values = read_state(run.packs)
    return PackPlan(**{field.name: values[field.name] for field in fields(PackPlan)})


def record_clone(run: RunPaths, candidate: Candidate, command: Command) -> None:
    """Keeps a clone, before its trial's config.json is written."""
    record = {"candidate": candidate.to_dict(), "of": command.trial, "changes": command.changes}
    record |= {"by": command.by, "command": command.id}
    write_state(run.trial(trial_name(candidate)).clone, record)


def clone_records(run: RunPaths) -> dict[str, dict[str, Any]]:
    """Clone -> its record; the first that was made first. One whose record is damaged is known by its config.

    Raises:
        ValueError: one that nothing describes.
    """
    found = {}
    for path in run.trials.glob("*/clone.json"):
        try:
            found[path.parent.name] = read_state(path)
        except DamagedError as error:
            found[path.parent.name] = _from_config(run, path, error)
    return dict(sorted(found.items(), key=lambda item: item[1]["command"]))


def _from_config(run: RunPaths, path: Path, error: DamagedError) -> dict[str, Any]:
    config = run.trial(path.parent.name).config
    if not config.is_file():
        raise ValueError(
            f"{error}; nothing else describes this trial: remove {shown(path.parent)} to give it up"
        ) from error
    candidate = read_state(config)["candidate"]
    return {"candidate": candidate, "of": "", "changes": {}, "by": "", "command": ""}


def clones_of(run: RunPaths) -> dict[str, Candidate]:
    """Clone -> its candidate."""
    return {n: Candidate.from_dict(r["candidate"]) for n, r in clone_records(run).items()}
