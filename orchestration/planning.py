"""A plan: everything a sweep will do, decided before anything runs. Imports neither torch nor ray."""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.inventory import Inventory
from cluster.placement import split_global_batch
from orchestration.choice_config import answer_length_of
from orchestration.config import MAX_CANDIDATES, CarriedFrom, SweepConfig, space_overrides
from orchestration.measured import Capacity, episode_capacity, make_capacity
from orchestration.memory_rule import MemoryRule
from orchestration.models import model_shape
from orchestration.rl_config import completion_length_of, generations_of
from search_spaces import pitfalls
from search_spaces.architecture import ModelShape
from search_spaces.candidate import Candidate, grid_candidates, grid_size, random_candidates
from search_spaces.domains import LogUniform, SearchSpace, TargetDomain
from search_spaces.pruner import FitRule, PruneResult, cut_rank_domain, prune
from search_spaces.space import DatasetFacts, build_space

if TYPE_CHECKING:
    from trainers.base_loss import BaseLoss
    from trainers.data import Audit, DataSpec

DEFAULT_SEQ_LEN = 1024
MAX_DEFAULT_NAME = 150
DATA_SUFFIX = r"(?i)\.(jsonl|ndjson|json|csv|tsv|parquet)(\.gz)?$"
EVALUATIONS_PER_TRIAL = 4
"""Evaluations of a trial by default; the grace period of a scheduler ends at the first of them, a quarter
of the budget."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one trial gets, in examples."""

    num_examples: int
    eval_every: int
    grace_period: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A resolved sweep. budget and audit are None where only dataset_tokens was given; domains is
    what capacity left of the ranks before a search draws, empty for a grid; num_proposed is how many
    candidates Optuna will propose while the sweep runs, 0 for another search; retention is what
    `retention_facts` gives; inventory is what candidates were judged by that memory cannot hold, None where
    nobody said where the sweep is to run."""

    name: str
    config: SweepConfig
    shape: ModelShape
    data_spec: "DataSpec | None"
    audit: "Audit | None"
    retention: dict[str, Any] | None
    dataset_tokens: int
    dataset_bits: int
    capacity: Capacity
    space: SearchSpace
    pruned: PruneResult
    domains: tuple[TargetDomain, ...]
    num_proposed: int
    pitfalls: tuple[pitfalls.Pitfall, ...]
    budget: Budget | None
    inventory: Inventory | None


def make_plan(
    config: SweepConfig,
    known: "BaseLoss | None" = None,
    inventory: Inventory | None = None,
) -> Plan:
    """Resolves a config: shape, dataset bits, space, every candidate judged, pitfalls.

    Args:
        known: the base's loss as an earlier plan of the same sweep measured it.
        inventory: where it is to run: what cannot fit there is discarded. None: nobody has said.
    Raises:
        ValueError: what cannot be planned, in one line; NothingAdmittedError where no candidate can
            hold the data.
    """
    shape = model_shape(config.model, config.revision)
    data_spec = make_data_spec(config, shape) if config.data else None
    audit = audit_of(data_spec) if data_spec else None
    tokens = capacity_tokens(audit) if audit else config.dataset_tokens or 0
    budget = make_budget(config, audit) if audit else None
    facts, capacity = _facts(config, data_spec, audit, known)
    _require_context(config, shape, audit)
    space = make_space(config, shape, facts)
    memory = _memory_rule(config, shape, space, data_spec, audit, inventory)
    domains = rank_domains(space, config, shape, facts.bits, memory.by_rank if memory else None)
    proposed = candidates(space, config, domains)
    pruned = prune(
        proposed,
        shape,
        facts.bits,
        policy=config.capacity_policy,
        outside=memory.by_candidate if memory else None,
    )
    if config.workers_per_trial != "auto":
        for batch_size in batch_sizes(space, config, pruned):
            split_global_batch(batch_size, config.workers_per_trial, 1)
    found = pitfalls.find(
        shape=shape,
        space=space,
        method=config.method,
        num_examples=facts.num_examples,
        dataset_bits=facts.bits,
    )
    return Plan(
        name=run_name(config),
        config=config,
        shape=shape,
        data_spec=data_spec,
        audit=audit,
        retention=_retention(data_spec),
        dataset_tokens=tokens,
        dataset_bits=facts.bits,
        capacity=capacity,
        space=space,
        pruned=pruned,
        domains=domains or (),
        num_proposed=num_proposed(space, config, domains or ()),
        pitfalls=tuple(found),
        budget=budget,
        inventory=inventory,
    )


def _facts(
    config: SweepConfig,
    data_spec: "DataSpec | None",
    audit: "Audit | None",
    known: "BaseLoss | None",
) -> tuple[DatasetFacts, Capacity]:
    """What an adapter must hold: the data's tokens, or a trial's episodes."""
    if config.method == "rl":
        prompts = make_budget(config, audit).num_examples if audit else config.examples or 0
        facts = DatasetFacts.from_episodes(prompts, generations_of(config))
        return facts, episode_capacity(facts)
    tokens = capacity_tokens(audit) if audit else config.dataset_tokens or 0
    capacity = make_capacity(config, data_spec, tokens, known)
    assert capacity.bits_per_token is not None
    rows = epoch_examples(config, audit) if audit else None
    return DatasetFacts.from_tokens(tokens, capacity.bits_per_token, rows), capacity


def _require_context(config: SweepConfig, shape: ModelShape, audit: "Audit | None") -> None:
    """Raises:
    ValueError: an episode or an answer could be longer than the model's context.
    """
    length = completion_length_of(config) or answer_length_of(config)
    context = shape.max_position_embeddings
    longest = audit.max_row_tokens if audit else 0
    if length and context is not None and longest + length > context:
        raise ValueError(
            f"max_completion_length must leave room for the longest row ({longest} tokens) in the model's context "
            f"({context}), got {length}; lower it or seq_len"
        )


def _memory_rule(
    config: SweepConfig,
    shape: ModelShape,
    space: SearchSpace,
    data_spec: "DataSpec | None",
    audit: "Audit | None",
    inventory: Inventory | None,
) -> MemoryRule | None:
    if inventory is None:
        return None
    row = row_tokens(config, shape, data_spec, audit)
    return MemoryRule(config, shape, space, row, inventory)


def row_tokens(
    config: SweepConfig, shape: ModelShape, data_spec: "DataSpec | None", audit: "Audit | None"
) -> int:
    """Tokens of the longest row that a forward may meet; of an episode at most, as its prompt's row holds an
    answer beside."""
    longest = data_spec.seq_len if data_spec else seq_len_of(config, shape)
    if audit is not None and not config.packing:
        longest = min(audit.max_row_tokens, longest)
    return longest + completion_length_of(config)


def make_space(config: SweepConfig, shape: ModelShape, facts: DatasetFacts) -> SearchSpace:
    """The search space of a config.

    Raises:
        ValueError: as `build_space`, or a run that lr_prior cannot be carried from.
    """
    prior = config.lr_prior
    if isinstance(prior, CarriedFrom):
        from orchestration.carried import prior_from  # the fits of the studies: few plans need them

        prior = prior_from(prior, config, shape, facts)
    return build_space(
        shape,
        config.method,
        facts,
        space_overrides(config),
        lr_prior=prior,
        full_ft_learning_rate=config.full_ft_learning_rate,
        size_class=config.size_class,
    )


def make_data_spec(config: SweepConfig, shape: ModelShape) -> "DataSpec":
    """The data half of a config. seq_len defaults to the model's context, at most 1024."""
    # A plan from a token count reads no data.
    from trainers.data.spec import DataSpec
    from trainers.data.tokenizer import tokenizer_folder

    seq_len = seq_len_of(config, shape)
    assert config.data is not None
    return DataSpec(
        data=config.data,
        model=str(tokenizer_folder(config.model, config.revision)),
        columns=config.columns,
        format=config.format,
        seq_len=seq_len,
        truncation=config.truncation,
        eval=config.eval,
        chat_template=config.chat_template,
        data_revision=config.data_revision,
        bad_rows=config.bad_rows,
        system_role=config.system_role,
        packing=config.packing,
        retention=config.retention,
    )


