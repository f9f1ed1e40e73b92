"""The compute study: what a LoRA step costs beside a full-fine-tuning step, by rank.

Each repeat of each arm is measured in a process of its own (trainers/step_cost.py). The processes of a
round get ready together and then measure one after the other, every second round in reverse, so that
what else happens on the machine hits all arms alike.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from orchestration.config import Positive, PositiveInt
from orchestration.models import config_path, model_shape
from orchestration.studies.compute_findings import findings
from search_spaces import doctrine
from search_spaces.architecture import lora_num_params
from trainers.base_fetch import is_hub_id
from trainers.paths import read_json, read_json_lines, write_json, write_json_lines

SHIPPED_BASE = Path(__file__).resolve().parents[2] / "trainers" / "assets" / "tiny-llama"
Ranks = tuple[PositiveInt, ...]


class CostModel(BaseModel):
    """A model whose steps are measured; costs do not depend on its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Unique in the study."""
    folder: str | None = None
    """Folder, hub id or config.json; without weights it gets random ones, in the study's folder."""
    config: dict[str, Any] | None = None
    """Or a config.json's values."""

    @model_validator(mode="after")
    def _one_source(self) -> "CostModel":
        if (self.folder is None) == (self.config is None):
            raise ValueError(
                f"a cost model must have a folder or a config, {self.name} has "
                f"{'neither' if self.folder is None else 'both'}; give one"
            )
        return self


class ComputeRecipe(BaseModel):
    """What the study measures: full fine-tuning and LoRA at each rank, of each model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Annotated[tuple[CostModel, ...], Field(min_length=1)]
    ranks: Annotated[Ranks, Field(min_length=1)]
    nf4_ranks: Ranks = ()
    """Further arms on a base in NF4, which is dequantized at each use."""
    bf16_ranks: Ranks = ()
    """Further arms on a base in bf16 (the adapters stay fp32)."""
    rows: PositiveInt
    tokens: Annotated[int, Field(ge=2)]
    """Of a row; all but its first bear loss. One batch is one forward."""
    repeats: PositiveInt = 3
    warmup_steps: PositiveInt = 2
    min_steps: PositiveInt = 3
    """Fewest timed steps of a repeat, whose median counts."""
    sample_s: Positive = 1.0
    """Fewest timed seconds of a repeat."""
    num_threads: PositiveInt = 1
    """Of torch on a CPU; one is what a worker has."""
    target: tuple[str, ...] = doctrine.TARGET.value
    lora_alpha: Positive = doctrine.ALPHA.value


def random_llama(hidden_size: int, num_layers: int, vocab_size: int) -> CostModel:
    """A Llama of a width with random weights: heads of 64, a quarter as many for keys and values."""
    heads = hidden_size // 64
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": round(hidden_size * 8 / 3 / 32) * 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "vocab_size": vocab_size,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    return CostModel(name=f"Llama-{hidden_size}x{num_layers}", config=config)


SHIPPED = CostModel(name="tiny-llama", folder=str(SHIPPED_BASE))
SMOKE = ComputeRecipe(
    models=(SHIPPED,),
    ranks=(1, 16),
    rows=2,
    tokens=64,
    repeats=1,
    warmup_steps=1,
    min_steps=2,
    sample_s=0.2,
)
LAPTOP = ComputeRecipe(
    models=(SHIPPED, random_llama(512, 4, 3072)),
    ranks=(1, 8, 32, 128),
    nf4_ranks=(32,),
    rows=4,
    tokens=128,
)
GPU = ComputeRecipe(
    models=(random_llama(2048, 4, 32000),),
    ranks=(1, 16, 128),
    nf4_ranks=(16,),
    bf16_ranks=(16,),
    rows=4,
    tokens=1024,
    repeats=2,
    warmup_steps=3,
    min_steps=5,
    sample_s=0.3,
)


@dataclass(frozen=True, kw_only=True)
class CostArm:
    """One arm; lora_rank 0 is full fine-tuning, which takes fp32 alone: so do those compared with it."""

    label: str
    lora_rank: int
    quantization: str = "none"
    dtype: str = "fp32"


def arms_of(recipe: ComputeRecipe) -> tuple[CostArm, ...]:
    """The arms of every model, full fine-tuning first."""
    return (
        CostArm(label="FullFT", lora_rank=0),
        *(CostArm(label=f"r{rank}", lora_rank=rank) for rank in recipe.ranks),
        *(CostArm(label=f"r{r} bf16", lora_rank=r, dtype="bf16") for r in recipe.bf16_ranks),
        *(CostArm(label=f"r{r} NF4", lora_rank=r, quantization="nf4") for r in recipe.nf4_ranks),
    )


Progress = Callable[[str], None]
Measure = Callable[[Sequence[dict[str, Any]]], Iterator[dict[str, Any]]]
"""Specs of trainers/step_cost.py, in order -> what each measured, one after the other."""


def run_compute(
    recipe: ComputeRecipe,
    folder: Path,
    progress: Progress,
    measure: Measure | None = None,
) -> dict[str, Any]:
    """Measures what folder/costs.jsonl does not hold yet, and returns the findings of all of it.

    Args:
        progress: gets a line for each measured repeat.
        measure: default: a process for each.

    Raises:
        ValueError: a model that cannot be read, or an arm that cannot be measured, with its process's last words.
    """
    costs = folder / "costs.jsonl"
    rows = read_json_lines(costs)
    wanted: list[str] = []
    for model in recipe.models:
        base = _prepared(model, folder, recipe.target)
        for repeat in range(recipe.repeats):
            tasks = [_task(recipe, base, arm, repeat) for arm in arms_of(recipe)]
            wanted += [task.key for task in tasks]
            known = {row["key"] for row in rows}
            missing = [task for task in tasks if task.key not in known]
            missing = missing[::-1] if repeat % 2 else missing
            specs = [task.spec for task in missing]
            results = (measure or measured_in_processes)(specs) if specs else iter(())
            for task, result in zip(missing, results, strict=True):
                rows.append(task.row | result)
                write_json_lines(costs, rows)
                progress(_line(recipe, rows[-1]))
    shutil.rmtree(folder / "models", ignore_errors=True)  # random weights, which can be had again
    by_key = {row["key"]: row for row in rows}
    return findings([by_key[key] for key in wanted])


def _line(recipe: ComputeRecipe, row: dict[str, Any]) -> str:
    seconds = row["seconds"]["step"]
    return (
        f"{row['model']['name']}, {row['arm']['label']}, repeat {row['repeat'] + 1} of "
        f"{recipe.repeats}: {1e3 * seconds:,.1f} ms a step"
    )


@dataclass(frozen=True, kw_only=True)
class _Base:
    """A model that is ready to be loaded. path: what load_base takes; facts: for its rows."""

    path: str
    config: dict[str, Any]
    facts: dict[str, Any]


def _prepared(model: CostModel, folder: Path, target: tuple[str, ...]) -> _Base:
    """The model where its weights are, or a folder of the study's in which they will be made."""
    config, path = model.config, model.folder
    if path is not None:
        file = config_path(path)
        config = read_json(file)
        whole = Path(path).is_dir() and any(file.parent.glob("*.safetensors*"))
        if whole or is_hub_id(path):
            return _base(model.name, path, config, target)
    own = folder / "models" / _digest(config)  # a name may be a path, and a config may change
    if not any(own.glob("*.safetensors*")):
        write_json(own / "config.json", config)
    return _base(model.name, str(own), config or {}, target)


