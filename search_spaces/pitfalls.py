"""The doctrine's pitfalls and their neighbours, found before anything runs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from search_spaces import doctrine
from search_spaces.architecture import ModelShape
from search_spaces.candidate import Candidate
from search_spaces.capacity import Real, check_capacity
from search_spaces.domains import SearchSpace
from search_spaces.priors import LearningRatePrior, learning_rate_prior
from search_spaces.variants import RankMultiple, alpha_at

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, kw_only=True)
class Pitfall:
    """One mistake that a sweep is about to make.

    Attributes:
        code: stable name, e.g. 'attention_only'.
        severity: 'error' (cannot work), 'warning' (works worse), 'note' (know it).
        symptom: what would be seen.
        evidence: the values of this sweep that show it.
        fix: what to write instead.
        source: who says so.
    """

    code: str
    severity: Severity
    symptom: str
    evidence: str
    fix: str
    source: str


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What a sweep would run, each value once, sorted."""

    shape: ModelShape
    method: str
    targets: tuple[tuple[str, ...], ...]
    adapters: tuple[tuple[tuple[str, ...], int], ...]
    scales: tuple[tuple[float, int], ...]
    dropouts: tuple[float, ...]
    batches: tuple[int, ...]
    lora_rates: tuple[float, ...]
    full_rates: tuple[float, ...]
    prior: LearningRatePrior
    num_examples: float | None
    dataset_bits: Real | None
    alpha_rule: bool
    """Whether alpha is a multiple of the rank, so that the prior was rescaled for it."""

    def components(self, target: tuple[str, ...]) -> set[str]:
        return {linear.component for linear in self.shape.resolve_target(target)}


def find(
    *,
    shape: ModelShape,
    space: SearchSpace | None = None,
    candidates: Iterable[Candidate] | None = None,
    method: str = "sft",
    num_examples: int | None = None,
    epochs: float | None = None,
    dataset_bits: Real | None = None,
    prior: LearningRatePrior | None = None,
) -> list[Pitfall]:
    """The pitfalls of a sweep, errors first.

    Args:
        shape: the model.
        space: the sweep's space; or
        candidates: what would run (full fine-tuning arms are only seen here). Both may be given.
        method: 'sft' or 'rl'.
        num_examples: training examples of one epoch; None: steps are not judged.
        epochs: passes over them; None: the space's budget, else 1.
        dataset_bits: bits of the data; None: capacity is not judged.
        prior: learning-rate prior; None: the space's, else the doctrine's.

    Raises:
        ValueError: neither space nor candidates, or a target that the model does not have.

    Source: docs/doctrine.md, section 2.
    """
    doctrine.check_method(method)
    if space is None and candidates is None:
        raise ValueError("find needs a space or candidates, got neither; give space=")
    if prior is None:
        prior = space.prior if space else _doctrine_prior(shape, method)
    facts = _facts(
        shape,
        method,
        _space_items(space) | {_item(candidate) for candidate in candidates or ()},
        _space_rates(space),
        prior,
        _examples_seen(space, num_examples, epochs),
        dataset_bits,
        alpha_rule=space is not None and isinstance(space.lora_alpha.values()[0], RankMultiple),
    )
    found = [pitfall for check in _CHECKS for pitfall in [check(facts)] if pitfall]
    return sorted(found, key=lambda pitfall: ("error", "warning", "note").index(pitfall.severity))


def _doctrine_prior(shape: ModelShape, method: str) -> LearningRatePrior:
    return learning_rate_prior(
        hidden_size=shape.hidden_size, model_type=shape.model_type, method=method
    )


# (full_finetune, target, rank, alpha, dropout, batch, learning rate or None)
_Item = tuple[bool, tuple[str, ...], int, float, float, int, float | None]


def _item(candidate: Candidate) -> _Item:
    return (
        candidate.full_finetune,
        candidate.target,
        candidate.lora_rank,
        candidate.lora_alpha,
        candidate.dropout,
        candidate.global_batch_size,
        candidate.learning_rate,
    )


def _space_items(space: SearchSpace | None) -> set[_Item]:
    if space is None:
        return set()
    return {
        (False, target, rank, alpha, dropout, batch, None)
        for target in space.target.options
        for rank in space.lora_rank.options
        for alpha in {alpha_at(alpha, rank) for alpha in space.lora_alpha.values()}
        for dropout in space.dropout.options
        for batch in space.global_batch_size.options
    }


def _space_rates(space: SearchSpace | None) -> set[float]:
    return set(space.learning_rate.values()) if space else set()


def _examples_seen(
    space: SearchSpace | None, num_examples: int | None, epochs: float | None
) -> float | None:
    budget = space.examples.options[0] if space else None
    if budget is not None and epochs is None:
        return budget
    if num_examples is None:
        return None
    if epochs is None:
        epochs = space.epochs.options[0] if space else None
    return num_examples * (1.0 if epochs is None else epochs)


