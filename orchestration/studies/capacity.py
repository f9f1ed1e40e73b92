"""capacity: random facts of known bits in growing numbers, adapters that learn them, and their bits."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from orchestration.results import TrialRecord
from search_spaces import doctrine
from search_spaces.architecture import ModelShape
from search_spaces.candidate import Candidate
from search_spaces.studies.stored_bits import check_unseen, stored_bits
from trainers.data.facts import FactSpec

if TYPE_CHECKING:
    from trainers.data.audit import Audit

CONTROL_FACTS = 64
"""Facts with trained keys and other values: nobody can know them, so whoever does has a leak."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A capacity study: facts in growing numbers, each number learnt by adapters of each rank.

    Args:
        loads: known bits of the facts, as multiples of what an adapter is said to hold (2 bits for
            each of its parameters).
        learning_rates: all are run; at each load the one that stores most counts.
        exposures: how often each fact is seen.
        num_symbols, alphabet_size, num_key_words, facts_seed: see `trainers.data.facts.FactSpec`.
        num_evaluations: of a trial, after the untouched base's.
    """

    loads: tuple[float, ...]
    lora_ranks: tuple[int, ...]
    target: tuple[str, ...]
    learning_rates: tuple[float, ...]
    exposures: int
    global_batch_size: int
    seeds: tuple[int, ...] = (0,)
    lora_alpha: float = doctrine.ALPHA.value
    lr_schedule: str = "cosine"
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    num_symbols: int = 8
    alphabet_size: int = 512
    num_key_words: int = 2
    facts_seed: int = 0
    num_evaluations: int = 4

    def fact_sets(self, shape: ModelShape) -> "tuple[FactSet, ...]":
        """The sets of facts with what is trained on each, from the smallest on. Ranks share a set where
        their loads come to the same number of facts (ranks 1 and 2, loads in powers of 2)."""
        ranks: dict[int, list[int]] = {}
        for load, rank in product(self.loads, self.lora_ranks):
            ranks.setdefault(
                self._num_facts(load, shape.lora_params(rank, self.target)), []
            ).append(rank)
        target = shape.normalize_target(self.target)
        return tuple(self._fact_set(num, ranks[num], target) for num in sorted(ranks))

    def _num_facts(self, load: float, adapter_params: int) -> int:
        fact = self.facts(1)
        return max(
            1, round(load * doctrine.BITS_PER_PARAM.value * adapter_params / fact.known_bits)
        )

    def facts(self, num_facts: int) -> FactSpec:
        """So many of the facts."""
        return FactSpec(
            num_facts=num_facts,
            num_symbols=self.num_symbols,
            alphabet_size=self.alphabet_size,
            num_key_words=self.num_key_words,
            seed=self.facts_seed,
        )

    def _fact_set(self, num_facts: int, ranks: Iterable[int], target: tuple[str, ...]) -> "FactSet":
        axes = product(sorted(ranks), self.learning_rates, self.seeds)
        num_examples = num_facts * self.exposures
        return FactSet(
            facts=self.facts(num_facts),
            num_examples=num_examples,
            eval_every=math.ceil(num_examples / self.num_evaluations),
            candidates=tuple(self._candidate(target, *point) for point in axes),
        )

    def _candidate(self, target: tuple[str, ...], rank: int, rate: float, seed: int) -> Candidate:
        return Candidate(
            learning_rate=rate,
            lora_rank=rank,
            lora_alpha=self.lora_alpha,
            global_batch_size=self.global_batch_size,
            target=target,
            lr_schedule=self.lr_schedule,
            warmup=self.warmup,
            weight_decay=0.0,
            max_grad_norm=self.max_grad_norm,
            dropout=0.0,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class FactSet:
    """One number of facts, and the adapters that learn them.

    Args:
        facts: trained, and evaluated: the same file is `data` and `eval`.
        num_examples, eval_every: of each trial.
        candidates: the trials.
    """

    facts: FactSpec
    num_examples: int
    eval_every: int
    candidates: tuple[Candidate, ...]

    @property
    def control(self) -> FactSpec:
        """Facts that are never shown, as the data's `retention`: the first keys, with other values."""
        num_facts = min(CONTROL_FACTS, self.facts.num_facts)
        return replace(self.facts, num_facts=num_facts, values_seed=self.facts.seed + 1)


