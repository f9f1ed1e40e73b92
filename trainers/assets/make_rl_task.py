"""Writes the task of the reinforcement-learning study: return the last parameter of a function.

    python -m trainers.assets.make_rl_task --out trainers/assets/rl

A prompt is the head of a function and `return`; the answer is the name of its last parameter. The shipped base names
it in about one completion of fifty. Held-out rows are functions that were not trained on, with names that others have,
too: of names that no prompt had, so small a base learns nothing. Pure: the same rows from the same seed, committed.
"""

import argparse
import json
import random
from pathlib import Path

SEED = 0
NUM_ROWS = 1200
VERBS = ("get", "make", "check", "update", "find", "read", "write", "load", "parse", "build")
NAMES = (
    *("name", "value", "path", "text", "data", "size", "index", "key", "item", "line", "node"),
    *("start", "stop", "count", "width", "height", "parent", "target", "mode", "args", "func"),
    *("string", "other", "result", "message", "buffer", "offset", "encoding", "prefix", "default"),
)


def rows(generator: random.Random) -> list[dict[str, str]]:
    """Functions of two or three parameters, each with its last one; no two alike."""
    found: dict[str, str] = {}
    while len(found) < NUM_ROWS:
        parameters = generator.sample(NAMES, generator.choice((2, 3)))
        name = f"{generator.choice(VERBS)}_{generator.choice(NAMES)}"
        found[f"def {name}({', '.join(parameters)}):\n    return"] = f" {parameters[-1]}"
    return [{"prompt": head, "completion": answer} for head, answer in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(row)}\n" for row in rows(random.Random(SEED)))
    (out / "parameters.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