def _base(name: str, path: str, config: dict[str, Any], target: tuple[str, ...]) -> _Base:
    shape = model_shape(path)
    layers = [linear for linear in shape.linears if linear.component != "unembed"]
    adapted = [linear for linear in shape.resolve_target(target) if linear in layers]
    facts = {
        "name": name,
        "hidden_size": shape.hidden_size,
        "num_layers": shape.num_layers,
        "num_params": shape.num_params,
        "layer_weights": sum(linear.num_params for linear in layers),
        "layer_sides": lora_num_params(adapted, 1, shape.num_active_experts),
    }
    return _Base(path=path, config=config, facts=facts)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One repeat of one arm. row: what its row holds beside what is measured."""

    key: str
    spec: dict[str, Any]
    row: dict[str, Any]


def _task(recipe: ComputeRecipe, base: _Base, arm: CostArm, repeat: int) -> _Task:
    how = {
        name: getattr(recipe, name)
        for name in ("rows", "tokens", "num_threads", "warmup_steps", "min_steps", "sample_s")
    }
    what = {key: value for key, value in asdict(arm).items() if key != "label"}
    spec = {**what, **how, "target": list(recipe.target), "lora_alpha": recipe.lora_alpha}
    key = _digest([base.facts, base.config, spec, repeat])
    row = {"key": key, "repeat": repeat, "model": base.facts, "arm": asdict(arm), "how": how}
    return _Task(key=key, spec=spec | {"model": base.path}, row=row)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def measured_in_processes(specs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each spec in a fresh process. All import and rehearse at once, then wait for their turn.

    Raises:
        ValueError: a process that failed, with its last words.
    """
    with tempfile.TemporaryDirectory(prefix="tenfold-compute-") as name:
        processes = [_CostProcess(spec, Path(name) / str(at)) for at, spec in enumerate(specs)]
        try:
            for process in processes:
                process.get_ready()
            for process in processes:
                yield process.measure()
        finally:
            for process in processes:
                process.close()


class _CostProcess:
    """python -m trainers.step_cost --wait."""

    def __init__(self, spec: dict[str, Any], folder: Path) -> None:
        self.spec, self.out, self.log = spec, folder / "out.json", folder / "log.txt"
        write_json(folder / "spec.json", spec)
        command = [sys.executable, "-m", "trainers.step_cost", str(folder / "spec.json")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, str(self.out), "--wait"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def get_ready(self) -> None:
        """Waits until the process waits."""
        assert self.process.stdout is not None
        if "ready\n" not in iter(self.process.stdout.readline, ""):
            self._fail()

    def measure(self) -> dict[str, Any]:
        """Lets the process measure, and returns what it found."""
        self.process.communicate("go\n")
        if self.process.returncode:
            self._fail()
        return read_json(self.out)

    def _fail(self) -> None:
        self.process.wait()
        rank = self.spec["lora_rank"]
        last = self.log.read_text(encoding="utf-8").strip().rpartition("\n")[2][:1000]
        raise ValueError(
            f"{'LoRA, rank ' + str(rank) if rank else 'full fine-tuning'} of {self.spec['model']} must be "
            f"measurable on this machine, its process ended with {self.process.returncode}: {last}"
        )

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.communicate()
