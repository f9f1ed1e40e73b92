"""An adapter made part of its base's weights: plain safetensors that need no PEFT.

The base is the one that the adapter was trained on: NF4 weights are dequantized, since the adapter learnt
to correct those. A tied head that has an adapter is untied first, as the embedding is not what was trained.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from search_spaces.variants import DORA
from trainers.adapters import AdaptedLayer, Pack
from trainers.base_fetch import base_folder
from trainers.base_model import load_base, nf4_layer_names
from trainers.base_spec import BaseSpec
from trainers.dora import LEAST_NORM
from trainers.experts import ExpertMatrix, from_peft
from trainers.foreign_code import refuse_foreign
from trainers.gate import (
    ADAPTER_FILE,
    GateError,
    adapter_shapes,
    check_adapter_config,
    check_shapes,
    tensors_meaning,
)
from trainers.slots import AdapterSpec

SHARD_SIZE = "5GB"
PROBE_ROWS, PROBE_TOKENS = 2, 32
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far the merged model's logits may lie from base and adapter, of the largest logit. ASSUMPTION for 16-bit
weights: a merge rounds every weight once (2^-9 of it in bf16), over tens of layers."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge did.

    Attributes:
        num_layers: layers (and experts' parameters) that were changed.
        logits_error: largest difference between base with adapter and the merged model, read back, in
            parts of the largest logit.
        tolerance: what it may be.
        nf4_error: of the dequantized weights, |W' - W| / |W| over all of them; None without NF4.
        nf4_logits_error: what NF4 alone does to the base's logits, as logits_error.
        untied: the head was tied to the embedding before.
    """

    num_layers: int
    logits_error: float
    tolerance: float
    nf4_error: float | None
    nf4_logits_error: float | None
    untied: bool


@torch.no_grad()
def merge_adapter(base: BaseSpec, spec: AdapterSpec, adapter: Path, folder: Path) -> Merged:
    """Writes the merged model into an empty folder, and compares what is read back from it.

    Args:
        base: that the adapter was trained on, in the numbers to merge in.
        spec: of the adapter.
        adapter: its PEFT folder.

    Raises:
        GateError: the merged model does not compute what base and adapter do.
        ValueError: no such base or adapter.
    """
    written = _write_merged(base, spec, adapter, folder)
    got = logits_of(_read_back(folder, written.dtype), written.ids)
    error, tolerance = relative_difference(got, written.expected), TOLERANCES[written.dtype]
    if not error <= tolerance:
        raise GateError(
            f"merged weights must give the logits of base and adapter within {tolerance:g}, they differ by "
            f"{error:.3g}; keep the adapter apart"
        )
    return Merged(
        num_layers=written.num_layers,
        logits_error=error,
        tolerance=tolerance,
        nf4_error=written.nf4.weights if written.nf4 else None,
        nf4_logits_error=written.nf4.logits if written.nf4 else None,
        untied=written.untied,
    )


@dataclass(frozen=True, kw_only=True)
class _Written:
    """A merged model on disk, and what base and adapter gave on the probe tokens."""

    ids: torch.Tensor
    expected: torch.Tensor
    dtype: torch.dtype
    num_layers: int
    nf4: "_Nf4Error | None"
    untied: bool


def _write_merged(base: BaseSpec, spec: AdapterSpec, adapter: Path, folder: Path) -> _Written:
    """Apart from what reads it back, so that a large model is not held twice."""
    model, nf4 = _as_trained(base)
    ids = probe_ids(model)
    pack = Pack(model)
    slot = pack.enter(spec)
    _load(pack, slot, adapter)
    pack.activate([slot])
    expected = logits_of(model, ids)
    untied = _untie(model)
    for layer in pack.layers.values():
        _add(layer, slot, spec)
    num_layers = len(pack.layers)
    pack.eject()
    if model.device.type == "cpu":
        # Saving imports DeepSpeed, which else says on stdout that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    return _Written(
        ids=ids,
        expected=expected,
        dtype=model.dtype,
        num_layers=num_layers,
        nf4=nf4,
        untied=untied,
    )


