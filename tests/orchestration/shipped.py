"""Every YAML of ours that a user meets, and the models and data that they name."""

import json
import re
import shutil
from pathlib import Path

import yaml

from orchestration.studies.config import KINDS, PRESETS, preset_values
from tests.fuzzing import BASE, ROOT

MODELS = {
    "meta-llama/Llama-3.2-1B": "Llama-3.2-1B",
    "meta-llama/Llama-3.1-8B": "Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B": "Llama-3.1-70B",
    "Qwen/Qwen3-4B": "Qwen3-4B",
    "Qwen/Qwen3-30B-A3B": "Qwen3-30B-A3B",
}
"""Hub ids in our files, and the configs of theirs that lie beside the checkout."""
CONFIGS = ROOT.parent / "shared" / "models"
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
ROLES = ("user", "assistant")


def shipped_texts() -> dict[str, str]:
    """Every YAML of ours that a user meets: name -> text."""
    files = [*sorted((ROOT / "benchmarks").glob("*.yaml")), *EXAMPLES]
    found = {path.name: path.read_text() for path in files}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        blocks = re.findall(r"```yaml\n(.*?)```", path.read_text(), re.DOTALL)
        found |= {f"{path.relative_to(ROOT)} {n}": block for n, block in enumerate(blocks)}
    for preset in PRESETS:
        for kind in KINDS:
            values = {"model": "assets/tiny-llama", **preset_values(kind, preset)}
            found[f"{preset} {kind}"] = yaml.safe_dump(values, sort_keys=False)
    return found


def place_data(folder: Path) -> None:
    """Puts there the data that our files name: short rows."""
    pairs = [(f"{i} plus one?", f" It is {i + 1}.\n#### {i + 1}") for i in range(600)]
    chats = [
        {"messages": [{"role": r, "content": text} for r, text in zip(ROLES, pair, strict=True)]}
        for pair in pairs[:60]
    ]
    rows = {
        "train.jsonl": [{"prompt": q, "completion": a} for q, a in pairs],
        "support.jsonl": [{"ticket": q, "reply": a} for q, a in pairs[:40]],
        "support-held-out.jsonl": [{"ticket": q, "reply": a} for q, a in pairs[40:60]],
        "general.jsonl": [{"text": f"word {i} of it"} for i in range(60)],
        "chats.jsonl": chats[:30],
        "tools.jsonl": chats[30:],
        "gsm8k/train.jsonl": [{"question": q, "answer": a} for q, a in pairs],
    }
    for name, lines in rows.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "chatml.jinja", folder / "examples")


def place_models(folder: Path) -> None:
    """Puts there what a plan reads of the models that our files name: their shapes, and a tokenizer of ours."""
    for name, config in MODELS.items():
        model = folder / name
        model.mkdir(parents=True)
        shutil.copy(CONFIGS / f"{config}.json", model / "config.json")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(BASE / file, model)
