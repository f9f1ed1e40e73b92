"""ModelShape: what a model's config.json alone says about its adaptable matrices."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from search_spaces.config_fields import ShapeFields, UnknownArchitectureError
from search_spaces.doctrine import COMPONENTS, expert_rank
from search_spaces.families import read_config
from search_spaces.linear_shape import LinearShape
from search_spaces.variants import DORA, PLAIN, parts_of, stored_rank

__all__ = ["COMPONENTS", "LinearShape", "ModelShape", "UnknownArchitectureError", "lora_num_params"]

Target = str | Sequence[str]


def lora_num_params(
    linears: Iterable[LinearShape], lora_rank: int, num_active_experts: int = 0
) -> int:
    """Exact number of LoRA parameters on the given matrices.

    Args:
        linears: dense matrices get lora_rank, each expert's matrix gets lora_rank // active.
        lora_rank: nominal rank, >= 1.
        num_active_experts: experts that a token uses; only needed where there are experts.

    Raises:
        ValueError: lora_rank < 1.

    Source: docs/doctrine.md, section 3: r x (in + out) per matrix; experts are the fused scheme, gate
        and up being one matrix hidden -> 2m, at rank max(1, lora_rank // active).
    """
    if lora_rank < 1:
        raise ValueError(f"lora_rank must be >= 1, got {lora_rank}; set lora_rank: 16")
    total = 0
    for linear in linears:
        is_expert = linear.component == "experts"
        rank = expert_rank(lora_rank, num_active_experts) if is_expert else lora_rank
        total += rank * (linear.in_features + linear.out_features) * linear.count
    return total


@dataclass(frozen=True, kw_only=True)
class ModelShape(ShapeFields):
    """A model's sizes and its adaptable matrices, without the model.

    Attributes:
        model_type: as in config.json.
        hidden_size: width of the residual stream.
        num_layers: decoder layers.
        vocab_size: rows of the embedding.
        max_position_embeddings: longest context in tokens; None if the config does not say.
        num_experts: experts per sparse layer, 0 for a dense model.
        num_active_experts: experts that a token uses, 0 for a dense model.
        tied_head: the unembedding shares the embedding's weights. An adapter on it is counted
            (and must not touch the embedding); its base weights are not counted twice.
        linears: the adaptable matrices. 'mlp' is dense MLP, also that of a MoE model's dense
            layers; routers are never adapted. Of a multimodal model only the language model.
        embedding_params: parameters of token and learned position embeddings.
        other_params: parameters of norms, biases, routers and attention sinks.
        is_from_model: read from the model that transformers builds without weights, as its type has no reader.
    """

    is_from_model: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, object] | str | Path) -> "ModelShape":
        """The shape that a config describes.

        Args:
            config: a parsed config.json, its path, or a folder that holds it.

        Raises:
            UnknownArchitectureError: a model_type that has no reader; use `from_linears`.
            ValueError: no such file, not JSON, or a size that is not an integer >= 1.
        """
        if isinstance(config, (str, Path)):
            config = _load_config(Path(config))
        return cls(**vars(read_config(config)))

    @classmethod
    def from_linears(
        cls,
        linears: Iterable[LinearShape],
        *,
        model_type: str,
        hidden_size: int,
        num_layers: int,
        vocab_size: int,
        tied_head: bool,
        embedding_params: int,
        other_params: int,
        max_position_embeddings: int | None = None,
        num_experts: int = 0,
        num_active_experts: int = 0,
        is_from_model: bool = False,
    ) -> "ModelShape":
        """A shape from matrices that were read from a model (trainers, on the meta device).

        Args are the attributes of the class; embedding_params and other_params make num_params.

        Raises:
            ValueError: no linears, or experts without an active count.
        """
        linears = tuple(linears)
        has_experts = any(linear.component == "experts" for linear in linears)
        if not linears or (has_experts and num_active_experts < 1):
            raise ValueError(
                "linears must not be empty, and experts need num_active_experts >= 1, got "
                f"{len(linears)} linears and num_active_experts {num_active_experts}"
            )
        return cls(
            model_type=model_type,
            hidden_size=hidden_size,
            num_layers=num_layers,
            vocab_size=vocab_size,
            max_position_embeddings=max_position_embeddings,
            num_experts=num_experts,
            num_active_experts=num_active_experts,
            tied_head=tied_head,
            linears=linears,
            embedding_params=embedding_params,
            other_params=other_params,
            is_from_model=is_from_model,
        )

    @property
    def num_params(self) -> int:
        """All parameters, embeddings and all experts counted, a tied head once.

        Not counted: vision tower and projector of a multimodal model.
        """
        weights = sum(
            linear.num_params
            for linear in self.linears
            if not (self.tied_head and linear.component == "unembed")
        )
        return weights + self.embedding_params + self.other_params

    @property
    def components(self) -> tuple[str, ...]:
        """The components that this model has, in the doctrine's order."""
        present = {linear.component for linear in self.linears}
        return tuple(name for name in COMPONENTS if name in present)

    def normalize_target(self, target: Target) -> tuple[str, ...]:
        """The target's names as this model has them, each once, in a fixed order.

        Args:
            target: component names and/or module names, as a list or joined by '+'. A module
                name is a name in `linears` or a dotted suffix of one ('c_proj' is both of
                GPT-2's). All four components together are the doctrine's 'all layers': of them,
                and only of them, those that the model lacks are left out ('experts' in a dense
                model, 'mlp' where every layer has experts).

        Raises:
            ValueError: an empty target, an unknown name, or a component that the model lacks.
        """
        names = target.split("+") if isinstance(target, str) else list(target)
        names = [name.strip() for name in names]
        if not names:
            raise ValueError(
                f"target must name at least one layer, got {target!r}; {self._legal()}"
            )
        if set(names) == set(COMPONENTS):
            return self.components
        for name in names:
            if not self._matches(name):
                raise ValueError(self._no_match(name))
        order = {name: index for index, name in enumerate(COMPONENTS)}
        return tuple(sorted(set(names), key=lambda name: (order.get(name, len(order)), name)))

    def resolve_target(self, target: Target) -> tuple[LinearShape, ...]:
        """The matrices that a target selects, in the model's order; see `normalize_target`.

        Raises:
            ValueError: as `normalize_target`.
        """
        chosen = {
            linear for name in self.normalize_target(target) for linear in self._matches(name)
        }
        return tuple(linear for linear in self.linears if linear in chosen)

    def lora_params(self, lora_rank: int, components: Target = COMPONENTS) -> int:
        """Exact number of LoRA parameters of an adapter.

        Args:
            lora_rank: nominal rank, >= 1; an expert gets max(1, lora_rank // active experts).
            components: components that are counted, absent ones as zero; or any target that
                `resolve_target` accepts.

        Raises:
            ValueError: lora_rank < 1 or an unknown name.
        """
        names = components.split("+") if isinstance(components, str) else components
        if all(name in COMPONENTS for name in names):
            linears = [linear for linear in self.linears if linear.component in names]
        else:
            linears = self.resolve_target(components)
        return lora_num_params(linears, lora_rank, self.num_active_experts)

    def held_params(self, lora_rank: int, target: Target, variant: str = PLAIN) -> int:
        """Exact number of parameters that an adapter holds and saves: those of `lora_params`, twice of a
        PiSSA (as many are frozen), and an output's magnitude each of a DoRA.

        Raises:
            ValueError: as `lora_params`.
        """
        frozen = self.lora_params(stored_rank(lora_rank, variant), target)
        frozen -= self.lora_params(lora_rank, target)
        return self.trained_params(lora_rank, target, variant) + frozen

    def trained_params(self, lora_rank: int, target: Target, variant: str = PLAIN) -> int:
        """Exact number of parameters of an adapter that get gradients: those of `lora_params`, and a
        DoRA's magnitudes."""
        trained = self.lora_params(lora_rank, target)
        if DORA not in parts_of(variant):
            return trained
        return trained + sum(one.out_features * one.count for one in self.resolve_target(target))

    def max_useful_lora_rank(self, components: Target = COMPONENTS) -> int:
        """Largest nominal rank that can matter: the smallest side of the adapted matrices.

        An expert's rank is the nominal one divided by the active count, so its sides count times
        that. Source: a product of two factors has at most the rank of the matrix it adds to.

        Raises:
            ValueError: as `resolve_target`.
        """
        return min(
            linear.smallest_side * (self.num_active_experts if linear.component == "experts" else 1)
            for linear in self.resolve_target(components)
        )

    def _matches(self, name: str) -> list[LinearShape]:
        if name in COMPONENTS:
            return [linear for linear in self.linears if linear.component == name]
        # The exact name wins: 'down_proj' of a MoE model's dense layers is not 'experts.down_proj'.
        exact = [linear for linear in self.linears if linear.name == name]
        return exact or [linear for linear in self.linears if linear.name.endswith(f".{name}")]

    def _legal(self) -> str:
        names = [*self.components, *dict.fromkeys(linear.name for linear in self.linears)]
        return f"legal for {self.model_type}: {', '.join(names)}"

    def _no_match(self, name: str) -> str:
        if name in COMPONENTS:
            return (
                f"target {name!r} matches no layer of this {self.model_type} model, which has "
                f"{', '.join(self.components)}; leave {name!r} out"
            )
        legal = [*COMPONENTS, *(linear.name for linear in self.linears)]
        close = difflib.get_close_matches(name, legal, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"target {name!r} matches no layer; {hint}{self._legal()}"


def _load_config(path: Path) -> Mapping[str, object]:
    file = path / "config.json" if path.is_dir() else path
    try:
        parsed = cast(object, json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(
            f"{file}: no such file; give a config.json or a folder that holds it"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: must be JSON, got {error}; mend the file") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{file}: must hold a JSON object, got {type(parsed).__name__}")
    return cast(dict[str, object], parsed)
