"""The gate of every save: what lies on disk is what was trained, or the trial fails with the reason.

A sharded or interrupted save can leave empty, missing or zero tensors without an error. So a saved
adapter is read back before it takes its place: its tensors are compared with the slot bit for bit, and
its config must reach exactly the layers that the trial adapts. Equal weights give equal losses; what they
cannot show, that the base under them is the same, is shown by a probe batch: its loss is kept in the
checkpoint, and a trial that goes on must find it again.
"""

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from search_spaces.variants import DORA, RSLORA
from trainers.adapters import Pack
from trainers.experts import PARAMETERS, is_experts, parameter_suffix, to_peft
from trainers.integrity import GateError
from trainers.loop import Trainer
from trainers.runs import Run
from trainers.slots import MAGNITUDE, AdapterSpec, Slot
from trainers.store import LayerSize
from trainers.targets import PEFT_PREFIX, matching_layers, peft_prefixes

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODEL_FILE = "model.safetensors"
PROBE_ROWS = 2
"""The shortest held-out rows: at most 4% of an evaluation on 50 rows."""
BF16_TOLERANCE, FULL_TOLERANCE = 2e-2, 1e-5
"""ASSUMPTION: how far, relative, a probe loss may move where kernels, devices or neighbours differ: on a
base in bf16, and in fp32 or fp64."""

Shapes = Mapping[str, tuple[int, ...]]


def check_saved(folder: Path, pack: Pack, run: Run) -> None:
    """Reads back the weights of a run that were just saved into a folder.

    Raises:
        GateError: names the file and the numbers.
    """
    if run.slot.spec is None:
        shapes = {name: tuple(p.shape) for name, p in pack.model.named_parameters()}
        _check_file(folder / MODEL_FILE, shapes, run.slot, "the model's parameters")
        return
    shapes = adapter_shapes(pack.model, run.slot.spec)
    meaning = tensors_meaning(run.slot.spec, len(shapes))
    _check_file(folder / ADAPTER_FILE, shapes, run.slot, meaning)
    _check_learnt(folder / ADAPTER_FILE, run)
    check_adapter_config(folder, pack.model, run.slot.spec)


def tensors_meaning(spec: AdapterSpec, count: int) -> str:
    """What the tensors of an adapter are made of, for a message."""
    each = 3 if spec.has(DORA) else 2
    return f"{each} for each of {count // each} layers"


