"""Loads a sharded base layer by layer: no worker ever holds much more than its part, what stands outside the
layers (embedding, head), and one layer.

Each layer is loaded by transformers itself, as a model of one layer, so that quantization and the renaming
of checkpoints (fused experts, say) are its own.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from trainers.base_model import meta_model, true_shape
from trainers.decoder import decoder_layers
from trainers.sharding import shard_module

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL_VOCABULARY = 8
"""Rows of the embedding that stands beside a single layer, and is thrown away."""


class WeightFiles:
    """The tensors of a model's safetensors files, by name; read when they are asked for."""

    def __init__(self, model: str, revision: str | None) -> None:
        self.model, self.revision = model, revision
        index = self._file(INDEX)
        if index is not None:
            names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            paths = {name: self._listed(name) for name in sorted(set(names.values()))}
        elif (single := self._file(WEIGHTS)) is not None:
            paths = {WEIGHTS: single}
            with safe_open(single, "pt") as file:
                names = dict.fromkeys(file.keys(), WEIGHTS)
        else:
            raise ValueError(f"model {model!r} must hold {WEIGHTS} or {INDEX}, it holds neither")
        self.path_of = {name: paths[file] for name, file in names.items()}

    def _file(self, name: str) -> Path | None:
        found = cached_file(
            self.model, name, revision=self.revision, _raise_exceptions_for_missing_entries=False
        )
        return Path(found) if found else None

    def _listed(self, name: str) -> Path:
        path = self._file(name)
        if path is None:
            raise ValueError(f"model {self.model!r}: {INDEX} names {name}, which is not there")
        return path

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors."""
        by_path: dict[Path, list[str]] = {}
        for name in names:
            by_path.setdefault(self.path_of[name], []).append(name)
        found: dict[str, torch.Tensor] = {}
        for path, wanted in by_path.items():
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name) for name in wanted}
        return found


class LayerLoader:
    """Loads the parts of one model, as models of one layer.

    Args:
        skeleton: the whole architecture on the meta device.
        options: what `from_pretrained` is given beside config and weights.
    """

    def __init__(
        self, files: WeightFiles, skeleton: PreTrainedModel, options: dict[str, Any]
    ) -> None:
        self.files, self.skeleton, self.options = files, skeleton, options
        self.list_name, layers = decoder_layers(skeleton)
        self.num_layers = len(layers)
        last = re.escape(self.list_name.rsplit(".", 1)[-1])
        self.layer_name = re.compile(rf"((?:^|\.){last}\.)(\d+)(\.)")

    def outer(self) -> PreTrainedModel:
        """Everything but the layers, and the first layer."""
        inner = {n for n in self.files.path_of if self._layer_of(n) not in (None, 0)}
        tensors = self.files.tensors(self.files.path_of.keys() - inner)
        return self._load(one_layer_config(self.skeleton.config, 0), tensors)

    def layer(self, index: int) -> nn.Module:
        """One layer."""
        config = self._config_of(index)
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            _without_vocabulary(part)
        names = [name for name in self.files.path_of if self._layer_of(name) == index]
        if not names:
            raise ValueError(
                f"model {self.files.model!r} must hold weights of layer {index}, it has none"
            )
        tensors = {
            self.layer_name.sub(r"\g<1>0\g<3>", name, count=1): tensor
            for name, tensor in self.files.tensors(names).items()
        }
        return decoder_layers(self._load(config, tensors))[1][0]

    def _config_of(self, index: int) -> PretrainedConfig:
        """The config of a model whose one layer is made as layer `index` is: where dense and sparse layers
        are mixed, a config says it by the layer's number."""
        wanted = _module_names(decoder_layers(self.skeleton)[1][index])
        found: set[str] = set()
        for changes in KINDS:
            config = one_layer_config(self.skeleton.config, index)
            text = config.get_text_config()
            for key in changes.keys() & vars(text).keys():
                setattr(text, key, changes[key])
            found = _module_names(decoder_layers(meta_model(config))[1][0])
            if found == wanted:
                return config
        raise ValueError(_unlike(f"{self.list_name}.{index}", wanted ^ found))

    def _layer_of(self, name: str) -> int | None:
        found = self.layer_name.search(name)
        return int(found.group(2)) if found else None

    def _load(self, config: PretrainedConfig, tensors: dict[str, torch.Tensor]) -> PreTrainedModel:
        level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # it would report the embedding that we left out
        try:
            return type(self.skeleton).from_pretrained(
                None, config=config, state_dict=tensors, **self.options
            )
        finally:
            transformers_logging.set_verbosity(level)


