"""Rewards of completions: ready ones, a user's own function, or several by their weights. Pure: no torch.

A reward is called as TRL calls its reward functions, with keywords and one item an episode:

    def reward(prompts: list[str], completions: list[str], answer: list[str], **others) -> list[float]

`answer` is the row's completion column: what the reward compares with. Prompts are texts with their special tokens,
completions without.

| name             | 1.0 where (else 0.0)                                                                        |
|------------------|---------------------------------------------------------------------------------------------|
| exact_match      | completion and answer are the same text, but for spaces around it                            |
| numeric_answer   | they end in the same number; of a text with #### (GSM8K) the number behind the last          |
| regex:PATTERN    | the pattern is somewhere in the completion; with a group, what it caught must be the answer  |
| format:PATTERN   | the pattern is the whole completion, but for spaces around it                                |
| FILE.py:FUNCTION, MODULE:FUNCTION | what a function of the user's gives                                         |
"""

import importlib
import importlib.util
import inspect
import math
import numbers
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import ModuleType
from typing import Any

from trainers.credentials import masked
from trainers.data.records import first_line, printable

Score = Callable[[str, str], float]
RewardFunction = Callable[..., Any]

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
FINAL = "####"
"""What GSM8K puts before an answer's number (openai/grade-school-math)."""
PATTERNS = ("regex", "format")


class RewardError(ValueError):
    """A reward that cannot be used, or that failed on episodes; one line."""


def exact_match(completion: str, answer: str) -> float:
    """Whether they are the same text, but for spaces around it."""
    return float(completion.strip() == answer.strip())


def numeric_answer(completion: str, answer: str) -> float:
    """Whether they end in the same number."""
    expected = final_number(answer)
    if expected is None:
        raise RewardError(
            f"numeric_answer: every answer must hold a number, got {printable(answer, 80)!r}"
        )
    return float(final_number(completion) == expected)


def final_number(text: str) -> Decimal | None:
    """The last number of a text, or of what stands behind its last ####; None where there is none."""
    found = NUMBER.findall(text.rpartition(FINAL)[2])
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:
        return None


def _regex(pattern: re.Pattern[str]) -> Score:
    def score(completion: str, answer: str) -> float:
        found = pattern.search(completion)
        if found is None:
            return 0.0
        return exact_match(found[1] or "", answer) if pattern.groups else 1.0

    return score


def _format(pattern: re.Pattern[str]) -> Score:
    return lambda completion, answer: float(pattern.fullmatch(completion.strip()) is not None)


READY: dict[str, Score] = {"exact_match": exact_match, "numeric_answer": numeric_answer}


def _each(score: Score) -> RewardFunction:
    def reward(
        prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str]
    ) -> list[float]:
        return [score(*pair) for pair in zip(completions, answer, strict=True)]

    return reward


class Reward:
    """The weighted sum of one or more named rewards.

    Raises:
        RewardError: a name that means nothing, a pattern, file or function that cannot be used.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.parts = [(name, weight, load_function(name)) for name, weight in weights.items()]

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]
    ) -> list[float]:
        """The reward of each episode.

        Raises:
            RewardError: a function raised, or gave something else than a finite number for each.
        """
        totals = [0.0] * len(completions)
        for name, weight, function in self.parts:
            for at, value in enumerate(_values(name, function, prompts, completions, answers)):
                totals[at] += weight * value
        return totals


def _values(
    name: str,
    function: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    answers: Sequence[str],
) -> list[float]:
    try:
        given: Any = function(
            prompts=list(prompts), completions=list(completions), answer=list(answers)
        )
    except RewardError:
        raise
    except Exception as error:  # the boundary: whatever the user's code raises ends the trial alone
        raise RewardError(
            f"reward {name} raised {type(error).__name__}{_place(error)}: {first_line(error)}"
        ) from error
    if not hasattr(given, "__len__") or isinstance(given, (str, bytes, Mapping)):
        raise RewardError(f"reward {name} must give a list of numbers, gave {_shown(given)}")
    if len(given) != len(completions):
        raise RewardError(
            f"reward {name} must give a number for each of {len(completions)} completions, gave {len(given)}"
        )
    return [_number(name, value) for value in given]


def _number(name: str, value: Any) -> float:
    is_number = isinstance(value, numbers.Real)  # numpy's scalars are registered as such
    if not is_number or not math.isfinite(value):
        raise RewardError(f"reward {name} must give finite numbers, gave {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    return f"{printable(masked(repr(value)), 80)} ({type(value).__name__})"


def _place(error: BaseException) -> str:
    """Where in the user's code it was raised."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return f" at {last.tb_frame.f_code.co_filename}:{last.tb_lineno}" if last else ""


def load_function(name: str) -> RewardFunction:
    """The function that a reward's name means.

    Raises:
        RewardError: as `Reward`.
    """
    if name in READY:
        return _each(READY[name])
    kind, colon, rest = name.partition(":")
    if kind in PATTERNS and colon:
        return _each((_regex if kind == "regex" else _format)(_pattern(name, rest)))
    module, colon, function = name.rpartition(":")
    if not colon or not module or not function.isidentifier():
        raise RewardError(
            f"reward must be one of {', '.join(READY)}, regex:PATTERN, format:PATTERN, FILE.py:FUNCTION or "
            f"MODULE:FUNCTION, got {name!r}"
        )
    return _checked(name, _module(name, module), function)


def _pattern(name: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.DOTALL)
    except re.error as error:
        raise RewardError(f"reward {name}: not a regular expression: {error}") from error


def file_of(name: str) -> str | None:
    """The file that a reward's name means; None where it means none."""
    path, colon, _ = name.rpartition(":")
    is_file = colon and name.partition(":")[0] not in PATTERNS and path.endswith(".py")
    return path if is_file else None


def _module(name: str, module: str) -> ModuleType:
    try:
        if file_of(name) is None:
            return importlib.import_module(module)
        return _from_file(name, Path(module).expanduser())
    except RewardError:
        raise
    except (
        Exception
    ) as error:  # the boundary: a user's module may raise anything while it is imported
        raise RewardError(
            f"reward {name}: {module} cannot be imported: {type(error).__name__}{_place(error)}: {first_line(error)}"
        ) from error


def _from_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise RewardError(f"reward {name}: must be in a file that is there, {path} is none")
    spec = importlib.util.spec_from_file_location(f"tenfold_reward_{path.stem}", path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles of its classes look it up there
    spec.loader.exec_module(module)
    return module


def _checked(name: str, module: ModuleType, function: str) -> RewardFunction:
    found: Any = getattr(module, function, None)
    if not callable(found):
        what = "has no such name" if found is None else f"is a {type(found).__name__}"
        raise RewardError(f"reward {name}: {function} must be a function, {what}")
    try:
        inspect.signature(found).bind(prompts=[], completions=[], answer=[])
    except TypeError as error:
        raise RewardError(
            f"reward {name}: must take (prompts, completions, answer), or these and **others: {error}"
        ) from error
    return found
