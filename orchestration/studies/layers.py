"""layers: attention, MLP, both, and both with the unembedding, at equal parameters."""

from typing import Any

from orchestration.studies.arms import Arm
from orchestration.studies.comparison import Comparison
from orchestration.studies.figures import figure, series
from search_spaces.studies.optimum import ArmOptimum
from search_spaces.studies.points import Unsettled
from search_spaces.studies.ratio import Gap, loss_gap


def conclusion(compared: Comparison) -> dict[str, Any]:
    """Verdict on "attention alone is clearly worse", table and picture."""
    arms = {arm.template.target: arm for arm in compared.lora_arms}
    attn, mlp = arms[("attn",)], arms[("mlp",)]
    whole = compared.lora_arms[-1]
    claims = [
        _claim(compared, attn, mlp, "attention alone is worse than MLP"),
        _claim(compared, attn, whole, "attention alone is worse than all layers"),
        _claim(compared, arms[("attn", "mlp")], whole, "leaving the unembedding out is worse"),
    ]
    main = claims[0]
    return {
        "verdict": {
            "status": main["status"],
            "sentence": " ".join(claim["sentence"] for claim in claims),
            "would_decide": None
            if main["status"] != "undecided"
            else "more seeds, or a longer budget",
        },
        "claims": claims,
        "tables": [_table(compared)],
        "figures": [_picture(compared)],
        "limits": ["Equal parameters as nearly as whole ranks allow; the counts are in the table."],
    }


def _claim(compared: Comparison, without: Arm, with_: Arm, name: str) -> dict[str, Any]:
    """Whether the first arm's best loss lies above the second's."""
    gap = loss_gap(compared.points(with_), compared.points(without))
    measured = isinstance(gap, Gap)
    return {
        "name": name,
        "arm": without.label,
        "predicted": 0.0,
        "measured": gap.estimate if measured else None,
        "low": gap.low if measured else None,
        "high": gap.high if measured else None,
        "status": _status(gap),
        "sentence": _sentence(gap, without, with_),
    }


def _status(gap: Gap | Unsettled) -> str:
    if isinstance(gap, Unsettled) or gap.low <= 0 <= gap.high:
        return "undecided"
    return "supported" if gap.low > 0 else "contradicted"


def _sentence(gap: Gap | Unsettled, without: Arm, with_: Arm) -> str:
    names = f"{'+'.join(without.template.target)} against {'+'.join(with_.template.target)}"
    if isinstance(gap, Unsettled):
        return f"{names}: not known ({gap.reason})."
    return f"{names}: {gap.estimate:+.4f} nats/token ({gap.low:+.4f} to {gap.high:+.4f})."


def _table(compared: Comparison) -> dict[str, Any]:
    rows = []
    for arm in compared.lora_arms:
        best = compared.optimum(arm)
        loss = f"{best.loss:.4f}" if isinstance(best, ArmOptimum) else f"none: {best.reason}"
        rate = f"{best.learning_rate:.2e}" if isinstance(best, ArmOptimum) else ""
        rank = str(arm.template.lora_rank)
        rows.append(["+".join(arm.template.target), rank, f"{arm.trained_params:,}", rate, loss])
    headers = [["target", False], ["lora_rank", True], ["adapter parameters", True]]
    headers += [["best learning_rate", True], ["best loss", True]]
    return {
        "title": "Best loss by adapted layers",
        "note": "Each target at its own best learning rate.",
        "headers": headers,
        "rows": rows,
    }


def _picture(compared: Comparison) -> dict[str, Any]:
    """Best loss of each target, with the losses of its seeds at the measured rate nearest to the best."""
    found = [(k, arm, compared.curve(arm)) for k, arm in enumerate(compared.lora_arms)]
    drawn = [(k, curve[-1]) for k, _, curve in found if curve]
    points = series(
        "mean and spread over seeds",
        [k for k, _ in drawn],
        [loss for _, (_, loss, _) in drawn],
        low=[loss - spread for _, (_, loss, spread) in drawn],
        high=[loss + spread for _, (_, loss, spread) in drawn],
        mode="markers",
    )
    return figure(
        "Loss at the best learning rate, by adapted layers",
        "",
        "eval_loss (nats/token)",
        [points],
        x_labels=[
            f"{'+'.join(arm.template.target)} r{arm.template.lora_rank}"
            for arm in compared.lora_arms
        ],
    )