def seq_len_of(config: SweepConfig, shape: ModelShape) -> int:
    """The longest row in tokens: what the user gave, else the model's context, at most 1024.

    Raises:
        ValueError: more than the model's context.
    """
    context = shape.max_position_embeddings
    seq_len = config.seq_len or min(context or DEFAULT_SEQ_LEN, DEFAULT_SEQ_LEN)
    if context is not None and seq_len > context:
        raise ValueError(
            f"seq_len must be at most the model's context ({context} tokens), got {seq_len}"
        )
    return seq_len


def audit_of(spec: "DataSpec") -> "Audit":
    """The data's audit, from the cache where the data was counted before."""
    from trainers.data import cached_audit, prepare_data

    return cached_audit(spec) or prepare_data(spec).audit


def _retention(spec: "DataSpec | None") -> dict[str, Any] | None:
    if spec is None or spec.retention is None:
        return None
    from trainers.data.retention import retention_facts

    return retention_facts(spec)


def capacity_tokens(audit: "Audit") -> int:
    """Loss-bearing training tokens that an adapter must hold: what is seen again brings no new bits."""
    return audit.num_new_loss_tokens


def epoch_examples(config: SweepConfig, audit: "Audit") -> int:
    """Examples of an epoch, as budgets and batches count them: rows, or the sequences they are packed
    into."""
    return audit.num_train_sequences if config.packing else audit.num_train_rows


