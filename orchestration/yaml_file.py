"""A YAML file as plain keys and values, as people mean them: 1e-4 is a number, a key stands once."""

import math
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from trainers.credentials import credential_in

EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$")
MERGE = "tag:yaml.org,2002:merge"
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 1_000_000, 10_000, 20
"""Far beyond any config: what holds more is another file, or means to fill the memory."""
FIRST_SHOWN, LAST_SHOWN = 300, 100
MAX_SHOWN = FIRST_SHOWN + LAST_SHOWN + 5
"""Characters of a long value in a message."""


class ConfigError(ValueError):
    """A sweep.yaml that cannot be used; the message is complete, one line per problem."""


def read_values(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, unchecked.

    Raises:
        ConfigError: no file, not YAML, no mapping, a duplicate key, a tag (!!python/...), more or deeper values
            than a config has, a credential (in a comment, too: the file is copied as it is).
    """
    text = _text_of(path)
    _require_no_credentials(text, path)
    values = _values_of(text, path)
    if (fault := _fault_in(values)) is not None:
        raise ConfigError(f"{path}: {fault}")
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: must hold `key: value` lines (model: ..., data: ...), holds {type(values).__name__}"
        )
    return values


def _values_of(text: str, path: Path) -> Any:
    """Raises ConfigError: not YAML."""
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_yaml_message(error, text)}") from error
    except (ValueError, OverflowError) as error:
        line = loader.line + 1 if loader else 1
        raise ConfigError(
            f"{path}: line {line}: an escape must be the code of a character, at most \\U0010FFFF"
        ) from error
    finally:
        if loader:
            loader.dispose()


def read_value(text: str, where: str) -> Any:
    """A single value as YAML writes it, where 3e-4 is a number.

    Raises:
        ConfigError: not YAML, or a credential.
    """
    if why := credential_in(text):
        raise ConfigError(f"{where}: {why}")
    return _values_of(text, Path(where))


def texts_in(value: Any) -> Iterator[str]:
    """The texts within a value of YAML, keys included, each object once: an alias can name one endlessly."""
    todo, seen = [value], set[int]()
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict | list) and id(one) not in seen:
            seen.add(id(one))
            todo += [*one, *one.values()] if isinstance(one, dict) else one


def _require_no_credentials(text: str, path: Path) -> None:
    lines = enumerate(text.splitlines(), start=1)
    found = [f"{path}:{number}: {why}" for number, line in lines if (why := credential_in(line))]
    if found:
        raise ConfigError("\n".join(found))


def _text_of(path: Path) -> str:
    """Raises ConfigError: no file, or not one of text."""
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"{path}: a config must be at most {MAX_BYTES:,} bytes, has {path.stat().st_size:,}; is it the data?"
            )
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise ConfigError(
            f"{path}: line {line}: must be UTF-8 text, has byte 0x{byte:02X}; save the file as UTF-8"
        ) from error


def _fault_in(value: Any) -> str | None:
    """Why values that were read cannot be used, wherever it stands; None where they can. Values under an alias
    count each time: few lines can stand for more than fits into memory, or for themselves."""
    waiting, num_values = [value], 0
    while waiting:
        item = waiting.pop()
        num_values += 1
        if num_values > MAX_VALUES:
            return (
                f"must hold at most {MAX_VALUES:,} values, holds more (an alias counts each time)"
            )
        if isinstance(item, str) and not item.isascii():
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                return f"must hold Unicode text, holds half a character: {shortened(repr(item))}"
        elif isinstance(item, dict):
            waiting += (*item.keys(), *item.values())
        elif isinstance(item, list):
            waiting += item
    return None


def shortened(text: str) -> str:
    """A text as a message shows it: the middle of a long one left out."""
    return text if len(text) <= MAX_SHOWN else f"{text[:FIRST_SHOWN]} ... {text[-LAST_SHOWN:]}"


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (1e-4 is a number), dates as text, no tags, no duplicate keys."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            # Each would need its own rules for what does not fit it; a config needs none.
            raise yaml.MarkedYAMLError(
                None,
                None,
                f"tags are not read, found {event.tag!r}; write the value alone",
                event.start_mark,
            )
        if self.depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                None, None, f"must be nested at most {MAX_DEPTH} deep", event.start_mark
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                raise yaml.MarkedYAMLError(
                    None, None, "merges (<<) are not read; write the keys out", key_node.start_mark
                )
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                continue  # the base class says so
            if key in seen:
                raise yaml.MarkedYAMLError(
                    None, None, f"duplicate key {shortened(repr(key))}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        value = float(self.construct_scalar(node))
        if not math.isfinite(value):
            raise yaml.MarkedYAMLError(None, None, "a number must be finite", node.start_mark)
        return value

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        try:
            value = self.construct_yaml_int(node)
            str(value)  # 0x and many digits can be read and not be shown
        except ValueError as error:  # 0x_, or more digits than Python takes
            raise yaml.MarkedYAMLError(
                None, None, f"must be a number, got {node.value}", node.start_mark
            ) from error
        return value


_Loader.add_constructor("!exponent", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("!exponent", EXPONENT, list("-+0123456789"))


def _yaml_message(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: must be text, has the control character #x{error.character:04x}"
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None:
        return str(error).splitlines()[0]
    return f"line {mark.line + 1}: {shortened(str(problem))}"