def load_sharded(
    model: str,
    revision: str | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: BitsAndBytesConfig | None,
    check: Callable[[nn.Module], None],
) -> PreTrainedModel:
    """The model with every worker's part of its weights, frozen and in eval mode.

    Args:
        check: looks at each part before it is sharded.

    Raises:
        ValueError: no safetensors, or layers that cannot be loaded one by one.
    """
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if quantization is not None:
        options["quantization_config"] = quantization
    skeleton = meta_model(config)
    loader = LayerLoader(WeightFiles(model, revision), skeleton, options)
    whole = loader.outer()
    check(whole)
    shard_module(whole)
    layers = [decoder_layers(whole)[1][0]]
    for index in range(1, loader.num_layers):
        layer = skeleton.get_submodule(f"{loader.list_name}.{index}")
        fill(layer, loader.layer(index), f"{loader.list_name}.{index}")
        check(layer)
        shard_module(layer)
        layers.append(layer)
    whole.set_submodule(loader.list_name, nn.ModuleList(layers))
    _restore_depth(whole.config, config)
    whole.requires_grad_(False)
    return whole.eval()


def fill(layer: nn.Module, loaded: nn.Module, name: str) -> None:
    """Puts the weights of a loaded layer into an empty one of the same make.

    Raises:
        ValueError: the two are not of the same make, or something stays empty.
    """
    if other := _module_names(layer) ^ _module_names(loaded):
        raise ValueError(_unlike(name, other))
    for path, module in list(loaded.named_modules()):
        if type(module).__name__ == "Linear4bit":
            layer.set_submodule(path, module)  # the empty layer has a plain Linear there
            continue
        own = layer.get_submodule(path)
        for key, value in module.named_parameters(recurse=False):
            own.register_parameter(key, value if isinstance(value, nn.Parameter) else None)
        for key, value in module.named_buffers(recurse=False):
            own.register_buffer(key, value, persistent=key not in own._non_persistent_buffers_set)
    expected, got = (
        {n: true_shape(t) for n, t in [*m.named_parameters(), *m.named_buffers()]}
        for m in (layer, loaded)
    )
    empty = [n for n, t in [*layer.named_parameters(), *layer.named_buffers()] if t.is_meta]
    if expected != got or empty:
        raise ValueError(_unlike(name, {*empty, *(expected.items() ^ got.items())}))


def _module_names(layer: nn.Module) -> set[str]:
    return {name for name, _ in layer.named_modules()}


def _unlike(name: str, differences: Iterable[object]) -> str:
    return (
        f"layer {name} must be built like the others to be loaded alone, it differs in "
        f"{sorted(differences, key=str)[:2]}; this model cannot be sharded"
    )


KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"first_k_dense_replace": 0, "mlp_only_layers": [], "decoder_sparse_step": 1},
    {"first_k_dense_replace": 1, "mlp_only_layers": [0]},
)
"""What makes the only layer of a config as it says by itself, sparse, or dense."""
PER_LAYER = ("layer_types", "no_rope_layers")
"""Lists of a config with an entry for each layer."""


def one_layer_config(config: PretrainedConfig, index: int) -> PretrainedConfig:
    """The config of a model that has one of its layers alone."""
    one = copy.deepcopy(config)
    text = one.get_text_config()
    text.num_hidden_layers = 1
    for key in PER_LAYER:
        if isinstance(entries := getattr(text, key, None), list):
            setattr(text, key, [entries[index]])
    return one


def _without_vocabulary(config: PretrainedConfig) -> None:
    config.vocab_size = SMALL_VOCABULARY
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, key, None)


def _restore_depth(one: PretrainedConfig, config: PretrainedConfig) -> None:
    # In place: every module of the model holds this very object.
    text, full = one.get_text_config(), config.get_text_config()
    for key in ("num_hidden_layers", *PER_LAYER):
        if hasattr(full, key):
            setattr(text, key, copy.deepcopy(getattr(full, key)))
