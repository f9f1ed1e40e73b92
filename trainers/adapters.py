"""LoRA adapters of a pack: K adapters on one frozen base, one forward for all of them.

Shape legend: K active adapters, S slots of the pack, B rows of the micro-batch (K equal segments,
adapter by adapter), T positions, R the largest lora_rank of the pack, I/O a layer's in/out features.

The A and B matrices of all slots of a layer are stored in one tensor each (A_SRI, B_SOR), padded
with zeros to R; an adapter's own parameters are views into them, and so are its gradients. A zero
row of A meets a zero column of B, so padding adds nothing and gets a zero gradient.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from search_spaces.architecture import LinearShape
from trainers.dropout import keep_mask


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """One adapter: what PEFT's LoraConfig would say of it.

    Args:
        lora_rank: R of A and B, >= 1.
        lora_alpha: the product B A is scaled by lora_alpha / lora_rank.
        linears: the adapted layers, from `ModelShape.resolve_target`.
        dropout: probability of dropping an input of A, in [0, 1).
        seed: of A's initialisation and of the dropout masks.
    """

    lora_rank: int
    lora_alpha: float
    linears: tuple[LinearShape, ...]
    dropout: float = 0.0
    seed: int = 0

    @property
    def scaling(self) -> float:
        """The factor on B A x."""
        return self.lora_alpha / self.lora_rank


@dataclass
class PackContext:
    """What every adapted layer must know of the current micro-step."""

    active: tuple[int, ...] = ()
    """Slots whose rows are in the batch, in the order of the segments; empty: base alone."""
    row_keys_B: torch.Tensor | None = None
    """Keys of the batch's rows for dropout.keep_mask; None: no dropout (evaluation)."""


