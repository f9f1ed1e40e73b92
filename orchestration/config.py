"""sweep.yaml: what a user may write, with one line of meaning per key."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from orchestration.choice_config import (
    check_metric,
    check_select,
    require_choice_keys,
    seconds_of,
    task_spec,
)
from orchestration.config_checks import (
    check_data,
    check_prior,
    check_reward,
    check_texts,
    has_switch,
    require_strategy,
)
from orchestration.config_problems import credential_lines, problem_lines, unknown_key
from orchestration.config_types import CarriedFrom, Fraction01, LogRange, Positive, PositiveInt
from orchestration.rl_config import require_method_keys, rl_spec
from orchestration.yaml_file import ConfigError, read_values
from search_spaces.values import MAX_POINTS, check_sizes, parse_domain, parse_targets
from trainers.object_store import checked_url, is_url

COUNTS = ("lora_rank", "global_batch_size", "examples", "seed", "dataset_tokens")
MAYBE_SWITCHES = ("gradient_checkpointing",)
"""Keys that are true, false or a word."""
MAX_CANDIDATES = 100_000
"""Planned in 10 seconds. What holds more is a slip of the pen: nobody trains it."""
MAX_NAME_BYTES = 200
"""File systems take 255, of which trials and temporary files need some."""
FOLDER_NAME = re.compile(r"\w[\w.+-]*")


class SweepConfig(BaseModel):
    """A sweep. Keys that are None take the doctrine's default, which `tenfold plan` prints."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    # Model and data
    model: str
    """Folder, hub id, or (for plan) a config.json."""
    data: str | dict[str, float] | None = None
    """File, folder or hub id, or several with weights: {a.jsonl: 1, b.jsonl: 0.5}; dataset_tokens
    instead is enough for plan."""
    name: str | None = None
    """Folder name under runs/; default: model and data."""
    revision: str | None = None
    """Hub revision of the model."""
    columns: dict[str, str] | None = None
    """Column map, e.g. {prompt: question, completion: answer}."""
    format: str | None = None
    """Row shape, when the first row does not tell."""
    chat_template: str | None = None
    """Jinja file, for a base that has no chat template."""
    data_revision: str | None = None
    """Hub revision of the data."""
    bad_rows: Literal["error", "drop"] = "error"
    """Rows that cannot be used stop the sweep, or are left out and counted."""
    system_role: Literal["template", "fold"] = "template"
    """A leading system message goes to the chat template, or is folded into the first user turn."""
    packing: bool = False
    """Several examples in one sequence of seq_len, without attention across them. What examples,
    eval_every, grace_period and global_batch_size count is then a sequence."""
    group_by_length: bool = False
    """Batches of examples of similar length."""
    retention: str | None = None
    """General text (file, folder or hub id) whose loss is logged beside eval_loss; never trained."""
    dataset_tokens: PositiveInt | None = None
    """Loss-bearing tokens of one epoch, instead of data."""

    # Reinforcement learning
    method: Literal["sft", "rl"] = "sft"
    """Supervised fine-tuning, or reinforcement learning: what examples, global_batch_size, eval_every and
    grace_period count is then a prompt, of which num_generations episodes are made."""
    reward: str | dict[str, float] | None = None
    """What an episode earns: exact_match, numeric_answer, regex:PATTERN, format:PATTERN, FILE.py:FUNCTION or
    MODULE:FUNCTION; or several with weights: {numeric_answer: 1, "format:.*####.*": 0.1}."""
    num_generations: Annotated[int, Field(ge=2)] | None = None
    """Completions sampled for each prompt; an episode is worth what it earns above their mean. Default: 8."""
    max_completion_length: PositiveInt | None = None
    """Tokens of a completion; default: 256."""
    temperature: Positive | None = None
    """That the policy samples at; default: 1."""

    # Search space
    lora_rank: int | list[int] | LogRange | None = None
    """Default: the doctrine's range for the model's size, higher where the data need it."""
    learning_rate: float | list[float] | LogRange | None = None
    """Default: log-spaced points around the prior (lr_prior)."""
    global_batch_size: int | list[int] | LogRange | None = None
    """Examples of a step, over all workers. Default: the doctrine's small batches."""
    lora_alpha: float | str | list[float | str] | LogRange | None = None
    """A number, or a rule: rank, 2*rank. Learning rates that are not given are rescaled for a rule."""
    variant: str | list[str] = "lora"
    """lora, rslora, dora, lora_plus or pissa, or several joined by +; each with its own learning rates."""
    target: str | list[str] | list[list[str]] | None = None
    """Components (attn, mlp, experts, unembed) or layer names; a list of lists sweeps over them."""
    lr_prior: Literal["doctrine", "tinker"] | Positive | CarriedFrom = "doctrine"
    """A law, the LoRA learning rate itself, or {from: runs/SMALL}: a finished sweep or study whose best
    learning rate is carried to this model's width."""
    size_class: str | None = None
    """Row of the doctrine's rank table, e.g. 7-8B; default: by parameter count."""
    full_ft_learning_rate: Positive | None = None
    """A known full-fine-tuning learning rate; the LoRA prior is 10x it."""
    capacity: Literal["doctrine", "measured"] | Positive = "doctrine"
    """Bits per loss-bearing token; doctrine: 1; measured: the base's loss on a sample of the data."""
    capacity_policy: Literal["discard", "advisory"] = "discard"
    """Candidates that cannot hold the data are discarded before they run, or only said to be such."""

    # Search and early stopping
    search: Literal["grid", "random", "optuna"] = "grid"
    """Every candidate of the space, some drawn at random, or some that Optuna proposes."""
    num_candidates: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] | None = None
    """Candidates to draw (random), to propose (optuna), or to keep of the grid, the doctrine's centre
    first."""
    scheduler: Literal["asha", "fifo", "median"] = "asha"
    """What stops trials early: successive halving (asha), the median of the others, or nothing (fifo)."""
    grace_period: PositiveInt | None = None
    """Examples that every trial sees before it may be stopped; default: a quarter of the budget."""
    reduction_factor: Annotated[int, Field(ge=2)] = 4
    """Of asha: one in so many goes on to the next rung."""

    # Budget, rows and evaluation
    epochs: Positive | None = None
    """Budget of a trial; default: 1."""
    examples: PositiveInt | None = None
    """Budget of a trial, instead of epochs."""
    seq_len: Annotated[int, Field(ge=2)] | None = None
    """Longest row in tokens (max_length); default: the model's, at most 1024."""
    truncation: Literal["drop", "cut"] = "drop"
    """What happens to a longer row."""
    eval: Annotated[float, Field(gt=0, lt=1)] | str = 0.05
    """Held-out fraction, by content hash, or a file."""
    eval_every: PositiveInt | None = None
    """Examples between evaluations; default: a quarter of the budget."""

    # Training
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate, after the warmup."""
    warmup: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Below 1 a fraction of the steps, else steps."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Of AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Longer gradients are scaled down to it; 0: never."""
    dropout: Fraction01 | list[Fraction01] = 0.0
    """Of the adapter's input."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of everything that is drawn: adapters, the order of the data, dropout, a random search."""

    # Hardware and placement
    quantization: Literal["nf4", "none"] = "nf4"
    """Of the frozen base: 4 bits (QLoRA), or none."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the GPU has it, else fp32."""
    strategy: Literal["auto", "single", "ddp", "zero3"] = "auto"
    """How the workers of a pack share it: single: one worker; ddp: the whole base on each; zero3: each
    holds its part of the base. auto: the simplest that fits the memory."""
    workers_per_trial: PositiveInt | Literal["auto"] = "auto"
    """Workers that train one pack (engine solo: one trial); auto: from the plan."""
    gradient_checkpointing: Literal["auto"] | StrictBool = "auto"
    """Layers are computed again in the backward pass; auto: where memory is short."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores that a worker reserves."""
    gpus_per_worker: Literal["auto", 0, 1] | Annotated[float, Field(gt=0, lt=1)] = "auto"
    """auto: 1 where the cluster has GPUs; 0.25: four small trainings share one."""
    micro_batch_size: PositiveInt | None = None
    """Most rows of one adapter in a forward; default: as many as the forward's tokens allow."""
    engine: Literal["packed", "solo"] = "packed"
    """packed: warm workers train many adapters at once; solo: every trial on workers of its own."""
    inventory: str | None = None
    """GPUs to plan for, e.g. 8xH100-80GB or 2x8xA100-40GB; default: those of this machine or cluster."""
    price_per_gpu_hour: Positive | None = None
    """What an hour of one GPU costs, in the user's currency: the plan then names a price."""
    pack_size: PositiveInt | None = None
    """Adapters of a worker group; default: from memory and measured step time."""

    # Where it runs and what it writes
    address: str | None = None
    """A running Ray cluster; default: a local one is started."""
    storage: str = "runs"
    """Folder that holds runs/NAME, shared by all nodes of a cluster, or a URL (s3://BUCKET/runs, gs://...)."""
    tracking: list[Literal["wandb", "tensorboard"]] = []
    """Where metrics are also logged; wandb without a key writes offline."""

    # Choosing, and when to stop
    metric: str | dict[str, float] = "eval_loss"
    """What trials are judged by: eval_loss, bits_per_byte, or what the answers to held-out rows earn, named as for
    reward: exact_match, numeric_answer, regex:PATTERN, ..., or several with weights."""
    metric_rows: PositiveInt | None = None
    """Held-out rows that are answered at each evaluation for a metric of answers; default: 128."""
    select: str = "best"
    """best, or lowest_lr_within 0.5%: of the trials that are worse than the best by no more, the one with the lowest
    learning rate."""
    max_forgetting: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Most that retention_loss may have risen over the base's, nats/token, in an evaluation that is chosen."""
    confirm: Annotated[int, Field(ge=0, le=MAX_POINTS)] = 0
    """New seeds, at least 2, on which the best two candidates are trained again before one is chosen."""
    time_budget: str | None = None
    """What training may take, as 90m, 2h or 1h30m, over all resumes; then the best so far is kept."""
    max_cost: Positive | None = None
    """What the GPUs may cost at price_per_gpu_hour; then the best so far is kept."""

    @field_validator("tracking", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("*", mode="before")
    @classmethod
    def _checked(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would take `yes` for 1, and report one problem per alternative of a union.
        key = str(info.field_name)
        check_sizes(key, value)
        if key == "lr_prior":
            check_prior(value)  # before what is said of any text: it shows the right form
        if key != "columns":  # a header of a csv file may have several lines
            check_texts(key, value)
        is_switch = cls.model_fields[key].annotation is bool
        if has_switch(value) != is_switch and key not in MAYBE_SWITCHES:
            must = "must" if is_switch else "must not"
            raise ValueError(f"{key} {must} be true or false, got {value!r}")
        if key == "data":
            check_data(value)
        if key in ("reward", "metric"):
            check_reward(key, value)
        if key == "metric":
            check_metric(value)
        if key in COUNTS:
            value = _whole(value)
        if value is not None and key == "target":
            parse_targets(value)
        elif value is not None and key in SPACE_KEYS:
            parse_domain(key, value)
        return value

    @field_validator("storage")
    @classmethod
    def _folder(cls, value: str) -> str:
        return checked_url(value) if is_url(value) else value

    @field_validator("select")
    @classmethod
    def _choice(cls, value: str) -> str:
        check_select(value)
        return value

    @field_validator("time_budget")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None:
            seconds_of(value)
        return value

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value: str | None) -> str | None:
        if value is not None and not FOLDER_NAME.fullmatch(value):
            raise ValueError(
                f"name must be a folder name (letters, digits, . _ + -; no path), got {value!r}"
            )
        if value is not None and len(value.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"name must be of at most {MAX_NAME_BYTES} bytes, got {value!r}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "SweepConfig":
        require_method_keys(self)
        require_choice_keys(self)
        if self.method == "sft" and (self.data is None) == (self.dataset_tokens is None):
            raise ValueError(
                "give data (a file, folder or hub id), or instead dataset_tokens for plan alone"
            )
        if self.epochs is not None and self.examples is not None:
            raise ValueError("give epochs or examples, not both")
        share, workers = self.gpus_per_worker, self.workers_per_trial
        if share != "auto" and 0 < share < 1 and workers != "auto" and workers > 1:
            raise ValueError(
                f"gpus_per_worker below 1 is for one worker a trial, got {share} and workers_per_trial "
                f"{workers}; two workers of one trial cannot share a GPU"
            )
        require_strategy(self)
        if self.search != "grid" and self.num_candidates is None:
            raise ValueError(f"search: {self.search} needs num_candidates")
        return self


SPACE_KEYS = (
    "lora_rank",
    "learning_rate",
    "global_batch_size",
    "lora_alpha",
    "variant",
    "target",
    "lr_schedule",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "dropout",
    "seed",
    "epochs",
    "examples",
)


def values_of(key: str, given: Any) -> tuple[Any, ...]:
    """The values that a user gave a key of the search space: one, a list, or a range's points."""
    value = vars(given) if isinstance(given, LogRange) else given
    return parse_domain(key, value).values()


def _whole(value: Any) -> Any:
    """2.0e9 is how people write a count; YAML makes it a float."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def local_inputs(config: SweepConfig) -> list[str]:
    """What a sweep reads of this machine's disk beside its model, so that workers elsewhere must find it."""
    data = [config.data] if isinstance(config.data, str) else list(config.data or {})
    held_out = [config.eval] if isinstance(config.eval, str) else []
    spec = rl_spec(config) or task_spec(config)
    rewards = spec.files if spec else []
    return local_files([*data, *held_out, config.retention, config.chat_template, *rewards])


def local_files(names: Iterable[str | None]) -> list[str]:
    """Those names that are paths here; a hub id is fetched by whoever wants it."""
    return [name for name in names if name and Path(name).expanduser().exists()]


def space_overrides(config: SweepConfig) -> dict[str, Any]:
    """The keys of the search space that the user wrote, as `build_space` takes them."""
    dumped = config.model_dump(include=set(SPACE_KEYS), exclude_unset=True)
    return {key: value for key, value in dumped.items() if value is not None}


def load_config(path: Path, **flags: Any) -> SweepConfig:
    """Reads a sweep.yaml; flags that are not None (from the command line) win over the file.

    Raises:
        ConfigError: not YAML, a duplicate or unknown key, a value out of range; all problems at once.
    """
    values = read_values(path)
    values |= {key: value for key, value in flags.items() if value is not None}
    return make_config(values, str(path))


Config = TypeVar("Config", bound=SweepConfig)


def make_config(values: dict[str, Any], where: str, kind: type[Config] = SweepConfig) -> Config:
    """A checked config from plain values.

    Args:
        kind: SweepConfig, or a study's.

    Raises:
        ConfigError: as `load_config`.
    """
    if secrets := list(credential_lines(values)):
        raise ConfigError("\n".join(f"{where}: {line}" for line in secrets))
    known_keys = tuple(kind.model_fields)
    unknown = [unknown_key(key, where, known_keys) for key in values if key not in known_keys]
    known = {key: value for key, value in values.items() if key in known_keys}
    try:
        config = kind.model_validate(known)
    except ValidationError as error:
        raise ConfigError("\n".join([*unknown, *problem_lines(error, where)])) from error
    if unknown:
        raise ConfigError("\n".join(unknown))
    return config
