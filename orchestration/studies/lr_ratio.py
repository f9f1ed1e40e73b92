"""lr-ratio: the best LoRA learning rate over full fine-tuning's, against 10 and against its rivals."""

from typing import Any

from orchestration.objective import Objective
from orchestration.studies.arms import Arm
from orchestration.studies.comparison import Comparison
from orchestration.studies.figures import figure, series
from search_spaces import doctrine
from search_spaces.priors import learning_rate_prior
from search_spaces.studies.ratio import Gap, Ratio, loss_gap, lr_ratio
from search_spaces.studies.regret import prior_regrets
from search_spaces.studies.verdict import Claim, Verdict, judge, verdict

MAIN = f"{doctrine.LR_RATIO.value:g} x FullFT"
SHORT = f"{doctrine.LR_RATIO_SHORT.value:g} x (short runs)"
RIVAL = "hidden / (2 alpha)"


def conclusion(compared: Comparison) -> dict[str, Any]:
    """Verdict, claims and tables."""
    judged = [_judged(compared, arm) for arm in compared.lora_arms]
    return {
        "verdict": _overall(compared, judged),
        "claims": [claim for one in judged for claim in one["claims"]],
        "tables": [_ratio_table(compared, judged), _regret_table(compared)],
        "figures": [_ratio_figure(compared, judged)],
    }


def predictions(compared: Comparison, arm: Arm) -> dict[str, float]:
    """What each law says of an arm's ratio."""
    hidden = compared.plan.shape.hidden_size
    laws = {
        MAIN: doctrine.LR_RATIO.value,
        RIVAL: doctrine.rival_lr_ratio(hidden, arm.template.lora_alpha),
    }
    # What was seen of short runs was seen in supervised fine-tuning.
    return laws if compared.config.method == "rl" else laws | {SHORT: doctrine.LR_RATIO_SHORT.value}


def _judged(compared: Comparison, arm: Arm) -> dict[str, Any]:
    full, own = compared.points(compared.full_of(arm)), compared.points(arm)
    ratio, gap = lr_ratio(full, own), loss_gap(full, own)
    said = judge(ratio, predictions(compared, arm))
    return {
        "arm": arm,
        "ratio": ratio,
        "gap": gap,
        "verdict": verdict(said, ratio, MAIN, steps=_steps(compared, arm)),
        "claims": [_claim_dict(claim, ratio, arm) for claim in said],
    }


