"""rank: learning curves by rank against full fine-tuning, and where each rank leaves them."""

from typing import Any

from orchestration.studies.arms import Arm
from orchestration.studies.comparison import Comparison
from orchestration.studies.pictures import best_scores, learning_curves
from search_spaces import doctrine
from search_spaces.studies.rank_curves import capacity_examples, kendall_tau, leaving_examples


def conclusion(compared: Comparison) -> dict[str, Any]:
    """Verdict, table and learning curves."""
    full = compared.full_arms[0]
    reference = compared.curve(full)
    rows = [_row(compared, arm, reference) for arm in compared.lora_arms]
    return {
        "verdict": _verdict(compared, rows, bool(reference)),
        "tables": [_table(rows)],
        "figures": [learning_curves(compared), best_scores(compared)],
        "limits": [
            "Capacity counts 2 bits a parameter against 1 bit a loss-bearing token (the doctrine's numbers), "
            "an upper bound of what the data needs.",
        ],
    }


def _row(compared: Comparison, arm: Arm, reference: list[Any]) -> dict[str, Any]:
    plan, curve = compared.plan, compared.curve(arm)
    assert plan.budget is not None
    assert plan.audit is not None
    bits = doctrine.BITS_PER_PARAM.value * arm.trained_params
    per_example = plan.audit.num_train_loss_tokens / plan.audit.num_train_rows
    left = None
    if reference and curve:
        left = leaving_examples(reference, curve, compared.config.tolerance_frac)
    return {
        "arm": arm,
        "bits": bits,
        "filled": capacity_examples(bits, per_example, doctrine.BITS_PER_TOKEN.value),
        "left": left,
        "has_curve": bool(reference and curve),
        "final": curve[-1][1] if curve else None,
        "budget": plan.budget.num_examples,
    }


def _verdict(compared: Comparison, rows: list[dict[str, Any]], has_full: bool) -> dict[str, Any]:
    drawn = [row for row in rows if row["has_curve"]]
    if not has_full or not drawn:
        return {
            "status": "undecided",
            "sentence": "No curve can be compared: full fine-tuning or every rank has no settled optimum.",
            "would_decide": "a wider grid, or more seeds",
        }
    budget = drawn[0]["budget"]
    within = compared.config.tolerance_frac
    follow = [row["arm"].label for row in drawn if row["left"] is None]
    leave = [f"{row['arm'].label} from {row['left']:,} examples on" for row in drawn if row["left"]]
    parts = [
        f"within {within:.1%} of full fine-tuning to the end of {budget:,} examples: "
        f"{', '.join(follow) or 'no rank'}",
        f"above it: {', '.join(leave) or 'none'}",
        _order_sentence(drawn),
    ]
    return {"status": "measured", "sentence": "; ".join(parts) + ".", "would_decide": None}


def _order_sentence(drawn: list[dict[str, Any]]) -> str:
    """Whether ranks leave in the order of their capacity."""
    budget = drawn[0]["budget"]
    tau = kendall_tau([row["bits"] for row in drawn], [row["left"] or budget + 1 for row in drawn])
    said = "not defined (all alike)" if tau is None else f"{tau:+.2f}"
    filled = [row for row in drawn if row["filled"] <= budget]
    names = ", ".join(row["arm"].label for row in filled) or "none"
    return f"order of leaving against capacity: Kendall tau {said}; capacity is filled within the budget for {names}"


def _table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    headers = [["arm", False], ["adapter bits", True], ["filled at examples", True]]
    headers += [["leaves FullFT at examples", True], ["last loss", True]]
    cells = []
    for row in rows:
        left = (
            "no curve"
            if not row["has_curve"]
            else "stays"
            if row["left"] is None
            else f"{row['left']:,}"
        )
        last = "" if row["final"] is None else f"{row['final']:.4f}"
        cells.append([row["arm"].label, f"{row['bits']:,}", f"{row['filled']:,}", left, last])
    return {
        "title": "Where each rank leaves full fine-tuning",
        "note": "Each arm at its own best learning rate. It leaves where its loss stays above full "
        "fine-tuning's by more than the tolerance, to the end.",
        "headers": headers,
        "rows": cells,
    }
