"""plan.json: a plan as `tenfold plan --json` prints it and as the report reads it."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from orchestration.checkpoint_bytes import checkpoint_bytes
from orchestration.choice_config import judge_of, task_spec
from orchestration.config import SweepConfig
from orchestration.planning import Plan, epoch_examples
from orchestration.rl_config import rl_spec
from search_spaces.architecture import ModelShape
from search_spaces.candidate import Candidate, trial_name
from search_spaces.capacity import check_capacity
from search_spaces.domains import TargetDomain
from search_spaces.pruner import Discarded


def plan_to_dict(plan: Plan, packs: dict[str, Any] | None = None) -> dict[str, Any]:
    """plan.json: what `tenfold plan --json` prints and the report reads.

    Args:
        packs: see packs.local_packs; None where the engine has none or nobody can say yet.
    """
    shape, config = plan.shape, plan.config
    names = (
        "model_type",
        "num_params",
        "hidden_size",
        "num_layers",
        "vocab_size",
        "num_experts",
        "num_active_experts",
        "tied_head",
        "is_from_model",
    )
    return {
        "name": plan.name,
        "method": config.method,
        "model": {"name": config.model} | {name: getattr(shape, name) for name in names},
        "coverage": [coverage(shape, target) for target in plan.space.target.options],
        "data": plan.audit.to_dict() | {"data": config.data} if plan.audit else None,
        "retention": plan.retention,
        "rl": _episodes(plan),
        "task": task.described() if (task := task_spec(config)) else None,
        "choice": _choice(config),
        "dataset_tokens": plan.dataset_tokens,
        "dataset_bits": plan.dataset_bits,
        "capacity": plan.capacity.to_dict(),
        "capacity_policy": config.capacity_policy,
        "defaults": [note._asdict() for note in plan.space.notes],
        "confirmation": _confirmation(plan),
        "budget": asdict(plan.budget) if plan.budget else None,
        "inventory": asdict(plan.inventory) if plan.inventory else None,
        "seq_len": plan.data_spec.seq_len if plan.data_spec else None,
        "packing": config.packing,
        "engine": config.engine,
        "packs": packs,
        "checkpoints": checkpoint_bytes(plan),
        "cut_ranks": [_cut_dict(domain) for domain in plan.domains if domain.cut_lora_ranks],
        "cut_values": [cut for domain in plan.domains for cut in _cut_values(domain)],
        "unfit_ranks": [
            {"target": list(domain.target), "lora_ranks": list(domain.unfit_lora_ranks)}
            for domain in plan.domains
            if domain.unfit_lora_ranks
        ],
        "num_proposed": plan.num_proposed,
        "candidates": [_candidate_dict(plan, candidate) for candidate in plan.pruned.admitted],
        "discarded": [_discarded_dict(plan, item) for item in plan.pruned.discarded],
        "advised": [_discarded_dict(plan, item) for item in plan.pruned.advised],
        "pitfalls": [asdict(pitfall) for pitfall in plan.pitfalls],
    }


def _episodes(plan: Plan) -> dict[str, Any] | None:
    """How episodes are made and how many a trial has; None for supervised fine-tuning."""
    if (spec := rl_spec(plan.config)) is None:
        return None
    prompts = plan.budget.num_examples if plan.budget else plan.config.examples or 0
    episodes = prompts * spec.num_generations
    return spec.described() | {"num_prompts": prompts, "num_episodes": episodes}


def _choice(config: SweepConfig) -> dict[str, Any]:
    """How the best is chosen, and what ends the sweep before its end."""
    keys = ("select", "max_forgetting", "confirm", "time_budget", "max_cost")
    return vars(judge_of(config)) | {key: getattr(config, key) for key in keys}


def coverage(shape: ModelShape, target: tuple[str, ...]) -> dict[str, Any]:
    """Which matrices a target adapts, counted by component, and what stays frozen whatever it names."""
    counts = Counter[str]()
    for linear in shape.resolve_target(target):
        counts[linear.component] += linear.count
    frozen = ["embeddings", "norms", *(["routers"] if shape.num_experts else [])]
    left = [component for component in shape.components if component not in counts]
    return {"target": list(target), "matrices": dict(counts), "left_out": left, "frozen": frozen}


def _confirmation(plan: Plan) -> dict[str, Any] | None:
    if plan.space.prior.interval is None:
        return None
    from orchestration.carried import confirmation

    per_example = None
    if plan.audit:
        per_example = plan.audit.num_train_tokens / epoch_examples(plan.config, plan.audit)
    return confirmation(plan.space, plan.pruned.admitted, plan.domains, plan.budget, per_example)


def _candidate_dict(plan: Plan, candidate: Candidate) -> dict[str, Any]:
    return {
        "name": trial_name(candidate),
        "candidate": candidate.to_dict(),
        "scale": candidate.scale,
        "scaled_learning_rate": candidate.scaled_learning_rate,
        **_capacity(plan, candidate),
        "steps": math.ceil(plan.budget.num_examples / candidate.global_batch_size)
        if plan.budget
        else None,
    }


def _cut_dict(domain: TargetDomain) -> dict[str, Any]:
    return {
        "target": list(domain.target),
        "lora_ranks": list(domain.cut_lora_ranks),
        "sufficient_rank": domain.sufficient_rank,
    }


def _cut_values(domain: TargetDomain) -> Iterator[dict[str, Any]]:
    """What of other keys a target cannot have."""
    cut = {"dropout": domain.cut_dropouts, "variant": domain.cut_variants}
    for key, values in cut.items():
        if values:
            reason = "fused experts are parameters, on which PEFT has none of it"
            target = list(domain.target)
            yield {"target": target, "key": key, "values": list(values), "reason": reason}


def _capacity(plan: Plan, candidate: Candidate) -> dict[str, int]:
    check = check_capacity(plan.shape, candidate.lora_rank, plan.dataset_bits, candidate.target)
    return {"adapter_params": check.adapter_params, "adapter_bits": check.adapter_bits}


def _discarded_dict(plan: Plan, item: Discarded) -> dict[str, Any]:
    return {
        "candidate": item.candidate.to_dict(),
        "rule": item.rule,
        "reason": item.reason,
        "numbers": dict(item.numbers),
        **_capacity(plan, item.candidate),
    }
