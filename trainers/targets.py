"""Which layers of a model a target means, and under which names PEFT keeps their adapters."""

from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from search_spaces.architecture import LinearShape
from trainers.decoder import is_text_module
from trainers.experts import PARAMETERS, expert_size, is_experts, num_active_experts
from trainers.store import LayerSize

PEFT_PREFIX = "base_model.model."
EXPERTS = ".experts"


def matching_layers(model: nn.Module, linears: Iterable[LinearShape]) -> dict[str, LayerSize]:
    """Full name -> size of the modules, and of the experts' parameters, that a target's LinearShapes mean,
    checked one by one.

    Raises:
        ValueError: a wrong number of layers, a wrong size, or experts of another kind.
    """
    modules = {name.removesuffix(".base"): module for name, module in model.named_modules()}
    active = num_active_experts(model)
    found: dict[str, LayerSize] = {}
    for linear in linears:
        sizes = (
            _expert_sizes(modules, linear.name, active)
            if linear.component == "experts"
            else {n: layer_size(m) for n, m in modules.items() if _is_named(n, linear.name)}
        )
        _check_matches(linear, sizes)
        found |= sizes
    return found


def _is_named(name: str, suffix: str) -> bool:
    return f".{name}".endswith(f".{suffix}") and is_text_module(name)


def _expert_sizes(
    modules: dict[str, nn.Module], suffix: str, num_active: int
) -> dict[str, LayerSize]:
    module_suffix, _, parameter = suffix.rpartition(".")
    return {
        f"{name}.{parameter}": expert_size(module, parameter, num_active)
        for name, module in modules.items()
        if _is_named(name, module_suffix) and is_experts(module)
    }


def _check_matches(linear: LinearShape, sizes: dict[str, LayerSize]) -> None:
    count = sum(max(1, size.num_experts) for size in sizes.values())
    if count != linear.count:
        what = "experts" if linear.component == "experts" else "layers"
        raise ValueError(
            f"target {linear.name!r} must match {linear.count} {what} of the model, matched {count}"
            f"{': ' + next(iter(sizes)) if sizes else ''}"
        )
    expected = (linear.in_features, linear.out_features)
    for name, size in sizes.items():
        if (size.num_in, size.num_out) != expected:
            raise ValueError(
                f"layer {name} must be {expected[0]} -> {expected[1]}, is {size.num_in} -> {size.num_out}"
            )


def module_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module of a layer, and which of its parameters is meant; "" for the module itself."""
    module, _, parameter = name.rpartition(".")
    if parameter in PARAMETERS and module.endswith(EXPERTS):
        return model.get_submodule(module), parameter
    return model.get_submodule(name), ""


def layer_size(layer: nn.Module) -> LayerSize:
    """The features of a frozen Linear, Linear4bit or Conv1D.

    Raises:
        ValueError: another kind of module.
    """
    if isinstance(layer, nn.Linear):
        return LayerSize(layer.in_features, layer.out_features)
    if isinstance(layer, Conv1D):
        return LayerSize(layer.nx, layer.nf)
    raise ValueError(
        f"a LoRA needs a Linear, Linear4bit or Conv1D layer, got {type(layer).__name__}"
    )


def peft_prefixes(layers: Iterable[str]) -> dict[str, str]:
    """Layer -> the name under which PEFT keeps its A and B. PEFT wraps fused parameters of a module one in
    the other: the first is the inner one."""
    found, names = {}, set(layers)
    for name in sorted(names):
        module, _, parameter = name.rpartition(".")
        outer = f"{module}.{PARAMETERS[1]}"
        if parameter in PARAMETERS and module.endswith(EXPERTS):
            inner = ".base_layer" if parameter == PARAMETERS[0] and outer in names else ""
            found[name] = f"{PEFT_PREFIX}{module}{inner}"
        else:
            found[name] = f"{PEFT_PREFIX}{name}"
    return found