def _facts(
    shape: ModelShape,
    method: str,
    items: set[_Item],
    rates: set[float],
    prior: LearningRatePrior,
    num_examples: float | None,
    dataset_bits: Real | None,
    *,
    alpha_rule: bool,
) -> _Facts:
    lora = [item for item in items if not item[0]]
    lora_rates = rates | {item[6] for item in lora if item[6] is not None}
    return _Facts(
        shape=shape,
        method=method,
        targets=tuple(sorted({item[1] for item in lora})),
        adapters=tuple(sorted({(item[1], item[2]) for item in lora})),
        scales=tuple(sorted({(item[3], item[2]) for item in lora})),
        dropouts=tuple(sorted({item[4] for item in lora})),
        batches=tuple(sorted({item[5] for item in items})),
        lora_rates=tuple(sorted(lora_rates)),
        full_rates=tuple(sorted({item[6] for item in items if item[0] and item[6] is not None})),
        prior=prior,
        num_examples=num_examples,
        dataset_bits=dataset_bits,
        alpha_rule=alpha_rule,
    )


def _attention_only(facts: _Facts) -> Pitfall | None:
    bad = [target for target in facts.targets if facts.components(target) == {"attn"}]
    if not bad:
        return None
    mlp = "experts" if "mlp" not in facts.shape.components else "mlp"
    return Pitfall(
        code="attention_only",
        severity="warning",
        symptom="the loss stays above that of a smaller adapter on the MLP layers",
        evidence=f"target {_targets_text(bad)} reaches attention alone",
        fix=f"add {mlp}: target: {'+'.join(facts.shape.components)}",
        source=f"{doctrine.TARGET.source}; {doctrine.TARGET.evidence}",
    )


def _missing_unembed(facts: _Facts) -> Pitfall | None:
    bad = [target for target in facts.targets if "unembed" not in facts.components(target)]
    if not bad or "unembed" not in facts.shape.components:
        return None
    return Pitfall(
        code="missing_unembed",
        severity="warning",
        symptom="the adapter is smaller than the doctrine's, whose totals count lm_head",
        evidence=f"target {_targets_text(bad)} leaves out lm_head",
        fix=f"add unembed: target: {'+'.join(facts.shape.components)}",
        source=f"{doctrine.USER_DOCTRINE}: layers are MLP + attention + unembedding",
    )


def _missing_experts(facts: _Facts) -> Pitfall | None:
    if "experts" not in facts.shape.components:
        return None
    bad = [target for target in facts.targets if "experts" not in facts.components(target)]
    if not bad:
        return None
    return Pitfall(
        code="missing_experts",
        severity="warning",
        symptom="a plausible loss from a tiny adapter: most weights of the model get none",
        evidence=f"target {_targets_text(bad)} reaches none of {facts.shape.num_experts} experts",
        fix=f"add experts: target: {'+'.join(facts.shape.components)}",
        source=f"{doctrine.MOE_RANK.source}; huggingface/peft#3009",
    )


def _few_steps(facts: _Facts) -> Pitfall | None:
    limit = doctrine.SHORT_RUN_STEPS.value
    if facts.num_examples is None:
        return None
    seen = facts.num_examples
    steps = {batch: math.ceil(seen / batch) for batch in facts.batches}
    short = [f"{count} steps at batch {batch}" for batch, count in steps.items() if count < limit]
    if not short:
        return None
    ratio = doctrine.LR_RATIO_SHORT
    return Pitfall(
        code="few_steps",
        severity="warning",
        symptom=f"the best LR is nearer {ratio.value:g}x than {doctrine.LR_RATIO.value:g}x FullFT",
        evidence=f"{', '.join(short)} from {seen:g} examples; about {limit} are needed",
        fix=f"raise epochs, lower global_batch_size, or centre on "
        f"{ratio.value * facts.prior.full_ft:.3g} ({ratio.value:g}x)",
        source=f"{ratio.source}; {ratio.evidence}",
    )


def _low_learning_rate(facts: _Facts) -> Pitfall | None:
    # A grid may well start low; the mistake is a sweep that nowhere reaches the ratios in use.
    ratio = doctrine.LR_COVERAGE.value[0]
    floor = ratio * facts.prior.full_ft
    if not facts.lora_rates or facts.lora_rates[-1] >= floor * (1 - 1e-9):
        return None
    return Pitfall(
        code="low_learning_rate",
        severity="warning",
        symptom="every arm is still far from its optimum when the budget ends",
        evidence=f"highest learning_rate {facts.lora_rates[-1]:.3g} is below {ratio:g}x FullFT "
        f"({floor:.3g})",
        fix=f"centre on {facts.prior.lora:.3g}, {doctrine.LR_RATIO.value:g}x FullFT",
        source=f"{doctrine.LR_RATIO.source}; {doctrine.LR_COVERAGE.source}",
    )


