"""Which candidates may run: capacity, and what the stack cannot train.

Capacity is monotone in the rank, so it is decided once per target, as the smallest sufficient
rank; judging a candidate is then a look-up.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

from search_spaces.architecture import ModelShape
from search_spaces.candidate import Candidate
from search_spaces.capacity import Real, check_capacity, sufficient_rank, whole_bits
from search_spaces.domains import SearchSpace, TargetDomain
from search_spaces.variants import ON_EXPERTS, parts_of

Policy = Literal["discard", "advisory"]
CAPACITY = "capacity"
EXPERT_DROPOUT = "expert_dropout"
EXPERT_VARIANT = "expert_variant"
SHARDED_VARIANT = "sharded_variant"
SHARDED_SAMPLING = "sharded_sampling"
MEMORY = "memory"
"""The rule of cluster/, which this package cannot see: its numbers hold needed_bytes and room_bytes."""


class NothingAdmittedError(ValueError):
    """No candidate can run; the message holds the numbers."""


@dataclass(frozen=True, kw_only=True)
class Discarded:
    """A candidate that does not run.

    Attributes:
        candidate: as it was proposed.
        rule: 'capacity', 'expert_dropout', 'expert_variant', or the name of a rule from outside ('memory',
            'sharded_variant', 'sharded_sampling').
        reason: one sentence for a person.
        numbers: what the sentence says, for plan.json; shared between equal verdicts.
    """

    candidate: Candidate
    rule: str
    reason: str
    numbers: Mapping[str, int | float]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why a candidate does not run: as in Discarded."""

    rule: str
    reason: str
    numbers: Mapping[str, int | float]


OutsideRule = Callable[["Candidate"], Verdict | None]
"""Why a candidate cannot run, or None."""
FitRule = Callable[[int, tuple[str, ...]], Verdict | None]
"""Why an adapter of a rank on a target has no room, or None."""