def check_prepared(facts: FactSpec, audit: "Audit") -> None:
    """Refuses data of which the data half left something out, or counts other tokens than the bits do.

    Raises:
        ValueError: rows or loss-bearing tokens that are not those of the facts.
    """
    expected = {
        "num_train_rows": facts.num_facts,
        "num_eval_rows": facts.num_facts,
        "num_train_loss_tokens": facts.num_loss_tokens,
        "num_eval_loss_tokens": facts.num_loss_tokens,
        "num_duplicates": 0,
    }
    for name, number in expected.items():
        if getattr(audit, name) != number:
            raise ValueError(
                f"{facts.num_facts} facts must have {name} {number}, have {getattr(audit, name)}; "
                "this tokenizer or seq_len cannot hold them"
            )


@dataclass(frozen=True, kw_only=True)
class FactTrial:
    """What one adapter stored of one set of facts.

    Attributes:
        before, stored, control: bits stored of the facts by the untouched base and by the trained
            adapter, and by it of facts that were never shown; None where there is no such number.
    """

    name: str
    status: str
    reason: str
    num_facts: int
    known_bits: float
    exposures: float
    lora_rank: int
    adapter_params: int
    learning_rate: float
    seed: int
    before: float | None
    stored: float | None
    control: float | None

    @property
    def load(self) -> float:
        """Known bits for each adapter parameter."""
        return self.known_bits / self.adapter_params


def fact_trial(record: TrialRecord, fact_set: FactSet, shape: ModelShape) -> FactTrial:
    """A trial's stored bits, from its last evaluation.

    Raises:
        ValueError: more bits than there are, or bits of facts that were never shown.
    """
    candidate, facts = Candidate.from_dict(record.candidate), fact_set.facts
    last = record.rows[-1] if record.status == "finished" else {}
    before = _bits(facts, record.base_loss)
    control = _bits(fact_set.control, last.get("retention_loss"))
    for bits, whose in ((before, "the untouched base"), (control, record.name)):
        if bits is not None:
            check_unseen(bits, whose)
    return FactTrial(
        name=record.name,
        status=record.status,
        reason=record.reason,
        num_facts=facts.num_facts,
        known_bits=facts.known_bits,
        exposures=fact_set.num_examples / facts.num_facts,
        lora_rank=candidate.lora_rank,
        adapter_params=shape.lora_params(candidate.lora_rank, candidate.target),
        learning_rate=candidate.learning_rate,
        seed=candidate.seed,
        before=before,
        stored=_bits(facts, last.get("eval_loss")),
        control=control,
    )


def _bits(facts: FactSpec, loss: float | None) -> float | None:
    return None if loss is None else stored_bits(facts.known_bits, loss, facts.num_loss_tokens)


LAPTOP = Recipe(
    loads=(0.25, 0.5, 1.0, 2.0),
    lora_ranks=(1, 2),
    target=("mlp", "unembed"),
    learning_rates=(5.62e-4, 1e-3, 1.78e-3),
    exposures=100,
    global_batch_size=8,
)
"""13M tokens of training on the shipped base, 5,000 a second on a core of an EPYC. Single runs there, rank 1:
a larger batch stores less at equal exposures (MLP, 64 facts: 0.17 bits/parameter at batch 32, 0.26 at 16,
0.30 at 8); the best learning rate tried falls as the facts grow (3.2e-3 for 81 of them, 1e-3 for 651)."""
SMOKE = Recipe(
    loads=(0.0625, 0.125),
    lora_ranks=(1,),
    target=("mlp", "unembed"),
    learning_rates=(3.2e-3,),
    exposures=20,
    global_batch_size=8,
)
"""The shape of the output: 20 exposures store next to nothing."""