def _undercapacity(facts: _Facts) -> Pitfall | None:
    if facts.dataset_bits is None:
        return None
    bits = facts.dataset_bits
    checks = [(t, check_capacity(facts.shape, rank, bits, t)) for t, rank in facts.adapters]
    bad = [(target, check) for target, check in checks if not check.ok]
    if not bad:
        return None
    target, worst = min(bad, key=lambda item: item[1].margin)
    return Pitfall(
        code="undercapacity",
        severity="error" if len(bad) == len(checks) else "warning",
        symptom="learning slows where the adapter is full; more data does not help",
        evidence=f"{len(bad)} of {len(checks)} adapters; rank {worst.lora_rank} on "
        f"{'+'.join(target)}: {worst.adapter_bits:,} bits < {worst.dataset_bits:,} data bits",
        fix=f"raise lora_rank to {worst.sufficient_rank:,} or more on {'+'.join(target)}",
        source=f"{doctrine.BITS_PER_PARAM.source}; {doctrine.BITS_PER_PARAM.evidence}",
    )


def _wrong_alpha(facts: _Facts) -> Pitfall | None:
    bad = [(a, rank) for a, rank in facts.scales if a not in (doctrine.ALPHA.value, rank)]
    if facts.alpha_rule or not bad:
        return None
    pairs = ", ".join(f"alpha {alpha:g} at rank {rank}" for alpha, rank in bad)
    return Pitfall(
        code="wrong_alpha",
        severity="warning",
        symptom="the step is LR x alpha / rank: the learning-rate prior does not hold",
        evidence=pairs,
        fix=f"lora_alpha: {doctrine.ALPHA.value:g} (or equal to the rank)",
        source=f"{doctrine.ALPHA.source}; {doctrine.ALPHA.evidence}",
    )


def _batch_range(facts: _Facts) -> Pitfall | None:
    low, high = doctrine.BATCH_RANGE.value
    bad = [batch for batch in facts.batches if not low <= batch <= high]
    if not bad:
        return None
    return Pitfall(
        code="batch_range",
        severity="warning",
        symptom="at large batches LoRA falls behind FullFT, and no rank mends it",
        evidence=f"global_batch_size {', '.join(map(str, bad))} outside {low}-{high}",
        fix=f"global_batch_size within {low} to {high} (micro x accumulation x workers)",
        source=f"{doctrine.BATCH_RANGE.source}; {doctrine.BATCH_RANGE.evidence}",
    )


def _dropout(facts: _Facts) -> Pitfall | None:
    bad = [dropout for dropout in facts.dropouts if dropout != doctrine.DROPOUT.value]
    if not bad:
        return None
    experts = any("experts" in facts.components(target) for target in facts.targets)
    return Pitfall(
        code="dropout",
        severity="error" if experts else "warning",
        symptom="PEFT refuses it on fused experts" if experts else "noise for no measured gain",
        evidence=f"dropout {', '.join(f'{value:g}' for value in bad)}",
        fix=f"dropout: {doctrine.DROPOUT.value:g}",
        source=f"{doctrine.DROPOUT.source}; {doctrine.DROPOUT.evidence}",
    )


def _rl_rank(facts: _Facts) -> Pitfall | None:
    limit = doctrine.RL_RANK_WARNING
    bad = sorted({rank for _, rank in facts.adapters if rank > limit.value})
    if facts.method != "rl" or not bad:
        return None
    return Pitfall(
        code="rl_rank",
        severity="warning",
        symptom="the policy collapses; RL gives about one bit for each episode, rank 1 may do",
        evidence=f"lora_rank {', '.join(map(str, bad))} above {limit.value}",
        fix=f"lora_rank at most {limit.value}",
        source=f"{limit.source}; {limit.evidence}",
    )


def _shared_learning_rate(facts: _Facts) -> Pitfall | None:
    # Overlapping grids compare fairly, each arm having rates of its own; one and the same list is
    # the mistake.
    if not facts.full_rates or facts.lora_rates != facts.full_rates:
        return None
    return Pitfall(
        code="shared_learning_rate",
        severity="warning",
        symptom="one arm is far from its optimum and loses for that reason alone",
        evidence="LoRA and FullFT run the same learning rates "
        f"{', '.join(f'{rate:.3g}' for rate in facts.full_rates)}",
        fix=f"LoRA at {doctrine.LR_RATIO.value:g}x the FullFT rates",
        source=f"{doctrine.LR_RATIO.source}; docs/doctrine.md, section 4",
    )


def _expert_rank_floor(facts: _Facts) -> Pitfall | None:
    active = facts.shape.num_active_experts
    bad = {r for t, r in facts.adapters if r < active and "experts" in facts.components(t)}
    if not bad:
        return None
    return Pitfall(
        code="expert_rank_floor",
        severity="note",
        symptom="the experts' adapters are larger than rank / active experts would make them",
        evidence="; ".join(doctrine.expert_rank_note(rank, active) for rank in sorted(bad)),
        fix=f"lora_rank at least {active}, the number of active experts",
        source=f"{doctrine.MOE_RANK.source}; {doctrine.MOE_RANK.evidence}",
    )


def _targets_text(targets: Iterable[tuple[str, ...]]) -> str:
    return ", ".join("+".join(target) for target in targets)


_CHECKS = (
    *(_attention_only, _few_steps, _low_learning_rate, _undercapacity, _missing_unembed),
    *(_wrong_alpha, _batch_range, _dropout, _rl_rank, _missing_experts, _shared_learning_rate),
    _expert_rank_floor,
)
