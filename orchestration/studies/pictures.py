"""Figures that several kinds of study draw of their arms: learning curves, and the best score by rank."""

from typing import Any

from orchestration.studies.comparison import Comparison
from orchestration.studies.figures import figure, series
from search_spaces.studies.optimum import ArmOptimum


def learning_curves(compared: Comparison) -> dict[str, Any]:
    """Mean and spread over seeds, each arm at its own best learning rate."""
    drawn, score = [], compared.score
    for arm in compared.arms:
        curve = [point for point in compared.curve(arm) if point[0] > 0]
        drawn.append(
            series(
                arm.label,
                [examples for examples, _, _ in curve],
                [score.of(loss) for _, loss, _ in curve],
                low=[score.of(loss) - spread for _, loss, spread in curve],
                high=[score.of(loss) + spread for _, loss, spread in curve],
                dash="dash" if arm.full_finetune else "solid",
            )
        )
    title = "Learning curves at each arm's best learning rate"
    return figure(title, compared.unit, score.title, drawn)


def best_scores(compared: Comparison) -> dict[str, Any]:
    """The fitted best of each LoRA arm by rank, beside full fine-tuning's."""
    found, score = [(arm, compared.optimum(arm)) for arm in compared.arms], compared.score
    settled = [(arm, best) for arm, best in found if isinstance(best, ArmOptimum)]
    lora = [(arm, best) for arm, best in settled if not arm.full_finetune]
    full = [best for arm, best in settled if arm.full_finetune]
    drawn = series(
        "LoRA at its best learning rate",
        [arm.template.lora_rank for arm, _ in lora],
        [score.of(best.loss) for _, best in lora],
    )
    return figure(
        f"Best {score.noun} by rank",
        "lora_rank",
        score.title,
        [drawn],
        x_log=True,
        hlines=[{"y": score.of(best.loss), "text": "FullFT"} for best in full],
    )
