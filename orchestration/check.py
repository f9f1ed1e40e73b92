"""`tenfold check`: what is in the data and what of it would be trained, before anything runs."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.config import SweepConfig, load_config, make_config
from orchestration.models import model_shape
from orchestration.plan_json import plan_to_dict
from orchestration.planning import make_data_spec, make_plan
from trainers.data import audit_data, near_duplicates_of

if TYPE_CHECKING:
    from trainers.data.spec import DataSpec

CONFIG_SUFFIXES = (".yaml", ".yml")
PLAN_KEYS = ("dataset_tokens", "dataset_bits", "capacity", "retention", "pitfalls")


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What the command line asks beside the config.

    Args:
        model: whose tokenizer, for a data file that is checked without a config.
        num_shown: rows to show as they are tokenized.
        base_loss: measure the base's bits per byte.
    """

    model: str | None = None
    num_shown: int = 0
    base_loss: bool = False


def checked(path: Path, options: CheckOptions) -> dict[str, Any]:
    """Everything that `tenfold check` prints, as JSON.

    "refusals" holds why a sweep of it would end at once, one line each. Without data in the config
    there is no "data", and for a data file without a config nothing of a plan.

    Args:
        path: sweep.yaml, or data: a file or a folder.
    Raises:
        ValueError: a config or a file that cannot be read as a whole.
    """
    is_config = path.suffix in CONFIG_SUFFIXES
    if is_config and options.model:
        raise ValueError(f"--model is for a data file alone; {path} names its own")
    config = load_config(path) if is_config else data_config(path, options.model)
    return checked_config(config, options, is_sweep=is_config)


def checked_config(
    config: SweepConfig, options: CheckOptions, *, is_sweep: bool = True
) -> dict[str, Any]:
    """`checked` of a config that was read; is_sweep: its plan is looked at, too."""
    found: dict[str, Any] = {"model": config.model, "refusals": []}
    if config.data:
        spec = make_data_spec(config, model_shape(config.model, config.revision))
        found |= _checked_data(spec, config, options)
    return found | _planned(config, found["refusals"]) if is_sweep else found


def data_config(data: Path, model: str | None) -> SweepConfig:
    """The sweep of a data file alone, with the model's tokenizer, else that of the shipped base."""
    from trainers.data.tokenizer import SHIPPED_MODEL

    return make_config({"data": str(data), "model": model or str(SHIPPED_MODEL)}, str(data))


def _checked_data(spec: "DataSpec", config: SweepConfig, options: CheckOptions) -> dict[str, Any]:
    audit = audit_data(spec)
    refusals = []
    if audit.num_bad_rows and spec.bad_rows == "error":
        refusals.append(
            f"{audit.num_bad_rows:,} rows cannot be used; mend them, or set bad_rows: drop"
        )
    data = audit.to_dict() | {
        "data": config.data,
        "seq_len": spec.seq_len,
        "near_duplicates": near_duplicates_of(spec),
    }
    found = {"data": data, "refusals": refusals + list(audit.problems)}
    if options.num_shown:
        from trainers.data.preview import shown_rows

        found["shown"] = [asdict(row) for row in shown_rows(spec, options.num_shown)]
    if options.base_loss and not audit.problems:
        from orchestration.measured import base_loss

        found["base_loss"] = base_loss(config, replace(spec, bad_rows="drop")).to_dict()
    return found


def _planned(config: SweepConfig, refusals: list[str]) -> dict[str, Any]:
    """The plan's part; what it refuses is added to the refusals."""
    if refusals:
        return {}
    try:
        plan = plan_to_dict(make_plan(config))
    except ValueError as error:
        refusals.append(str(error))
        return {}
    return {"name": plan["name"]} | {key: plan[key] for key in PLAN_KEYS}
