"""A plan: everything a sweep will do, decided before anything runs. Imports neither torch nor ray."""

import math
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from cluster.inventory import Inventory, TrialDemand, max_concurrent_trials
from cluster.placement import split_global_batch
from orchestration.config import ConfigError, SweepConfig, space_overrides
from orchestration.models import model_folder, model_shape
from search_spaces import pitfalls
from search_spaces.architecture import ModelShape
from search_spaces.pruner import PruneResult, prune
from search_spaces.space import SearchSpace, build_space, grid_candidates, random_candidates, trial_name
from trainers.data import Audit, DataSpec, audit_data

DEFAULT_SEQ_LEN = 1024
DEFAULT_MICRO_BATCH_SIZE = 8
EVALUATIONS_PER_TRIAL = 4
"""Default number of evaluations, and of rungs ASHA can stop at; the grace period is the first."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one trial gets, in examples; None where no data was given."""

    num_examples: int
    eval_every: int
    grace_period: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A resolved sweep."""

    name: str
    config: SweepConfig
    shape: ModelShape
    data_spec: DataSpec | None
    audit: Audit | None
    dataset_tokens: int
    dataset_bits: int
    space: SearchSpace
    pruned: PruneResult
    pitfalls: tuple[pitfalls.Pitfall, ...]
    budget: Budget | None


def make_plan(config: SweepConfig) -> Plan:
    """Resolves a config: shape, dataset bits, space, every candidate judged.

    Raises:
        ValueError: (one line) what cannot be planned; NothingAdmittedError when no candidate can
            hold the data.
    """
    shape = model_shape(config.model, config.revision)
    data_spec = make_data_spec(config, shape) if config.data else None
    audit = audit_data(data_spec) if data_spec and config.dataset_tokens is None else None
    tokens = audit.train_loss_tokens if audit else config.dataset_tokens or 0
    bits = dataset_bits(tokens, config)
    space = build_space(shape, method=config.method, dataset_bits=bits, overrides=space_overrides(config), **_priors(config))
    pruned = prune(candidates(space, config), shape, bits, policy=config.capacity_policy)
    budget = make_budget(config, audit) if audit else None
    found = pitfalls.find(
        space,
        shape,
        method=config.method,
        dataset_bits=bits,
        num_examples=budget.num_examples if budget else None,
    )
    return Plan(
        name=config.name or default_name(config),
        config=config,
        shape=shape,
        data_spec=data_spec,
        audit=audit,
        dataset_tokens=tokens,
        dataset_bits=bits,
        space=space,
        pruned=pruned,
        pitfalls=tuple(found),
        budget=budget,
    )
