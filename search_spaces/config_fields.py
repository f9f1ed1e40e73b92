"""Reading config.json: typed access to its keys, and the record that a reader returns."""

from collections.abc import Mapping
from dataclasses import dataclass

from search_spaces.linear_shape import LinearShape

Config = Mapping[str, object]


class UnknownArchitectureError(ValueError):
    """A model_type that no reader knows: its shape must be read from the model itself."""


@dataclass(frozen=True, kw_only=True)
class ShapeFields:
    """What a reader knows of a model; the fields are those of `ModelShape`."""

    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_position_embeddings: int | None
    num_experts: int
    num_active_experts: int
    tied_head: bool
    linears: tuple[LinearShape, ...]
    embedding_params: int
    other_params: int


def size(config: Config, key: str, default: object) -> int:
    """An integer >= 1; ValueError otherwise."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{key} in config.json must be an integer >= 1, got {value!r}; mend the file"
        )
    return value


def optional_size(config: Config, key: str, default: object) -> int | None:
    """An integer >= 1, or None where the file says null (or nothing, with default None)."""
    value = config.get(key, default)
    return None if value is None else size(config, key, default)


def flag(config: Config, key: str, default: bool) -> bool:
    """A boolean; null is false, as in transformers."""
    value = config.get(key, default)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ValueError(
            f"{key} in config.json must be true or false, got {value!r}; mend the file"
        )
    return value


def lm_head(hidden_size: int, vocab_size: int) -> LinearShape:
    """The unembedding."""
    return linear("lm_head", hidden_size, vocab_size, "unembed", 1)


def linear(name: str, n_in: int, n_out: int, component: str, count: int) -> LinearShape:
    """A LinearShape from positional sizes, as the readers' tables hold them."""
    return LinearShape(
        name=name, in_features=n_in, out_features=n_out, component=component, count=count
    )
