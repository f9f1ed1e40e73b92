"""The best learning rate of each LoRA variant, over that of plain LoRA, beside what the prior says.

Run: tenfold sweep benchmarks/variant_rates.yaml
     PYTHONPATH=. python benchmarks/variant_rates.py runs/variant-rates

One seed: the intervals hold what other seeds of this project's studies did to an optimum (carried_prior.py).
"""

import sys
from pathlib import Path
from typing import Any

from orchestration.carried import read_optimum
from orchestration.results import read_trials
from orchestration.run_folder import run_at
from orchestration.show import text_table
from search_spaces.architecture import ModelShape
from search_spaces.space import build_space
from search_spaces.variants import PLAIN, lr_factor
from trainers.paths import read_json, write_json
from trainers.speed import cpu_name

OUT = Path(__file__).parent / "results" / "variant_rates-cpu.json"


def rates_of(folder: str) -> dict[str, Any]:
    """Best learning rate, its 95% interval, and best eval_loss of each variant of a finished sweep."""
    run = run_at(folder)
    records = read_trials(run)
    shape = ModelShape.from_config(Path(read_json(run.resolved)["config"]["model"]))
    found = {}
    for variant in dict.fromkeys(record.settings.variant for record in records):
        wanted = build_space(shape, overrides={"variant": variant})
        best = read_optimum(folder, "sft", wanted)
        own = [r for r in records if r.settings.variant == variant and r.best]
        (rank,) = best.lora_ranks
        found[variant] = {
            "learning_rate": 10**best.log10_lr,
            "low": 10**best.low,
            "high": 10**best.high,
            "prior": lr_factor(variant, best.lora_alpha, rank, best.lora_alpha),
            "eval_loss": min(r.best["eval_loss"] for r in own if r.best),
        }
    return {"machine": cpu_name(), "hidden_size": shape.hidden_size, "variants": found}


def main() -> None:
    result = rates_of(sys.argv[1])
    plain = result["variants"][PLAIN]["learning_rate"]
    rows = [
        (
            f"{one['learning_rate']:.2e}",
            f"{one['learning_rate'] / plain:.2f}",
            f"{one['low'] / plain:.2f} to {one['high'] / plain:.2f}",
            f"{one['prior']:.2f}",
            f"{one['eval_loss']:.4f}",
            variant,
        )
        for variant, one in result["variants"].items()
    ]
    headers = ("best LR", "over LoRA's", "95%", "prior", "eval_loss", "variant")
    print(text_table(headers, rows, numeric=5))
    write_json(OUT, result)


if __name__ == "__main__":
    main()
