"""What results.json of every kind of study begins with. Imports no fit and no chart."""

from dataclasses import dataclass
from typing import Any

from cluster.inventory import local_inventory
from orchestration.objective import LOSS
from trainers.speed import cpu_name

QUESTIONS = {
    "lr-ratio": "Is the best LoRA learning rate 10 times the one of full fine-tuning?",
    "rank": "Which ranks follow full fine-tuning's learning curve, and where does each leave it?",
    "layers": "At equal parameters, which layers should be adapted?",
    "batch": "Does LoRA fall behind full fine-tuning as the global batch grows?",
    "capacity": "How many bits does an adapter store for each of its parameters?",
    "compute": "Does a LoRA step cost two thirds of a full-fine-tuning step?",
    "rl": "Does reinforcement learning with a small rank reach full fine-tuning's reward, and at 10 times its learning "
    "rate?",
}


@dataclass(frozen=True, kw_only=True)
class StudyFacts:
    """Which study this is. command: what reruns it; versions: name -> version."""

    kind: str
    preset: str | None
    command: str
    versions: dict[str, str]


def frame(
    facts: StudyFacts, name: str, *, complete: bool, model: dict[str, Any], data: dict[str, Any]
) -> dict[str, Any]:
    """The parts of results.json that all kinds share; the findings are put over it."""
    return {
        "kind": facts.kind,
        "name": name,
        "preset": facts.preset,
        "status": "complete" if complete else "unfinished",
        "command": facts.command,
        "question": QUESTIONS[facts.kind],
        "objective": LOSS.key,
        "limits": [],
        "protocol": [],
        "versions": facts.versions,
        "machine": machine(),
        "model": model,
        "data": data,
        "arms": [],
        "claims": [],
        "tables": [],
        "figures": [],
    }


def machine() -> str:
    """This machine in words."""
    found = local_inventory()
    gpus = f", {found.num_gpus} GPU(s): {_gpu_name()}" if found.num_gpus else ""
    return f"{found.num_cpus} cores of {cpu_name()}{gpus}"


def _gpu_name() -> str:
    import subprocess

    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    listing = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    return listing.stdout.strip().splitlines()[0]
