"""What a study of learning-rate curves found: the arms, and what its kind concludes from them."""

from collections.abc import Callable, Sequence
from typing import Any

from orchestration.planning import Plan
from orchestration.results import TrialRecord
from orchestration.rl_config import rl_spec
from orchestration.studies import batch, layers, lr_ratio, rank, rl
from orchestration.studies.arms import Arm
from orchestration.studies.comparison import Comparison
from orchestration.studies.config import StudyConfig
from orchestration.studies.frame import StudyFacts, frame
from orchestration.studies.results import arm_dict, plan_facts
from search_spaces import doctrine

Conclusion = Callable[[Comparison], dict[str, Any]]
KINDS: dict[str, Conclusion] = {
    "lr-ratio": lr_ratio.conclusion,
    "rank": rank.conclusion,
    "layers": layers.conclusion,
    "batch": batch.conclusion,
    "rl": rl.conclusion,
}


def findings(
    facts: StudyFacts,
    config: StudyConfig,
    plan: Plan,
    arms: Sequence[Arm],
    records: Sequence[TrialRecord],
    *,
    complete: bool,
) -> dict[str, Any]:
    """results.json of a study on one set of data.

    Args:
        complete: whether every arm has all its points.
    """
    model, data = plan_facts(plan)
    name = config.name or f"{facts.kind}-{facts.preset or 'study'}"
    compared = Comparison(facts.kind, config, plan, tuple(arms), tuple(records))
    parts = KINDS[facts.kind](compared)
    shared = {
        "arms": [arm_dict(arm, compared) for arm in arms],
        "objective": compared.score.key,
        "protocol": protocol(config, plan),
        "limits": limits(config, plan) + parts.pop("limits", []),
    }
    return frame(facts, name, complete=complete, model=model, data=data) | shared | parts


def protocol(config: StudyConfig, plan: Plan) -> list[list[str]]:
    """How every point was trained."""
    assert plan.budget is not None
    assert plan.audit is not None
    seeds, is_rl = ", ".join(map(str, config.seed_list)), config.method == "rl"
    unit, noun = ("prompts", "reward") if is_rl else ("examples", "loss")
    return [
        [
            "budget",
            f"{plan.budget.num_examples:,} {unit} for every run; the {noun} at its end counts",
        ],
        *(_episodes(config) if is_rl else []),
        [
            "optimizer",
            f"AdamW, betas 0.9 and 0.999, weight decay {config.weight_decay}, gradient norm clipped at "
            f"{config.max_grad_norm}, {config.lr_schedule} learning rate, warm-up {config.warmup}",
        ],
        ["numbers", f"weights and optimizer in {config.dtype}, base {config.quantization}"],
        ["LoRA", "A uniform at 1/sqrt(d_in), B zero, scale alpha/rank, one learning rate for both"],
        [
            "seeds",
            f"{seeds}; a seed is a data order (the same in all arms), the start of A"
            f"{' and what is sampled' * is_rl}. The first runs the "
            f"whole grid, the others what lies within {config.seed_window_decades} decades of its best",
        ],
        [
            "grids",
            "steps of 10^0.25; they grow at an edge, and beside a diverged run they are refined",
        ],
        ["early stopping", "none: it would favour high learning rates"],
        [
            "held out",
            f"{plan.audit.num_eval_rows} rows, by content hash; "
            + ("one completion each" if is_rl else "loss in nats per loss-bearing token"),
        ],
    ]


def _episodes(config: StudyConfig) -> list[list[str]]:
    """How episodes were made and what they earned."""
    spec = rl_spec(config)
    assert spec is not None
    rewards = ", ".join(f"{weight:g} x {name}" for name, weight in spec.reward.items())
    made = (
        f"{spec.num_generations} completions a prompt, at most {spec.max_completion_length} tokens, temperature "
        f"{spec.temperature:g}"
    )
    objective = "importance-sampled policy gradient, advantages less the mean of their prompt, no clip, no KL penalty"
    return [["reward", rewards], ["episodes", made], ["objective", objective]]


def limits(config: StudyConfig, plan: Plan) -> list[str]:
    """What a reader must not conclude."""
    assert plan.budget is not None
    shape = plan.shape
    found = [
        f"One base ({shape.num_params / 1e6:,.1f}M parameters, hidden {shape.hidden_size}) and one data set: "
        "other widths, data and budgets can differ."
    ]
    least_steps, least_seeds = doctrine.STUDY_LEAST.value
    steps = -(-plan.budget.num_examples // max(plan.space.global_batch_size.options))
    if steps < least_steps:
        where = "in supervised fine-tuning " if config.method == "rl" else ""
        found.append(
            f"Runs of {steps} steps: below {least_steps} the ratio is {where}biased upwards (about "
            f"{doctrine.LR_RATIO_SHORT.value:g} under {doctrine.SHORT_RUN_STEPS.value} steps)."
        )
    if len(config.seed_list) < least_seeds:
        found.append(
            f"{len(config.seed_list)} seed(s): {least_seeds} are the least for an interval one can use."
        )
    if plan.audit and plan.budget.num_examples > plan.audit.num_train_rows:
        what = "reward" if config.method == "rl" else "loss"
        found.append(f"The budget is more than one epoch: part of the {what} is overfitting.")
    return found
