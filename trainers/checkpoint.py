"""Checkpoints: a PEFT adapter folder (or a transformers model folder), and the trainer's state beside it (see
trainers/checkpoint_folder.py)."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from search_spaces.variants import DORA, RSLORA
from trainers.adapters import AdaptedLayer, Pack
from trainers.checkpoint_folder import (
    AGAIN,
    OPTIMIZER_FILE,
    PROBE_LOSS,
    ROWS,
    STATE_FILE,
    Checkpoint,
    find_checkpoint,
)
from trainers.experts import from_peft, peft_shape, to_peft
from trainers.gate import (
    ADAPTER_FILE,
    MODEL_FILE,
    GateError,
    Shapes,
    check_saved,
    check_shapes,
    modules_ending_in,
    rank_pattern,
)
from trainers.integrity import seal_folder, sync_folder
from trainers.paths import replace_folder, temporary_folder, write_json
from trainers.runs import Run
from trainers.slots import AdapterSpec
from trainers.targets import matching_layers

OS_ERROR = re.compile(r"\(os error (\d+)\)")
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    pack: Pack,
    run: Run,
    folder: Path,
    *,
    base_name: str,
    revision: str | None,
    probe_loss: float | None = None,
    rows: Sequence[dict[str, Any]] = (),
) -> None:
    """Writes weights and everything a restart needs; the folder appears whole or not at all, and the one
    before stays beside it.

    Args:
        probe_loss: nats/token of the run on its probe batch (gate.py), which a restart must find again.
        rows: the trial's metrics so far.

    Raises:
        GateError: what was written is not what was trained; the previous checkpoint stays.
        OSError: the storage takes nothing more; the previous checkpoint stays.
    """
    temporary = temporary_folder(folder)
    try:
        save_weights(pack, run, temporary, base_name=base_name, revision=revision)
        moments = {name: tensor.detach().contiguous() for name, tensor in _moments(run).items()}
        _save_file(moments, temporary / OPTIMIZER_FILE)
        check_shapes(temporary / OPTIMIZER_FILE, _shapes(moments), "2 for each weight")
        state = run.counters | {PROBE_LOSS: probe_loss, ROWS: list(rows)}
        write_json(temporary / STATE_FILE, state)
        seal_folder(temporary)
        sync_folder(temporary)
    except (GateError, OSError):
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk its bytes are wanted
        raise
    replace_folder(temporary, folder, keep_previous=True)


def save_weights(
    pack: Pack, run: Run, folder: Path, *, base_name: str, revision: str | None
) -> None:
    """The weights alone, into an existing folder: what PEFT (or transformers) loads.

    Raises:
        GateError: what was written is not what was trained.
    """
    tensors = {name: to_peft(name, p.detach()) for name, p in run.slot.parameters.items()}
    if run.slot.spec is None:
        # Not save_pretrained: it writes nothing on a worker that is not rank 0 of its Train run, and such
        # a worker can be a group of its own.
        _save_file(tensors, folder / MODEL_FILE, metadata={"format": "pt"})
        pack.model.config.save_pretrained(folder)
        if pack.model.can_generate() and pack.model.generation_config is not None:
            pack.model.generation_config.save_pretrained(folder)
    else:
        _save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
        lora_config(pack.model, run.slot.spec, base_name, revision).save_pretrained(str(folder))
    check_saved(folder, pack, run)


def _save_file(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """safetensors' writer, whose errors of the file system have no type of their own."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        if found := OS_ERROR.search(str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def load_checkpoint(run: Run, folder: Path) -> Checkpoint | None:
    """Brings a new run to where its last checkpoint was that is whole, and gives that; None: there is none.

    Raises:
        GateError: no checkpoint is whole, or it is not of such a run; nothing was changed.
    """
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        return None
    moments, found, state = _moments(run), checkpoint.folder, checkpoint.state
    file = found / (MODEL_FILE if run.slot.spec is None else ADAPTER_FILE)
    shapes = {name: peft_shape(name, view.shape) for name, view in run.slot.parameters.items()}
    weights = _whole(file, shapes, "weights of the trial")
    saved_moments = _whole(found / OPTIMIZER_FILE, _shapes(moments), "moments of its optimizer")
    if missing := [name for name in run.COUNTERS if name not in state]:
        raise GateError(f"{found / STATE_FILE}: must hold {', '.join(missing)}, does not; {AGAIN}")
    with torch.no_grad():
        for name, parameter in run.slot.parameters.items():
            parameter.copy_(from_peft(name, weights[name], parameter.shape))
        for name, moment in moments.items():
            moment.copy_(saved_moments[name])
    run.restore(state)
    return checkpoint


def _whole(path: Path, shapes: Shapes, what: str) -> dict[str, torch.Tensor]:
    try:
        check_shapes(path, shapes, what)
    except GateError as error:
        raise GateError(
            f"{path.parent}: must hold all {len(shapes)} {what}; {error}; {AGAIN}"
        ) from error
    return load_file(path)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def lora_config(
    model: nn.Module, spec: AdapterSpec, base_name: str, revision: str | None
) -> LoraConfig:
    """The PEFT config that rebuilds an adapter on the same base."""
    sizes = matching_layers(model, spec.linears)
    dense = {name for name, size in sizes.items() if not size.num_experts}
    patterns = rank_pattern(sizes, spec)
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        revision=revision,
        r=spec.held_rank,
        use_rslora=spec.has(RSLORA),
        use_dora=spec.has(DORA),
        lora_alpha=spec.held_alpha,  # pyright: ignore[reportArgumentType]  # PEFT takes any number
        lora_dropout=spec.dropout,
        # An empty list, not None, for which PEFT has a choice of its own.
        target_modules=sorted(_target_names(model, spec, dense)) if dense else [],
        target_parameters=sorted(patterns, reverse=True) or None,
        rank_pattern=patterns,
        fan_in_fan_out=any(_is_conv1d(model.get_submodule(name)) for name in dense),
        inference_mode=True,
    )


def _is_conv1d(layer: nn.Module) -> bool:
    return isinstance(layer.base if isinstance(layer, AdaptedLayer) else layer, Conv1D)


def _target_names(model: nn.Module, spec: AdapterSpec, layers: set[str]) -> set[str]:
    """Suffixes where they mean exactly our layers, else full names (a suffix such as q_proj would
    reach into the vision tower of a multimodal model)."""
    suffixes = {linear.name for linear in spec.linears if linear.component != "experts"}
    return suffixes if modules_ending_in(model, suffixes) == layers else layers


def _moments(run: Run) -> dict[str, torch.Tensor]:
    """Both AdamW moments of every weight, under the names that the optimizer's file has."""
    return {
        f"{name}|{key}": moment
        for name, pair in run.slot.moments.items()
        for key, moment in zip(MOMENTS, pair, strict=True)
    }
