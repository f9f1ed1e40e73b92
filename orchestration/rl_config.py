"""What sweep.yaml says of reinforcement learning, checked and with its defaults. Imports neither torch nor ray."""

from typing import TYPE_CHECKING

from orchestration.choice_config import MAX_COMPLETION_LENGTH, asks_answers

if TYPE_CHECKING:
    from orchestration.config import SweepConfig
    from trainers.rl_spec import RLSpec

RL_KEYS = ("reward", "num_generations", "max_completion_length", "temperature")
NUM_GENERATIONS, TEMPERATURE = 8, 1.0
"""TRL's defaults of GRPOConfig, under its names (1.16)."""
SFT_ONLY = {
    "packing": False,
    "group_by_length": False,
    "capacity": "doctrine",
    "dataset_tokens": None,
}
"""Keys that mean nothing where data are prompts, with the value that says nothing."""


def require_method_keys(config: "SweepConfig") -> None:
    """Raises:
    ValueError: a key of the other method, or one that the method cannot do without.
    """
    if config.method == "sft":
        given = [key for key in RL_KEYS if getattr(config, key) is not None]
        if given and not (given == ["max_completion_length"] and asks_answers(config)):
            raise ValueError(f"{given[0]} is for method: rl, got method sft; set method: rl")
        return
    for key, nothing in SFT_ONLY.items():
        if (value := getattr(config, key)) != nothing:
            raise ValueError(f"{key} is for method: sft, got {value!r} with method rl; {_WHY[key]}")
    if config.data is None and config.examples is None:
        raise ValueError(
            "method: rl without data needs examples (the prompts of a trial), to count its episodes"
        )
    if config.data is not None and config.reward is None:
        raise ValueError(
            "method: rl needs a reward: exact_match, numeric_answer, regex:PATTERN, format:PATTERN, FILE.py:FUNCTION "
            "or MODULE:FUNCTION"
        )
    if config.strategy == "zero3":
        raise ValueError(
            "method: rl needs a whole base on each worker, which samples token by token, got strategy zero3; set "
            "strategy: ddp or single"
        )
    rates = config.dropout if isinstance(config.dropout, list) else [config.dropout]
    if any(rates):
        raise ValueError(
            f"dropout must be 0 with method rl, got {config.dropout}: the policy that learns would be another than the "
            "one that sampled"
        )


_WHY = {
    "packing": "an episode is a sequence of its own; leave it out",
    "group_by_length": "episodes are as long as the policy makes them; leave it out",
    "capacity": "an episode brings 1 bit; leave it out",
    "dataset_tokens": "episodes count, not tokens; give examples",
}


def generations_of(config: "SweepConfig") -> int:
    """Completions of a prompt; of supervised fine-tuning 1: a row is trained as it is."""
    return 1 if config.method == "sft" else config.num_generations or NUM_GENERATIONS


def completion_length_of(config: "SweepConfig") -> int:
    """Tokens that a policy may add to a row's prompt; 0 for supervised fine-tuning."""
    return 0 if config.method == "sft" else config.max_completion_length or MAX_COMPLETION_LENGTH


def rl_spec(config: "SweepConfig") -> "RLSpec | None":
    """What a trial is told of episodes and rewards; None for supervised fine-tuning."""
    if config.method == "sft":
        return None
    from trainers.rl_spec import RLSpec  # a plan without rewards need not pay for them

    given = config.reward or {}
    return RLSpec(
        reward={given: 1.0} if isinstance(given, str) else given,
        num_generations=generations_of(config),
        max_completion_length=completion_length_of(config),
        temperature=config.temperature or TEMPERATURE,
    )
