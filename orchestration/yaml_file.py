"""A YAML file as plain keys and values, as people mean them: 1e-4 is a number, a key stands once."""

import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$")


class ConfigError(ValueError):
    """A sweep.yaml that cannot be used; the message is complete, one line per problem."""


def read_values(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, unchecked.

    Raises:
        ConfigError: no file, not YAML, no mapping, a duplicate key.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {_yaml_message(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: must hold `key: value` lines (model: ..., data: ...), holds {type(values).__name__}"
        )
    return values


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (1e-4 is a number) and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                continue  # the base class says so
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        value = float(self.construct_scalar(node))
        if not math.isfinite(value):
            raise yaml.constructor.ConstructorError(
                None, None, "a number must be finite", node.start_mark
            )
        return value


_Loader.add_constructor("!exponent", _Loader.construct_number)
_Loader.add_implicit_resolver("!exponent", EXPONENT, list("-+0123456789"))


def _yaml_message(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None:
        return str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem}"