def adapter_shapes(model: nn.Module, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """PEFT's names and shapes of all tensors that an adapter must have: of every layer of the model that
    its target means, whatever the pack holds."""
    shapes: dict[str, tuple[int, ...]] = {}
    sizes = matching_layers(model, spec.linears)
    for name, prefix in peft_prefixes(sizes).items():
        size = sizes[name]
        ranks = size.rank(spec.held_rank) * max(1, size.num_experts)
        shapes[f"{prefix}.lora_A.weight"] = (ranks, size.num_in)
        shapes[f"{prefix}.lora_B.weight"] = (size.num_out, ranks)
        if spec.has(DORA):
            shapes[f"{prefix}.{MAGNITUDE}"] = (size.num_out,)
    return shapes


def check_shapes(path: Path, shapes: Shapes, meaning: str) -> None:
    """Compares a file's tensors with what it must hold; reads its header alone.

    Args:
        meaning: what the number of tensors is made of.

    Raises:
        GateError: no readable file, tensors missing, too many, empty or of another shape.
    """
    found = _shapes_of(path)
    if set(found) != set(shapes):
        raise GateError(_names_message(path, set(shapes), set(found), meaning))
    empty = sorted(name for name, shape in found.items() if 0 in shape)
    if empty:
        raise GateError(
            f"{path.name} must hold {len(shapes)} tensors with numbers, {len(empty)} are empty; first: "
            f"{empty[0]}, of shape {list(found[empty[0]])} for {list(shapes[empty[0]])}"
        )
    for name, shape in shapes.items():
        if found[name] != shape:
            raise GateError(
                f"{path.name}: {name} must be of shape {list(shape)}, is {list(found[name])}"
            )


def _shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        raise GateError(f"{path.name} must be there, {path.parent} does not hold it")
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        size = path.stat().st_size
        raise GateError(
            f"{path.name} ({size:,} bytes) is no readable safetensors file: {error}"
        ) from error


def _names_message(path: Path, wanted: set[str], found: set[str], meaning: str) -> str:
    missing, strange = sorted(wanted - found), sorted(found - wanted)
    parts = [f"{path.name} must hold {len(wanted)} tensors ({meaning}), holds {len(found)}"]
    parts += [f"missing first: {missing[0]}"] if missing else []
    parts += [f"not among them: {strange[0]}"] if strange else []
    bare = [
        layer
        for layer in dict.fromkeys(map(_layer_of, missing))
        if layer and layer not in set(map(_layer_of, found))
    ]
    parts += [f"layer {bare[0]} has no adapter"] if bare else []
    return "; ".join(parts)


def _layer_of(name: str) -> str:
    """The layer that an adapter's tensor belongs to; empty for another tensor."""
    layer, found, _ = name.removeprefix(PEFT_PREFIX).partition(".lora_")
    return layer if found else ""


def _check_file(path: Path, shapes: Shapes, slot: Slot, meaning: str) -> None:
    """The file's tensors, which must be the slot's, bit for bit, and finite."""
    check_shapes(path, shapes, meaning)
    with safe_open(path, "pt") as file:
        for name in shapes:
            if (live := slot.parameters.get(name)) is None:
                raise GateError(
                    f"{path.name}: {name} is saved, but nothing of that name is trained"
                )
            saved = file.get_tensor(name).to(live.device)
            live = to_peft(name, live)
            if not bool(torch.isfinite(saved).all()):
                raise GateError(f"{path.name}: {name} holds a number that is not finite")
            if saved.dtype != live.dtype or not torch.equal(saved, live):
                raise GateError(
                    f"{path.name}: {name} must be what was trained, bit for bit; of {saved.numel():,} "
                    f"numbers {int((saved != live).sum()):,} differ"
                )


def _check_learnt(path: Path, run: Run) -> None:
    views = run.slot.parameters
    b_matrices = [view for name, view in views.items() if ".lora_B." in name]
    steps = run.steps - run.idle_steps
    if steps > 0 and not any(bool(view.any()) for view in b_matrices):
        raise GateError(f"{path.name}: every lora_B is zero after {steps} steps")
    # The forward reads whole rows of the store: what is not in a view is not in the file either.
    held = sum(int(row.count_nonzero()) for row in run.slot.rows)
    saved = sum(int(view.count_nonzero()) for view in views.values())
    if held != saved:
        raise GateError(
            f"{path.name}: the slot must hold nothing beside the adapter's tensors, "
            f"{held - saved:,} numbers beyond its rank and layers are not zero"
        )


def check_adapter_config(folder: Path, model: nn.Module, spec: AdapterSpec) -> None:
    """What PEFT would make of a saved adapter's config on this base.

    Raises:
        GateError: another rank, scale or set of layers than the trial's.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():  # PEFT would look for it on the hub
        raise GateError(f"{path.name} must be there, {folder} does not hold it")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise GateError(f"{path.name}: PEFT cannot read it: {error}") from error
    if not isinstance(config, LoraConfig):
        raise GateError(f"{path.name}: must be of a LoRA, is a {type(config).__name__}")
    sizes = matching_layers(model, spec.linears)
    must = {"r": spec.held_rank, "lora_alpha": spec.held_alpha, "use_rslora": spec.has(RSLORA)}
    must |= {"use_dora": spec.has(DORA), "alpha_pattern": {}}
    must |= {"rank_pattern": rank_pattern(sizes, spec)}
    for key, value in must.items():
        if (got := getattr(config, key)) != value:
            raise GateError(f"{path.name}: {key} must be {value!r}, is {got!r}")
    wanted, reached = set(sizes), reached_layers(model, config)
    if wanted != reached:
        first = sorted(wanted ^ reached)[0]
        raise GateError(
            f"{path.name}: target_modules must reach {len(wanted)} layers, reaches {len(reached)}; layer "
            f"{first} {'has no adapter' if first in wanted else 'is not of the target'}"
        )


def reached_layers(model: nn.Module, config: LoraConfig) -> set[str]:
    """Full names of the modules that PEFT would adapt.

    Of some architectures with experts PEFT takes the names of their dense layers for those that the experts
    had before transformers 5, and adapts the experts (and the router) in their place.
    """
    config = deepcopy(config)
    convert_peft_config_for_transformers(config, model, None)
    targets = config.target_modules or ()
    modules = modules_ending_in(model, [targets] if isinstance(targets, str) else targets)
    return modules | parameters_ending_in(model, config.target_parameters or ())


def require_expressible(model: nn.Module, spec: AdapterSpec, config: LoraConfig) -> None:
    """Makes sure, before anything is trained, that PEFT can be told what is.

    Args:
        config: that would be saved.

    Raises:
        ValueError: PEFT would adapt other layers.
    """
    wanted, reached = set(matching_layers(model, spec.linears)), reached_layers(model, config)
    if lost := sorted(wanted - reached):
        names = sorted({linear.name for linear in spec.linears if _ends_in(lost, linear.name)})
        raise ValueError(
            f"PEFT cannot be told to adapt {', '.join(names)} of {type(model).__name__}: it takes these names for "
            f"its experts ({len(lost)} layers, first {lost[0]}); leave them out of target"
        )


def _ends_in(layers: Iterable[str], suffix: str) -> bool:
    return any(f".{layer}".endswith(f".{suffix}") for layer in layers)


def modules_ending_in(model: nn.Module, suffixes: Iterable[str]) -> set[str]:
    """Full names of the modules that PEFT finds by names: equal to one, or ending in a dot and one."""
    names = {name.removesuffix(".base") for name, _ in model.named_modules()}
    ends = tuple(f".{suffix}" for suffix in suffixes)
    return {name for name in names if f".{name}".endswith(ends)}


def parameters_ending_in(model: nn.Module, suffixes: Iterable[str]) -> set[str]:
    """Full names of the fused parameters that PEFT finds by names."""
    names = {
        f"{name.removesuffix('.base')}.{parameter}"
        for name, module in model.named_modules()
        if is_experts(module)
        for parameter in PARAMETERS
    }
    return {name for name in names if f".{name}".endswith(tuple(f".{s}" for s in suffixes))}


def rank_pattern(sizes: Mapping[str, LayerSize], spec: AdapterSpec) -> dict[str, int]:
    """PEFT's rank_pattern of an adapter: the rank of each expert, where it has any."""
    return {
        parameter_suffix(name): size.rank(spec.held_rank)
        for name, size in sizes.items()
        if size.num_experts
    }


class Probe:
    """A small batch of held-out rows, always the same: its loss tells whether a checkpoint, loaded, is the
    model that was saved."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.pack, self.comm = trainer, trainer.pack, trainer.comm
        rows = trainer.held_out
        usable = np.flatnonzero(rows.loss_tokens > 0)
        self.rows = usable[np.argsort(rows.lengths[usable], kind="stable")[:PROBE_ROWS]]
        self.num_loss_tokens = int(rows.loss_tokens[self.rows].sum())

    def loss(self, run: Run) -> float:
        """Nats/token of a run on the batch.

        On all workers together: the forward of a sharded base is a collective. Each computes the whole
        batch, so that the number does not depend on how many they are.
        """
        head = self.trainer.head
        batch = self.trainer.held_out.batch([self.rows], head.max_positions)
        slot = run.slot_index if run.slot.spec is not None else None
        return float(head.eval_nats(batch, slot)) / self.num_loss_tokens

    def check_reloaded(self, run: Run, recorded: float | None, folder: Path) -> None:
        """Compares a run that was just loaded with what its checkpoint says that it lost. On all workers.

        Args:
            recorded: nats/token when it was saved; None: by a version that did not look.

        Raises:
            GateError: on all workers alike.
        """
        loss, reason = self.loss(run), ""
        dtype = next(p for p in self.pack.model.parameters() if p.is_floating_point()).dtype
        tolerance = BF16_TOLERANCE if dtype == torch.bfloat16 else FULL_TOLERANCE
        if recorded is not None and not math.isclose(
            loss, recorded, rel_tol=tolerance, abs_tol=tolerance
        ):
            reason = (
                f"{folder}: reloaded, it must lose {recorded:.6f} nats/token on the probe batch as when it "
                f"was saved, loses {loss:.6f}; the base or the checkpoint is another one: give the model "
                "that it was trained on, or remove the folder to begin the trial again"
            )
        if reason := self.comm.share(reason):
            raise GateError(reason)