def rank_domains(
    space: SearchSpace,
    config: SweepConfig,
    shape: ModelShape,
    bits: int,
    fits: FitRule | None = None,
) -> tuple[TargetDomain, ...] | None:
    """What capacity and memory leave of the ranks for a search that draws, so that no draw is wasted; None for
    a grid, whose every candidate is judged."""
    if config.search == "grid":
        return None
    return cut_rank_domain(space, shape, bits, config.capacity_policy, fits)


def candidates(
    space: SearchSpace, config: SweepConfig, domains: tuple[TargetDomain, ...] | None
) -> Iterator[Candidate]:
    """The candidates that are known before the sweep, in the order in which they would start.

    Raises:
        ValueError: a grid of more than can be judged.
    """
    if config.search == "optuna":
        return iter(())
    if config.search == "random":
        return random_candidates(space, config.num_candidates or 0, config.seed, domains)
    size = grid_size(space)
    if config.num_candidates is None and size > MAX_CANDIDATES:
        raise ValueError(
            f"a grid must have at most {MAX_CANDIDATES:,} candidates, has {size:,}; give fewer values, or set "
            "num_candidates"
        )
    return islice(grid_candidates(space), config.num_candidates)


def batch_sizes(space: SearchSpace, config: SweepConfig, pruned: PruneResult) -> set[int]:
    """Every global batch size that a trial of the sweep may have."""
    if config.search == "optuna":
        return set(space.global_batch_size.options)
    return {candidate.global_batch_size for candidate in pruned.admitted}


def num_proposed(space: SearchSpace, config: SweepConfig, domains: tuple[TargetDomain, ...]) -> int:
    """Candidates that Optuna will propose: num_candidates, or all that a smaller space holds."""
    if config.search != "optuna":
        return 0
    axes: list[Any] = [space.learning_rate, space.lora_alpha, space.global_batch_size]
    axes += [space.lr_schedule, space.warmup, space.weight_decay, space.max_grad_norm, space.seed]
    if any(isinstance(axis, LogUniform) and axis.low < axis.high for axis in axes):
        return config.num_candidates or 0
    num_points = sum(
        len(item.lora_ranks) * len(item.dropouts) * len(item.variants) for item in domains
    )
    num_points *= math.prod(len(axis.values()) for axis in axes)
    return min(config.num_candidates or 0, num_points)


def make_budget(config: SweepConfig, audit: "Audit") -> Budget:
    """Examples of a trial, of its evaluations and of its grace period.

    Raises:
        ValueError: a grace period beyond the budget.
    """
    num_examples = config.examples or math.ceil(
        Fraction(str(config.epochs or 1)) * epoch_examples(config, audit)  # 1.1 as it was written
    )
    quarter = math.ceil(num_examples / EVALUATIONS_PER_TRIAL)
    eval_every = min(config.eval_every or quarter, num_examples)
    # Not shorter where evaluations are: early stoppers favour high learning rates, as B starts at 0.
    grace_period = config.grace_period or max(quarter, eval_every)
    if grace_period > num_examples:
        raise ValueError(
            f"grace_period must be at most the budget of a trial ({num_examples} examples), got {grace_period}"
        )
    return Budget(num_examples=num_examples, eval_every=eval_every, grace_period=grace_period)


def run_name(config: SweepConfig) -> str:
    """The folder name that the config gives, else one made from model and data."""
    return config.name or default_name(config)


def default_name(config: SweepConfig) -> str:
    """A folder name from model and data."""
    # Not Path.stem: the .1-8B of Llama-3.1-8B is no suffix.
    path = Path(config.model)
    model = (path.parent if path.name == "config.json" else path).name.removesuffix(".json")
    first, *others = (
        [config.data] if isinstance(config.data, str) else list(config.data or ["plan"])
    )
    parts = [model, re.sub(DATA_SUFFIX, "", Path(first).name)]
    parts += [f"and-{len(others)}-more"] if others else []
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-.")
    if name and len(name) <= MAX_DEFAULT_NAME:
        return name
    # Names without a letter of ours (模型 and 数据.jsonl) would be runs/ itself, and two long ones equal.
    digest = hashlib.sha256("-".join(parts).encode()).hexdigest()[:8]
    return f"{name[:MAX_DEFAULT_NAME] or 'sweep'}-{digest}"