def _steps(compared: Comparison, arm: Arm) -> int:
    """Optimizer steps of a run."""
    assert compared.plan.budget is not None
    return -(-compared.plan.budget.num_examples // arm.template.global_batch_size)


def _claim_dict(claim: Claim, ratio: Any, arm: Arm) -> dict[str, Any]:
    measured = isinstance(ratio, Ratio)
    return {
        "name": claim.name,
        "arm": arm.label,
        "predicted": claim.predicted,
        "measured": ratio.estimate if measured else None,
        "low": ratio.low if measured else None,
        "high": ratio.high if measured else None,
        "status": claim.status,
        "sentence": claim.sentence,
    }


def _overall(compared: Comparison, judged: list[dict[str, Any]]) -> dict[str, Any]:
    """The claim is about every rank and size at the doctrine's alpha: one arm that contradicts it,
    contradicts it. Other alphas are there to tell the laws apart."""
    order = ("contradicted", "undecided", "supported")
    alpha = doctrine.ALPHA.value
    bound = [one for one in judged if one["arm"].template.lora_alpha == alpha] or judged
    worst = min(bound, key=lambda one: order.index(one["verdict"].status))
    said: Verdict = worst["verdict"]
    shape = compared.plan.shape
    where = f"At hidden {shape.hidden_size} ({shape.num_params / 1e6:,.1f}M parameters)"
    sentences = [f"{one['arm'].label}: {one['verdict'].sentence}" for one in judged]
    return {
        "status": said.status,
        "sentence": f"{where}: {' '.join(sentences)}",
        "would_decide": said.would_decide,
    }


def _ratio_table(compared: Comparison, judged: list[dict[str, Any]]) -> dict[str, Any]:
    score = compared.score
    headers = [["arm", False], ["LR ratio", True], ["95% interval", True]]
    headers += [
        [f"best {score.noun} over FullFT's ({score.unit})", True],
        ["95% interval", True],
        ["10x", False],
    ]
    rows = []
    for one in judged:
        cells = [one["arm"].label, *_interval(one["ratio"], Ratio, ".3g")]
        gap = _as_scored(one["gap"], score)
        rows.append([*cells, *_interval(gap, Gap, "+.4f"), one["verdict"].status])
    return {
        "title": "LoRA against full fine-tuning",
        "note": f"Equality of the best {score.noun} is another claim than the ratio. An interval of the ratio is "
        "made from pairs of runs with one data order.",
        "headers": headers,
        "rows": rows,
    }


def _as_scored(gap: Any, score: Objective) -> Any:
    """A gap of losses as one of what the arms are judged by."""
    if not isinstance(gap, Gap):
        return gap
    low, high = sorted((score.of(gap.low), score.of(gap.high)))
    return Gap(estimate=score.of(gap.estimate), low=low, high=high)


def _interval(found: Any, kind: type, form: str) -> list[str]:
    if not isinstance(found, kind):
        return [f"none: {found.reason}", ""]
    value: Any = found
    return [f"{value.estimate:{form}}", f"{value.low:{form}} to {value.high:{form}}"]


def _regret_table(compared: Comparison) -> dict[str, Any]:
    """What a sweep that trusted a prior would have lost."""
    rows = []
    for arm in compared.arms:
        for name, found in prior_regrets(compared.points(arm), _priors(compared, arm)).items():
            share = "" if found.regret_frac is None else f"{found.regret_frac:.2%}"
            rows.append([arm.label, name, f"{found.learning_rate:.2e}", share, found.note or ""])
    return {
        "title": "Regret of the priors",
        "note": f"How much worse the {compared.score.noun} is at the prior's learning rate than the best, on this "
        "model and data; read between measured points, outside them nothing is said.",
        "headers": [
            ["arm", False],
            ["prior", False],
            ["learning_rate", True],
            ["regret", True],
            ["", False],
        ],
        "rows": rows,
    }


def _priors(compared: Comparison, arm: Arm) -> dict[str, float]:
    shape, method = compared.plan.shape, compared.config.method
    names = ["doctrine"]
    families = doctrine.TINKER_EXPONENTS.value if method == "sft" else ()  # a law of its losses
    if any(shape.model_type.startswith(family) for family in families):
        names.append("tinker")
    found = {}
    for name in names:
        prior = learning_rate_prior(
            name, hidden_size=shape.hidden_size, model_type=shape.model_type, method=method
        )
        found[name] = prior.full_ft if arm.full_finetune else prior.lora
    return found


def _ratio_figure(compared: Comparison, judged: list[dict[str, Any]]) -> dict[str, Any]:
    """Measured ratios beside what the laws say of each arm."""
    arms = [one["arm"] for one in judged]
    at = [k for k, one in enumerate(judged) if isinstance(one["ratio"], Ratio)]
    ratios = [judged[k]["ratio"] for k in at]
    measured = series(
        "measured",
        at,
        [ratio.estimate for ratio in ratios],
        low=[ratio.low for ratio in ratios],
        high=[ratio.high for ratio in ratios],
        mode="markers",
    )
    laws = [
        series(
            name,
            range(len(arms)),
            [predictions(compared, arm)[name] for arm in arms],
            mode="markers",
        )
        for name in predictions(compared, arms[0])
    ]
    return figure(
        "Ratio of the best learning rates",
        "",
        "LR_LoRA / LR_FullFT",
        [measured, *laws],
        y_log=True,
        x_labels=[arm.label for arm in arms],
    )