def published_dtype(base: BaseSpec) -> str:
    """The dtype that a base is published in, as BaseSpec names it: bf16, else fp32."""
    folder = base_folder(base.model, base.revision)
    refuse_foreign(Path(folder), base.model)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return "bf16" if config.dtype == torch.bfloat16 else "fp32"


def probe_ids(model: PreTrainedModel) -> torch.Tensor:
    """Tokens from all over the vocabulary, [2, 32]."""
    vocab = model.config.get_text_config().vocab_size
    count = PROBE_ROWS * PROBE_TOKENS
    ids = torch.arange(count, device=model.device) * max(1, vocab // count) % vocab
    return ids.view(PROBE_ROWS, PROBE_TOKENS)


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits in float32 (float64 of a float64 model), on the CPU."""
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits.cpu()
    return logits if logits.dtype == torch.float64 else logits.float()


def relative_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in parts of the largest expected number."""
    return float((got - expected).abs().max() / expected.abs().max())


@dataclass(frozen=True)
class _Nf4Error:
    """What NF4 did: to the weights, |W' - W| / |W| over all of them, and to the logits."""

    weights: float
    logits: float


def _as_trained(base: BaseSpec) -> tuple[PreTrainedModel, _Nf4Error | None]:
    """The base with the weights that the adapter was trained on, in plain layers."""
    plain = replace(
        base,
        quantization="none",
        keep_dequantized=False,
        sharded=False,
        gradient_checkpointing=False,
    )
    model = load_base(plain)
    if base.quantization == "none":
        return model, None
    ids = probe_ids(model)
    before = logits_of(model, ids)
    quantized = load_base(replace(plain, quantization="nf4", keep_dequantized=True))
    squared = total = 0.0
    for name in nf4_layer_names(quantized):
        layer: Any = model.get_submodule(name)
        other: Any = quantized.get_submodule(name)
        weight = other.weight.mT if isinstance(layer, Conv1D) else other.weight
        squared += float((weight.float() - layer.weight.float()).square().sum())
        total += float(layer.weight.float().square().sum())
        layer.weight.copy_(weight)
    error = relative_difference(logits_of(model, ids), before)
    return model, _Nf4Error((squared / total) ** 0.5, error)


def _load(pack: Pack, slot: int, folder: Path) -> None:
    """Fills a slot from a PEFT folder.

    Raises:
        GateError: the folder's config or tensors are another adapter's.
    """
    spec = pack.slots[slot].spec
    assert spec is not None
    check_adapter_config(folder, pack.model, spec)
    shapes = adapter_shapes(pack.model, spec)
    check_shapes(folder / ADAPTER_FILE, shapes, tensors_meaning(spec, len(shapes)))
    saved = load_file(folder / ADAPTER_FILE)
    for name, view in pack.slots[slot].parameters.items():
        view.copy_(from_peft(name, saved[name], view.shape))


def _untie(model: PreTrainedModel) -> bool:
    """Gives the head weights of its own where it shares the embedding's and has an adapter."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if not isinstance(head, AdaptedLayer) or head.weight is not embedding.weight:
        return False
    head.base.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    return True


def _add(layer: AdaptedLayer | ExpertMatrix, slot: int, spec: AdapterSpec) -> None:
    """Adds scaling B A to a frozen weight, as the layer's own product applies it; of a DoRA the rows then get
    the lengths that it learnt."""
    assert layer.matrices is not None
    A, B = layer.matrices.A_SRI[slot], layer.matrices.B_SRO[slot]
    delta = spec.scaling(layer.size) * (B.mT @ A)  # [O, I], of experts [E, O, I]
    weight = layer.weight.mT if layer.is_transposed else layer.weight
    merged = weight.to(delta.dtype) + delta
    if isinstance(layer, AdaptedLayer) and layer.magnitudes is not None and spec.has(DORA):
        norms = merged.norm(dim=1).clamp_min(LEAST_NORM)
        merged *= (layer.magnitudes.m_SO[slot] / norms)[:, None]
    weight.copy_(merged.to(weight.dtype))


def _read_back(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    return model.eval().requires_grad_(False)
