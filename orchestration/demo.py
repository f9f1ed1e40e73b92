"""`tenfold demo`: the embedded default, on the shipped base and rows it has not seen."""

from pathlib import Path

from orchestration.config import SweepConfig, load_config

ASSETS = Path(__file__).resolve().parent.parent / "trainers" / "assets"


def demo_config(name: str | None) -> tuple[SweepConfig, str]:
    """The demo's config with its paths filled in, and its YAML as shipped."""
    source = ASSETS / "demo" / "sweep.yaml"
    config = load_config(
        source,
        name=name or free_name(Path("runs"), "demo"),
        model=str(ASSETS / "tiny-llama"),
        data=str(ASSETS / "demo" / "functions.jsonl"),
        retention=str(ASSETS / "demo" / "reference.jsonl"),
    )
    return config, source.read_text(encoding="utf-8")


def free_name(storage: Path, name: str) -> str:
    """The name, or name-2, name-3, ...: the first whose folder is not there yet."""
    number, free = 1, name
    while (storage / free).exists():
        number += 1
        free = f"{name}-{number}"
    return free