class AdaptedLayer(nn.Module):
    """A frozen layer plus the low-rank products of the pack's slots."""

    def __init__(
        self,
        base: nn.Module,
        name: str,
        specs: Sequence[AdapterSpec],
        targeted: Sequence[bool],
        ctx: PackContext,
    ) -> None:
        super().__init__()
        in_features, out_features = layer_features(base)
        weight = base.weight
        assert isinstance(weight, torch.Tensor)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        largest = max(spec.lora_rank for spec in specs)
        shape_a, shape_b = (len(specs), largest, in_features), (len(specs), out_features, largest)
        self.base, self.ctx, self.layer_name = base, ctx, name
        self.A_SRI = nn.Parameter(torch.zeros(shape_a, dtype=dtype, device=weight.device))
        self.B_SOR = nn.Parameter(torch.zeros(shape_b, dtype=dtype, device=weight.device))
        self.scaling_S = torch.tensor(
            [spec.scaling if hit else 0.0 for spec, hit in zip(specs, targeted, strict=True)],
            dtype=dtype,
            device=weight.device,
        )
        self.specs, self.targeted = tuple(specs), tuple(targeted)
        self.A_SRI.grad, self.B_SOR.grad = (
            torch.zeros_like(self.A_SRI),
            torch.zeros_like(self.B_SOR),
        )
        for slot, hit in enumerate(targeted):
            if hit:
                self._initialise(slot)

    @torch.no_grad()
    def _initialise(self, slot: int) -> None:
        # U(+-1/sqrt(d_in)) is PEFT's kaiming_uniform(a=sqrt(5)) and the doctrine's A. The generator is
        # the adapter's and the layer's own, so neighbours, K and the order of layers change nothing.
        spec, in_features = self.specs[slot], self.A_SRI.shape[2]
        generator = torch.Generator().manual_seed(derived_seed(spec.seed, "init", self.layer_name))
        bound = 1 / math.sqrt(in_features)
        values = torch.empty(spec.lora_rank, in_features, dtype=self.A_SRI.dtype)
        self.A_SRI[slot, : spec.lora_rank] = values.uniform_(-bound, bound, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        slots = self.ctx.active
        if not slots:
            return out
        A_KRI, B_KOR, scaling_K = self.A_SRI, self.B_SOR, self.scaling_S
        if slots != tuple(range(len(self.specs))):
            index = torch.tensor(slots, device=A_KRI.device)
            A_KRI, B_KOR, scaling_K = A_KRI[index], B_KOR[index], scaling_K[index]
        # The product runs in the type of the activations; the parameters and their gradients keep
        # their own (fp32 on a bf16 base).
        x_KNI = self._drop(x.reshape(len(slots), -1, x.shape[-1]))
        low_KNR = torch.bmm(x_KNI, A_KRI.to(x.dtype).transpose(1, 2))
        delta_KNO = torch.bmm(
            low_KNR * scaling_K.to(x.dtype)[:, None, None], B_KOR.to(x.dtype).transpose(1, 2)
        )
        return out + delta_KNO.reshape(out.shape)

    def _drop(self, x_KNI: torch.Tensor) -> torch.Tensor:
        keys_B = self.ctx.row_keys_B
        if keys_B is None or not any(self.specs[slot].dropout for slot in self.ctx.active):
            return x_KNI
        keys_K = keys_B.chunk(len(self.ctx.active))
        dropped = [
            self._drop_one(*each) for each in zip(x_KNI, keys_K, self.ctx.active, strict=True)
        ]
        return torch.stack(dropped)

    def _drop_one(self, x_NI: torch.Tensor, keys: torch.Tensor, slot: int) -> torch.Tensor:
        spec = self.specs[slot]
        if not spec.dropout:
            return x_NI
        layer_key = derived_seed(spec.seed, "dropout", self.layer_name)
        positions = x_NI.shape[0] // len(keys)
        kept = keep_mask(keys, layer_key, positions, x_NI.shape[1], spec.dropout)
        return x_NI * kept.reshape(x_NI.shape) / (1 - spec.dropout)


@dataclass
class Slot:
    """One trainable unit of a pack: an adapter, or (full.py) the whole model.

    parameters: name -> parameter, with gradients that `backward` of the pack's loss fills. The
    names are PEFT's own for an adapter and the model's for full fine-tuning.
    """

    parameters: dict[str, nn.Parameter]
    spec: AdapterSpec | None


@dataclass
class Pack:
    """A base with its slots. `model(...)` computes what `ctx.active` says."""

    model: PreTrainedModel
    slots: list[Slot]
    ctx: PackContext
    layers: dict[str, AdaptedLayer] = field(default_factory=dict)


def inject(model: PreTrainedModel, specs: Sequence[AdapterSpec]) -> Pack:
    """Puts K adapters on a frozen base.

    Every layer that a spec asks for must be there in every layer of the model, with the sizes that
    the ModelShape says; otherwise nothing is injected.

    Raises:
        ValueError: a target that matches fewer or other layers than its ModelShape says, or fused
            experts (3-D parameters), which this version does not train.
    """
    hits = [matching_layers(model, spec.linears) for spec in specs]
    ctx = PackContext(active=tuple(range(len(specs))))
    layers: dict[str, AdaptedLayer] = {}
    for name in sorted(set().union(*hits)):
        layer = AdaptedLayer(
            model.get_submodule(name), name, specs, [name in hit for hit in hits], ctx
        )
        layers[name] = layer
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    slots = [Slot(parameters=_views(layers, index), spec=spec) for index, spec in enumerate(specs)]
    return Pack(model=model, slots=slots, ctx=ctx, layers=layers)


def eject(pack: Pack) -> None:
    """Takes the adapters off again; the base is what it was."""
    for name, layer in pack.layers.items():
        pack.model.set_submodule(name, layer.base)


def _views(layers: dict[str, AdaptedLayer], slot: int) -> dict[str, nn.Parameter]:
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        if not layer.targeted[slot]:
            continue
        lora_rank = layer.specs[slot].lora_rank
        pairs = (
            ("lora_A", layer.A_SRI, (slot, slice(0, lora_rank))),
            ("lora_B", layer.B_SOR, (slot, slice(None), slice(0, lora_rank))),
        )
        for kind, stored, index in pairs:
            view = nn.Parameter(stored.detach()[index])
            assert stored.grad is not None
            view.grad = stored.grad[index]
            parameters[f"base_model.model.{name}.{kind}.weight"] = view
    return parameters


def matching_layers(model: nn.Module, linears: Iterable[LinearShape]) -> set[str]:
    """Full names of the modules that a target's LinearShapes mean, checked one by one.

    Raises:
        ValueError: a wrong number of layers, a wrong size, or fused experts.
    """
    modules = dict(model.named_modules())
    found: set[str] = set()
    for linear in linears:
        if linear.component == "experts":
            raise ValueError(
                f"target 'experts' ({linear.name}): fused 3-D experts cannot be trained by this version; "
                "set target to attn, mlp and/or unembed"
            )
        names = [
            n
            for n in modules
            if (n == linear.name or n.endswith("." + linear.name)) and _is_text_layer(n)
        ]
        _check_matches(linear, names, modules)
        found.update(names)
    return found


def _is_text_layer(name: str) -> bool:
    return not any(part.startswith(("vision", "audio", "visual")) for part in name.split("."))


def _check_matches(linear: LinearShape, names: list[str], modules: dict[str, nn.Module]) -> None:
    if len(names) != linear.count:
        raise ValueError(
            f"target {linear.name!r} must match {linear.count} layers of the model, matched {len(names)}"
            f"{': ' + names[0] if names else ''}"
        )
    expected = (linear.in_features, linear.out_features)
    for name in names:
        if (got := layer_features(modules[name])) != expected:
            raise ValueError(
                f"layer {name} must be {expected[0]} -> {expected[1]}, is {got[0]} -> {got[1]}"
            )


def layer_features(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a Linear, Linear4bit or Conv1D.

    Raises:
        ValueError: another kind of module.
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    raise ValueError(
        f"a LoRA needs a Linear, Linear4bit or Conv1D layer, got {type(layer).__name__}"
    )


def derived_seed(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else (63 bits)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
