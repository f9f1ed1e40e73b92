"""study.yaml: the keys of a sweep, and those that say how an arm is measured."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from orchestration.config import (
    ConfigError,
    LogRange,
    Positive,
    PositiveInt,
    SweepConfig,
    make_config,
    read_values,
)
from search_spaces.values import MAX_POINTS, parse_domain
from trainers.paths import write_text

KINDS = ("lr-ratio", "rank", "layers", "batch", "capacity", "compute", "rl")
OWN_RECIPE = ("capacity", "compute")
PRESETS = ("smoke", "laptop", "gpu", "cluster")
FOLDER = Path(__file__).resolve().parent / "presets"
ASSETS = Path(__file__).resolve().parents[2] / "trainers" / "assets"
DECIDED = (
    "search",
    "num_candidates",
    "scheduler",
    "grace_period",
    "reduction_factor",
    "seed",
    "capacity_policy",
    "method",
    "dataset_tokens",
    "metric",
    "metric_rows",
    "select",
    "max_forgetting",
    "confirm",
    "time_budget",
    "max_cost",
)
"""Keys of a sweep that a study decides itself: its arms run every point to its end."""
Decades = Annotated[float, Field(gt=0, le=10)]
"""Half widths of grids of learning rates, which never lie further from their prior."""


class StudyConfig(SweepConfig):
    """A study. What a sweep's key means here is what it means there, but for the defaults below."""

    # Other defaults than a sweep's
    quantization: Literal["nf4", "none"] = "none"
    """A claim about full fine-tuning is measured in fp32; NF4 is another arm's matter."""
    dtype: Literal["auto", "bf16", "fp32"] = "fp32"
    """A difference of methods must not be one of rounding."""
    scheduler: Literal["asha", "fifo", "median"] = "fifo"
    """Decided by the study: nothing is stopped early."""
    capacity_policy: Literal["discard", "advisory"] = "advisory"
    """Decided by the study: an arm without capacity is what it measures."""

    # How arms are measured
    seeds: Annotated[int, Field(ge=1, le=MAX_POINTS)] | list[Annotated[int, Field(ge=0)]] = 3
    """How many seeds (0, 1, ...), or which."""
    full_learning_rate: float | list[float] | LogRange | None = None
    """Grid of the full-fine-tuning arms; default: one decade to each side of the prior. learning_rate is
    that of the LoRA arms."""
    lr_decades: Decades = 1.0
    """Half width of a default grid."""
    seed_window_decades: Decades = 0.5
    """Seeds after the first run the learning rates so near to the first one's best."""
    max_extensions: Annotated[int, Field(ge=0, le=MAX_POINTS)] = 8
    """Most learning rates that a grid may grow by, at an edge or beside a diverged run."""
    tolerance_frac: Annotated[float, Field(gt=0, lt=1)] = 0.005
    """A loss so near to the best counts as as good."""
    exposures: PositiveInt | None = None
    """capacity: how often each fact is seen."""
    loads: list[Positive] | None = None
    """capacity: known bits of the facts, in multiples of what the adapter is said to hold."""

    @field_validator("full_learning_rate", mode="before")
    @classmethod
    def _full_grid(cls, value: Any) -> Any:
        if value is not None:
            try:
                parse_domain("learning_rate", value)
            except ValueError as error:
                raise ValueError(f"full_{error}") from error
        return value

    @field_validator("seeds")
    @classmethod
    def _different_seeds(cls, value: int | list[int]) -> int | list[int]:
        if isinstance(value, list) and (not value or len(set(value)) < len(value)):
            raise ValueError(f"seeds must be different and at least one, got {value!r}")
        return value

    @model_validator(mode="after")
    def _decided_by_the_study(self) -> "StudyConfig":
        given = [key for key in DECIDED if key in self.model_fields_set]
        if given:
            raise ValueError(
                f"a study decides {', '.join(given)} itself (every point of every arm runs to its end, "
                "for each of `seeds`); leave it out"
            )
        return self

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds, the first of which runs the whole grid."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)


class RLStudyConfig(StudyConfig):
    """A study of reinforcement learning; examples and batches are counted in prompts."""

    method: Literal["sft", "rl"] = "rl"
    """Decided by the kind of study."""


def load_study(kind: str, preset: str | None, path: Path | None, **flags: Any) -> StudyConfig:
    """A study's config: the preset's keys, over them the file's, over them the flags that are not None.

    Raises:
        ConfigError: an unusable file, a bad value, or neither file nor preset.
    """
    if path is None and preset is None:
        raise ConfigError(
            f"a study needs a study.yaml, or --preset ({', '.join(PRESETS)}); e.g. "
            f"tenfold study {kind} --preset smoke"
        )
    values = preset_values(kind, preset) if preset else {}
    if path is not None:
        values |= read_values(path)
    values |= {key: value for key, value in flags.items() if value is not None}
    values = {key: _asset(value) for key, value in values.items()}
    where = str(path) if path else f"preset {preset}"
    return make_config(values, where, RLStudyConfig if kind == "rl" else StudyConfig)


def preset_values(kind: str, preset: str) -> dict[str, Any]:
    """The keys that a preset gives a kind of study. How curves are trained is nothing to studies that
    have a recipe of their own."""
    sections = read_values(FOLDER / f"{preset}.yaml")
    shared = sections["all"]
    if kind in OWN_RECIPE:
        shared = {key: shared[key] for key in ("model", "data") if key in shared}
    return {**shared, **sections.get(kind, {})}


def _asset(value: Any) -> Any:
    """assets/NAME is what Tenfold ships, wherever it is installed."""
    if isinstance(value, str) and value.startswith("assets/") and not Path(value).exists():
        return str(ASSETS / value.removeprefix("assets/"))
    return value


def short_path(value: Any) -> Any:
    """A path as a report shows it: assets/NAME for what Tenfold ships."""
    if isinstance(value, str) and value.startswith(f"{ASSETS}/"):
        return f"assets/{Path(value).relative_to(ASSETS)}"
    return value


def write_study_yaml(path: Path, config: StudyConfig) -> None:
    """The whole study as one file that reruns it, without preset."""
    import yaml

    values = config.model_dump(
        mode="json", exclude_unset=True, exclude={"name", "storage", "address"}
    )
    values = {key: short_path(value) for key, value in values.items()}
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
