"""Writes the table of docs/scaling.md: three models on five inventories, each cell placed or refused as
`tenfold plan` says.

Run: cd docs && PYTHONPATH=.. ../.venv/bin/python update_scaling.py
"""

from pathlib import Path
from typing import Any

from cluster.gpus import parse_inventory
from orchestration.config import make_config
from orchestration.placing import placed_plan
from search_spaces.pruner import NothingAdmittedError

HERE = Path(__file__).resolve().parent
PAGE = HERE / "scaling.md"
MODELS = HERE.parent.parent / "shared" / "models"
NAMES = ("Llama-3.1-8B", "Qwen3-30B-A3B", "Llama-3.1-70B")
INVENTORIES = ("1x24GB", "2xA100-40GB", "1xH100-80GB", "8xL4-24GB", "8xH100-80GB")
DATASET_TOKENS = 10_000_000
BEGIN, END = "<!-- placements -->", "<!-- end placements -->"
GB = 10**9


def main() -> None:
    head = f"| model, ranks of the doctrine | {' | '.join(INVENTORIES)} |"
    rows = [head, "|---" * (1 + len(INVENTORIES)) + "|", *(row(name) for name in NAMES)]
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(rows) + f"\n{END}{after}", encoding="utf-8")


def row(name: str) -> str:
    """A model's line."""
    cells = [cell(name, inventory) for inventory in INVENTORIES]
    return f"| {name} | {' | '.join(cells)} |"


def cell(name: str, inventory: str) -> str:
    """What the plan says of a model on an inventory."""
    values = {"model": str(MODELS / f"{name}.json"), "dataset_tokens": DATASET_TOKENS}
    config = make_config(values, name)
    try:
        plan = placed_plan(config, parse_inventory(inventory))
    except NothingAdmittedError as error:
        return f"refused: {str(error).split('the nearest: ')[1]}"
    return placed(plan)


def placed(plan: dict[str, Any]) -> str:
    """A placed plan in a few words."""
    packs = plan["packs"]
    if "refused" in packs:
        return f"refused: {packs['refused']}"
    ranks = sorted({item["candidate"]["lora_rank"] for item in plan["candidates"]})
    cut = sorted({item["candidate"]["lora_rank"] for item in plan["discarded"]} - set(ranks))
    again = ", recomputed" if packs["gradient_checkpointing"] else ""
    text = (
        f"rank {', '.join(map(str, ranks))}: {packs['strategy']}, {packs['num_groups']} x "
        f"{packs['workers_per_group']} GPU(s), K = {packs['places']}, forwards of {packs['max_tokens']:,} tokens"
        f"{again}, {packs['needed_bytes'] / GB:.1f} GB planned"
    )
    if packs["cost"]:
        text += f", about {packs['cost']['hours']:.0f} h"
    return text + (f"; rank {', '.join(map(str, cut))} discarded" if cut else "")


if __name__ == "__main__":
    main()
