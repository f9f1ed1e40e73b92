"""The frozen base of a sweep: fp32, bf16 or NF4 (bitsandbytes, double quantization), on CPU or GPU."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from trainers.adapters import PLAIN_LINEARS
from trainers.base_fetch import base_folder
from trainers.base_spec import BaseSpec
from trainers.credentials import masked
from trainers.foreign_code import refuse_foreign
from trainers.gradient_checkpointing import recompute_layers
from trainers.speed import cpu_name

NF4_PROBE_ROWS, NF4_ERROR = 64, 0.13
"""Of normal numbers NF4 in blocks of 64 loses 9.2% (measured, and by its code's own quantiles)."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def pick_device() -> torch.device:
    """The CUDA device of this worker when it has one, else the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch type of a dtype name on a device.

    Raises:
        ValueError: an unknown name, or bf16 on a GPU that has none.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return torch.bfloat16 if has_bf16 else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {name!r}")
    if name == "bf16" and device.type == "cuda" and not has_bf16:
        raise ValueError(
            f"dtype 'bf16' is not supported by {torch.cuda.get_device_name(device)}; set dtype: fp32"
        )
    return DTYPES[name]


def load_base(spec: BaseSpec, device: torch.device | None = None) -> PreTrainedModel:
    """The model on its device, frozen and in eval mode (a base's own dropout stays off).

    Sharded, this must be called on all workers of a group: each gets its part of every weight.

    Raises:
        ValueError: the folder holds no loadable model, or one that brings code or pickles, NF4 reached no
            layer, or a model that cannot be sharded.
    """
    transformers_logging.disable_progress_bar()
    device = device or pick_device()
    dtype = resolve_dtype(spec.dtype, device)
    folder = base_folder(spec.model, spec.revision)
    refuse_foreign(Path(folder), spec.model)
    spec = replace(spec, model=folder)
    try:
        model = _load_sharded(spec, dtype, device) if spec.sharded else _load(spec, dtype, device)
    except OSError as error:
        raise ValueError(f"model {spec.model!r} cannot be loaded: {_first_line(error)}") from error
    if spec.gradient_checkpointing or spec.sharded:
        recompute_layers(model)
    return model


def _load(spec: BaseSpec, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A base that one worker holds whole."""
    model = AutoModelForCausalLM.from_pretrained(
        spec.model,
        revision=spec.revision or "main",
        dtype=dtype,
        device_map={"": device},
        quantization_config=nf4_config(dtype) if spec.quantization == "nf4" else None,
        trust_remote_code=False,
        use_safetensors=True,
    )
    model.requires_grad_(False)
    model.eval()
    if spec.quantization == "nf4" and not nf4_layer_names(model):
        raise ValueError(
            f"quantization nf4 reached no layer of {spec.model!r}; set quantization: none"
        )
    if spec.quantization == "nf4":
        _require_nf4(model, dtype)
        if spec.keep_dequantized:
            dequantize(model, dtype)
        else:
            _require_gradients(model, dtype)
    return model


def _load_sharded(spec: BaseSpec, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A base of which every worker holds its part. What is sharded must be of one dtype, so NF4's bytes
    are stored as numbers of the compute type."""
    from trainers.sharded_loading import load_sharded
    from trainers.sharding import prepare_deepspeed

    prepare_deepspeed(device)
    nf4 = spec.quantization == "nf4"
    return load_sharded(
        spec.model,
        spec.revision,
        dtype=dtype,
        device=device,
        quantization=nf4_config(dtype, storage=dtype) if nf4 else None,
        check=lambda part: _require_nf4_part(part, dtype) if nf4 else None,
    )


def _require_nf4_part(part: nn.Module, dtype: torch.dtype) -> None:
    _require_nf4(part, dtype)
    _require_gradients(part, dtype)


def _require_nf4(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes sure that four bits come back as what they stand for.

    bitsandbytes (seen in 0.50.2) dequantizes on CPUs with the wrong constants where a weight's rows are no
    multiple of its blocks of 64: the base is then 24% off, not NF4's 9%, with no error.

    Raises:
        ValueError: it does so for a width of this model.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    layers: list[Any] = [model.get_submodule(name) for name in nf4_layer_names(model)]
    for width in sorted({layer.in_features for layer in layers}):
        generator = torch.Generator().manual_seed(width)
        weight = torch.randn(NF4_PROBE_ROWS, width, generator=generator, dtype=dtype)
        weight = weight.to(layers[0].weight.device)
        back = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
        error = float((back.float() - weight.float()).norm() / weight.float().norm())
        if error > NF4_ERROR:
            raise ValueError(
                f"bitsandbytes gives NF4 weights of {width} input features back {error:.0%} off on "
                f"{weight.device.type} (its own error is 9%); set quantization: none, or use a GPU"
            )


def _require_gradients(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes sure that a forward without gradients does not end the gradients of those after it.

    On a CPU with AVX512-BF16, bitsandbytes (seen in 0.50) packs a 4-bit weight anew at its first forward
    without gradients, and from then on multiplies in bf16 by an operator that has no backward pass:
    whoever evaluates before or while he trains loses every gradient through the base, with no error.

    Raises:
        ValueError: it still does so.
    """
    layers: list[Any] = [model.get_submodule(name) for name in nf4_layer_names(model)]
    if not layers:
        raise ValueError("quantization nf4 reached no layer; set quantization: none")
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    x = torch.ones(1, layers[0].in_features, dtype=dtype, device=layers[0].weight.device)
    with torch.no_grad():
        layers[0](x)
    with torch.enable_grad():
        product = layers[0](x.requires_grad_())
    if product.grad_fn is None:
        raise ValueError(
            "bitsandbytes gives no gradients through 4-bit layers on this CPU; set quantization: none"
        )


class DequantizedLinear(nn.Linear):
    """A linear layer whose weight went through NF4 and is held in the compute type."""


PLAIN_LINEARS.add(DequantizedLinear)


@torch.no_grad()
def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Puts a DequantizedLinear in the place of every 4-bit layer: bitsandbytes multiplies with exactly
    these weights, which it computes anew at each forward and each backward."""
    from bitsandbytes.functional import dequantize_4bit

    for name in nf4_layer_names(model):
        layer: Any = model.get_submodule(name)
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        with torch.device("meta"):
            plain = DequantizedLinear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
        model.set_submodule(name, plain)


def device_name(device: torch.device) -> str:
    """A device as people know it: the GPU's name, or the CPU's and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} thread(s)"


def nf4_config(dtype: torch.dtype, storage: torch.dtype = torch.uint8) -> BitsAndBytesConfig:
    """NF4 with double quantization.

    Args:
        dtype: compute type.
        storage: type of the numbers that hold the four-bit weights.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def _first_line(error: Exception) -> str:
    return masked(str(error)).strip().splitlines()[0]


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The architecture without weights, on the meta device: names and true shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def nf4_layer_names(model: nn.Module) -> list[str]:
    """Names of the layers whose weights went through NF4."""
    kinds = ("Linear4bit", "DequantizedLinear")
    return [name for name, module in model.named_modules() if type(module).__name__ in kinds]


def true_num_params(model: nn.Module) -> int:
    """Parameters of the model as its architecture has them: a 4-bit tensor packs two weights in one
    byte, so its numel is half the count; a sharded one is empty; a tied head counts once."""
    seen: dict[int, int] = {}
    for parameter in model.parameters():
        seen[id(parameter)] = math.prod(true_shape(parameter))
    return sum(seen.values())


def true_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """A weight's shape as the architecture has it, also of a 4-bit or a sharded one."""
    present = getattr(tensor, "ds_shape", tensor.shape)
    return tuple(getattr(getattr(tensor, "quant_state", None), "shape", present))