class DiscardedList(Sequence[Discarded]):
    """Discarded candidates, each record made when it is looked at.

    Measured (2 busy cores, 2026-11, benchmarks/judge_million.py): a million records made at once
    cost more than all the verdicts, most of it in garbage collection.
    """

    def __init__(self) -> None:
        self._candidates: list[Candidate] = []
        self._verdicts: list[Verdict] = []

    def add(self, candidate: Candidate, verdict: Verdict) -> None:
        """For `prune` alone."""
        self._candidates.append(candidate)
        self._verdicts.append(verdict)

    def verdicts(self) -> list[Verdict]:
        """The different verdicts, in order of first appearance."""
        return list({id(verdict): verdict for verdict in self._verdicts}.values())

    def __len__(self) -> int:
        return len(self._candidates)

    @overload
    def __getitem__(self, index: int) -> Discarded: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Discarded, ...]: ...
    def __getitem__(self, index: int | slice) -> Discarded | tuple[Discarded, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        verdict = self._verdicts[index]
        return Discarded(
            candidate=self._candidates[index],
            rule=verdict.rule,
            reason=verdict.reason,
            numbers=verdict.numbers,
        )


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """Candidates judged, in the order given.

    Attributes:
        admitted: these run.
        discarded: these do not.
        advised: under the policy 'advisory', admitted candidates that capacity would discard.
    """

    admitted: tuple[Candidate, ...]
    discarded: DiscardedList
    advised: DiscardedList


def prune(
    candidates: Iterable[Candidate],
    shape: ModelShape,
    dataset_bits: Real,
    policy: str = "discard",
    outside: OutsideRule | None = None,
) -> PruneResult:
    """Candidates, admitted or discarded and why.

    Args:
        candidates: any number, read once. Full fine-tuning is never discarded for capacity.
        shape: the model.
        dataset_bits: bits of the data (in RL episodes x 1), >= 0.
        policy: 'discard', or 'advisory': capacity is an estimate, what it would cut still runs.
        outside: a rule that needs to know more than shape and data; asked for what the others admit.

    Raises:
        NothingAdmittedError: there were candidates and none is admitted.
        ValueError: unknown policy, or a target that the model does not have.

    Source: docs/doctrine.md, section 1, capacity; huggingface/peft: ParamWrapper refuses dropout.
    """
    policy = _check_policy(policy)
    judge = _Judge(shape, whole_bits(dataset_bits))
    admitted: list[Candidate] = []
    discarded, advised = DiscardedList(), DiscardedList()
    for candidate in candidates:
        cut, advice = _judged(candidate, judge, policy, outside)
        if cut is not None:
            discarded.add(candidate, cut)
            continue
        admitted.append(candidate)
        if advice is not None:
            advised.add(candidate, advice)
    if discarded and not admitted:
        raise NothingAdmittedError(_nothing_message(discarded.verdicts()))
    return PruneResult(admitted=tuple(admitted), discarded=discarded, advised=advised)


def why_not(
    candidate: Candidate,
    shape: ModelShape,
    dataset_bits: Real,
    policy: str = "discard",
    outside: OutsideRule | None = None,
) -> Verdict | None:
    """Why a single candidate would be discarded by `prune`, or None; args as there."""
    judge = _Judge(shape, whole_bits(dataset_bits))
    return _judged(candidate, judge, _check_policy(policy), outside)[0]


def _judged(
    candidate: Candidate, judge: "_Judge", policy: Policy, outside: OutsideRule | None
) -> tuple[Verdict | None, Verdict | None]:
    """Why a candidate is discarded, and why it would be under the policy 'discard'."""
    cut, advice = judge.verdict(candidate), None
    if policy == "advisory" and cut is not None and cut.rule == CAPACITY:
        cut, advice = None, cut
    if cut is None and outside is not None:
        cut = outside(candidate)
    return cut, advice


class _Judge:
    """Verdicts, each worked out once for every (target, rank, dropout, variant) that occurs."""

    def __init__(self, shape: ModelShape, bits: int) -> None:
        self._shape = shape
        self._bits = bits
        self._sufficient: dict[tuple[str, ...], int] = {}
        self._verdicts: dict[tuple[tuple[str, ...], int, float, str], Verdict | None] = {}

    def verdict(self, candidate: Candidate) -> Verdict | None:
        """Why the candidate is cut, or None."""
        if candidate.full_finetune:
            return None
        key = (candidate.target, candidate.lora_rank, candidate.dropout, candidate.variant)
        try:
            return self._verdicts[key]
        except KeyError:
            verdict = self._verdicts[key] = self.work_out(*key)
            return verdict

    def work_out(
        self, target: tuple[str, ...], rank: int, dropout: float, variant: str
    ) -> Verdict | None:
        """The verdict for one point of the keys that are judged."""
        if _has_experts(self._shape, target):
            if dropout > 0:
                return _dropout_verdict(target, dropout)
            if not parts_of(variant) <= ON_EXPERTS:
                return _variant_verdict(target, variant)
        if target not in self._sufficient:
            self._sufficient[target] = sufficient_rank(self._shape, self._bits, target)
        if rank >= self._sufficient[target]:
            return None
        return _capacity_verdict(self._shape, target, rank, self._bits)


def _has_experts(shape: ModelShape, target: tuple[str, ...]) -> bool:
    return any(linear.component == "experts" for linear in shape.resolve_target(target))


def _dropout_verdict(target: tuple[str, ...], dropout: float) -> Verdict:
    return Verdict(
        rule=EXPERT_DROPOUT,
        reason=f"dropout {dropout:g} on {'+'.join(target)}: fused experts are parameters, on which "
        "PEFT allows no dropout; set dropout: 0",
        numbers={"dropout": dropout},
    )


def _variant_verdict(target: tuple[str, ...], variant: str) -> Verdict:
    return Verdict(
        rule=EXPERT_VARIANT,
        reason=f"variant {variant} on {'+'.join(target)}: fused experts are parameters, on which PEFT allows "
        f"no {' and no '.join(sorted(parts_of(variant) - ON_EXPERTS))}; set variant: lora, or leave experts "
        "out of target",
        numbers={},
    )


def _capacity_verdict(shape: ModelShape, target: tuple[str, ...], rank: int, bits: int) -> Verdict:
    check = check_capacity(shape, rank, bits, target)
    useful = shape.max_useful_lora_rank(target)
    return Verdict(
        rule=CAPACITY,
        reason=f"UNDERCAPACITY: rank {rank} on {'+'.join(target)} holds "
        f"{check.adapter_bits:,} bits ({check.adapter_params:,} params x 2) "
        f"< {bits:,} data bits; sufficient rank {check.sufficient_rank:,}, "
        f"largest useful {useful:,}",
        numbers={
            "lora_rank": rank,
            "adapter_params": check.adapter_params,
            "adapter_bits": check.adapter_bits,
            "dataset_bits": bits,
            "margin": check.margin,
            "sufficient_rank": check.sufficient_rank,
            "max_useful_lora_rank": useful,
        },
    )


def cut_rank_domain(
    space: SearchSpace,
    shape: ModelShape,
    dataset_bits: Real,
    policy: str = "discard",
    fits: FitRule | None = None,
) -> tuple[TargetDomain, ...]:
    """What is left of the ranks, dropouts and variants for each target, before a searcher samples.

    Args: as `prune`; under 'advisory' capacity cuts no rank. fits: which ranks have room on a target.

    Returns:
        One domain for each target of the space, in its order, inadmissible ones included.

    Raises:
        NothingAdmittedError: no target has a rank and a dropout left.
        ValueError: as `prune`.
    """
    advisory = _check_policy(policy) == "advisory"
    bits = whole_bits(dataset_bits)
    domains = tuple(
        _fitting(_cut_target(space, shape, bits, t, advisory), fits) for t in space.target.options
    )
    if not any(domain.admissible for domain in domains):
        # The grid of the cut keys alone holds every verdict, with its numbers.
        judge = _Judge(shape, bits)
        verdicts = (
            judge.work_out(target, rank, dropout, variant) or (fits and fits(rank, target))
            for target in space.target.options
            for rank in space.lora_rank.options
            for dropout in space.dropout.options
            for variant in space.variant.options
        )
        raise NothingAdmittedError(_nothing_message([verdict for verdict in verdicts if verdict]))
    return domains


def _cut_target(
    space: SearchSpace, shape: ModelShape, bits: int, target: tuple[str, ...], advisory: bool
) -> TargetDomain:
    needed = sufficient_rank(shape, bits, target)
    experts = _has_experts(shape, target)
    ranks = sorted(space.lora_rank.options)
    dropouts = space.dropout.options
    cut = {v for v in space.variant.options if experts and not parts_of(v) <= ON_EXPERTS}
    return TargetDomain(
        target=target,
        lora_ranks=tuple(rank for rank in ranks if advisory or rank >= needed),
        cut_lora_ranks=tuple(rank for rank in ranks if not advisory and rank < needed),
        dropouts=tuple(dropout for dropout in dropouts if not (experts and dropout)),
        cut_dropouts=tuple(dropout for dropout in dropouts if experts and dropout),
        sufficient_rank=needed,
        variants=tuple(variant for variant in space.variant.options if variant not in cut),
        cut_variants=tuple(variant for variant in space.variant.options if variant in cut),
    )


def _fitting(domain: TargetDomain, fits: FitRule | None) -> TargetDomain:
    """The domain without the ranks that have no room: all above the largest that has."""
    if fits is None:
        return domain
    unfit = {rank for rank in domain.lora_ranks if fits(rank, domain.target)}
    kept = tuple(rank for rank in domain.lora_ranks if rank not in unfit)
    return replace(domain, lora_ranks=kept, unfit_lora_ranks=tuple(sorted(unfit)))


def _check_policy(policy: str) -> Policy:
    if policy == "discard" or policy == "advisory":
        return policy
    raise ValueError(f"capacity_policy must be 'discard' or 'advisory', got {policy!r}")


def _nothing_message(discarded: Sequence[Verdict]) -> str:
    """The numbers of the candidate that came nearest, and what may be done."""
    by_capacity = [item for item in discarded if item.rule == CAPACITY]
    without_room = [item for item in discarded if item.rule == MEMORY]
    if without_room:  # they hold the data: what is missing is memory
        nearest = min(without_room, key=lambda item: item.numbers["needed_bytes"])
        return f"nothing admitted: no candidate fits in memory; the nearest: {nearest.reason}"
    # Those of another rule hold the data as well: what is in their way is named, not the capacity of the others.
    other = next((item for item in discarded if item.rule != CAPACITY), None)
    if other is not None:
        return f"nothing admitted: {other.reason}"
    best = max(by_capacity, key=lambda item: item.numbers["margin"])
    needed = int(best.numbers["sufficient_rank"])
    useful = int(best.numbers["max_useful_lora_rank"])
    raise_rank = f"set lora_rank: {needed}, or " if needed <= useful else ""
    return (
        f"nothing admitted: no rank of the space holds the data; the nearest: {best.reason}; "
        f"{raise_rank}use more layers or less data, or set capacity_policy: advisory (efficiency "
        "falls, it is not a hard floor)"
    )
