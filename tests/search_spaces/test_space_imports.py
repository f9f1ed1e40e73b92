"""The pure layer imports nothing heavy, and nothing from the layers above it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = ("torch", "ray", "transformers", "numpy", "trainers", "orchestration", "cluster")


def test_search_spaces_imports_only_the_standard_library():
    modules = sorted(path.stem for path in (ROOT / "search_spaces").glob("[a-z]*.py"))
    assert {"doctrine", "architecture", "capacity", "space", "pruner", "pitfalls"} <= set(modules)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        + "".join(f"import search_spaces.{name}\n" for name in modules)
        + f"print([name for name in {FORBIDDEN!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
