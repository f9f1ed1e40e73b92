"""The measured costs of training steps, by model and arm. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from search_spaces.doctrine import lora_compute_frac

FULL = "FullFT"
ESTIMATE = "(2N² + 6NR) / (3N²)"


@dataclass(frozen=True)
class ArmCosts:
    """The rows of one arm of one model, by repeat."""

    rows: tuple[dict[str, Any], ...]

    @property
    def label(self) -> str:
        return self.rows[0]["arm"]["label"]

    @property
    def lora_rank(self) -> int:
        return self.rows[0]["arm"]["lora_rank"]

    @property
    def is_compared(self) -> bool:
        """A LoRA arm that differs from full fine-tuning in nothing else."""
        arm = self.rows[0]["arm"]
        return arm["lora_rank"] > 0 and arm["quantization"] == "none" and arm["dtype"] == "fp32"

    def flops(self, part: str) -> int:
        """FLOPs of a part of a step, the same in every repeat."""
        return self.rows[0]["flops"][part]

    def seconds(self, part: str = "step") -> list[float]:
        return [row["seconds"][part] for row in self.rows]

    def num_bytes(self, part: str) -> int:
        """Exact bytes of base, adapter, gradients or optimizer."""
        return self.rows[0]["bytes"][part]

    @property
    def held(self) -> int:
        """Bytes held between steps, summed over tensors."""
        return sum(self.num_bytes(part) for part in ("base", "adapter", "gradients", "optimizer"))

    @property
    def peaks(self) -> list[int]:
        """Peak bytes of the repeats; none where the system does not tell."""
        return [peak for row in self.rows if (peak := row["bytes"]["peak"]) is not None]


@dataclass(frozen=True)
class ModelCosts:
    """One model's arms, full fine-tuning apart."""

    facts: dict[str, Any]
    full: ArmCosts
    arms: tuple[ArmCosts, ...]

    @property
    def name(self) -> str:
        return self.facts["name"]

    @property
    def compared(self) -> list[ArmCosts]:
        """LoRA arms in full fine-tuning's own numbers, by rank."""
        return sorted((arm for arm in self.arms if arm.is_compared), key=lambda arm: arm.lora_rank)

    def flops_ratio(self, arm: ArmCosts, part: str) -> float:
        return arm.flops(part) / self.full.flops(part)

    def estimate(self, lora_rank: int) -> float:
        """The doctrine's, at the model's width."""
        return lora_compute_frac(self.facts["hidden_size"], lora_rank)

    def by_sides(self, lora_rank: int) -> float:
        """The same sum as the estimate's, over the layers' matrices as they are: 4 FLOPs of 6 for each
        weight and token, and all 6 for each low-rank one."""
        low_rank = lora_rank * self.facts["layer_sides"]
        return (4 + 6 * low_rank / self.facts["layer_weights"]) / 6

    def time_ratios(self, arm: ArmCosts, part: str = "step") -> list[float]:
        """Of each repeat, to full fine-tuning's of the same round."""
        full = {row["repeat"]: row["seconds"][part] for row in self.full.rows}
        rows = (row for row in arm.rows if row["repeat"] in full)
        return [row["seconds"][part] / full[row["repeat"]] for row in rows]


def models_of(rows: Iterable[dict[str, Any]]) -> list[ModelCosts]:
    """The models whose full fine-tuning was measured, in the rows' order."""
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: row["repeat"]):
        arms = grouped.setdefault(row["model"]["name"], {})
        arms.setdefault(row["arm"]["label"], []).append(row)
    found = []
    for arms in grouped.values():
        costs = {label: ArmCosts(tuple(each)) for label, each in arms.items()}
        if (full := costs.pop(FULL, None)) is not None:
            found.append(ModelCosts(full.rows[0]["model"], full, tuple(costs.values())))
    return found
