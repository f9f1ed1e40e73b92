"""Checkpoints: a PEFT adapter folder (or a transformers model folder), and the trainer's state beside it."""

import shutil
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from trainers.adapters import AdaptedLayer, AdapterSpec, Pack
from trainers.loop import Run
from trainers.paths import existing_folder, read_json, replace_folder, temporary_folder, write_json

ADAPTER_FILE, MODEL_FILE = "adapter_model.safetensors", "model.safetensors"
OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "trainer_state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    pack: Pack, run: Run, folder: Path, *, base_name: str, revision: str | None
) -> None:
    """Writes weights and everything a restart needs; the folder appears whole or not at all.

    Raises:
        RuntimeError: what was written is not what was trained (empty or missing tensors).
    """
    temporary = temporary_folder(folder)
    save_weights(pack, run, temporary, base_name=base_name, revision=revision)
    save_file(_optimizer_tensors(run), temporary / OPTIMIZER_FILE)
    write_json(temporary / STATE_FILE, run.counters)
    replace_folder(temporary, folder)


def save_weights(
    pack: Pack, run: Run, folder: Path, *, base_name: str, revision: str | None
) -> None:
    """The weights alone, into an existing folder: what PEFT (or transformers) loads."""
    tensors = {name: p.detach().contiguous() for name, p in run.slot.parameters.items()}
    if run.slot.spec is None:
        # Not save_pretrained: it writes nothing on a worker that is not rank 0 of its Train run, and such
        # a worker can be a group of its own.
        save_file(tensors, folder / MODEL_FILE, metadata={"format": "pt"})
        pack.model.config.save_pretrained(folder)
        if pack.model.can_generate() and pack.model.generation_config is not None:
            pack.model.generation_config.save_pretrained(folder)
        return
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    lora_config(pack, run.slot.spec, base_name, revision).save_pretrained(str(folder))
    check_adapter_file(folder / ADAPTER_FILE, set(tensors), trained=run.steps > 0)


def copy_weights(checkpoint: Path, folder: Path) -> None:
    """Puts a checkpoint's weights, without the trainer's state, in a folder's place."""
    temporary = temporary_folder(folder)
    for path in (existing_folder(checkpoint) or checkpoint).iterdir():
        if path.name not in (OPTIMIZER_FILE, STATE_FILE):
            shutil.copy2(path, temporary / path.name)
    replace_folder(temporary, folder)


def check_adapter_file(path: Path, names: set[str], *, trained: bool) -> None:
    """Opens a saved adapter and looks: a sharded model can save empty tensors without an error.

    Raises:
        RuntimeError: tensors are missing or empty, or a trained adapter's B is all zero.
    """
    tensors = load_file(path)
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if set(tensors) != names or empty:
        raise RuntimeError(
            f"{path} must hold {len(names)} tensors, holds {len(tensors)}, {len(empty)} empty"
        )
    b_matrices = [tensor for name, tensor in tensors.items() if ".lora_B." in name]
    if trained and not any(bool(tensor.any()) for tensor in b_matrices):
        raise RuntimeError(f"{path}: every lora_B is zero after training; nothing was learnt")


def load_checkpoint(run: Run, folder: Path) -> bool:
    """Brings a new run to where its checkpoint was. False: there is none.

    Raises:
        ValueError: the checkpoint is not of such a run.
    """
    found = existing_folder(folder)
    if found is None or not (found / STATE_FILE).exists():
        return False
    weights: dict[str, torch.Tensor] = {}
    for path in found.glob("*.safetensors"):
        weights |= load_file(path) if path.name != OPTIMIZER_FILE else {}
    if missing := sorted(set(run.slot.parameters) - set(weights)):
        raise ValueError(
            f"{found}: must hold all {len(run.slot.parameters)} weights of the trial, {len(missing)} are not "
            f"there (first: {missing[0]}); remove the folder to begin the trial again"
        )
    with torch.no_grad():
        for name, parameter in run.slot.parameters.items():
            parameter.copy_(weights[name])
    _restore_optimizer(run, load_file(found / OPTIMIZER_FILE))
    for name, value in read_json(found / STATE_FILE).items():
        setattr(run, name, value)
    return True


def checkpoint_examples(folder: Path) -> int:
    """Examples that the run of a checkpoint had seen; 0 where there is none."""
    found = existing_folder(folder)
    if found is None or not (found / STATE_FILE).exists():
        return 0
    return read_json(found / STATE_FILE)["examples"]


def lora_config(pack: Pack, spec: AdapterSpec, base_name: str, revision: str | None) -> LoraConfig:
    """The PEFT config that rebuilds this adapter on the same base."""
    slot = next(index for index, one in pack.slots.items() if one.spec is spec)
    layers = {name: layer for name, layer in pack.layers.items() if slot in layer.hit}
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        revision=revision,
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,  # pyright: ignore[reportArgumentType]  # PEFT takes any number
        lora_dropout=spec.dropout,
        target_modules=sorted(_target_names(pack, spec, layers)),
        fan_in_fan_out=any(type(layer.base).__name__ == "Conv1D" for layer in layers.values()),
        inference_mode=True,
    )


def _target_names(pack: Pack, spec: AdapterSpec, layers: dict[str, AdaptedLayer]) -> set[str]:
    """Suffixes where they mean exactly our layers, else full names (a suffix such as q_proj would
    reach into the vision tower of a multimodal model)."""
    suffixes = {linear.name for linear in spec.linears}
    everything = [name.removesuffix(".base") for name, _ in pack.model.named_modules()]
    reached = {n for n in everything if any(n == s or n.endswith("." + s) for s in suffixes)}
    return suffixes if reached == set(layers) else set(layers)


def _optimizer_tensors(run: Run) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, moments in run.slot.moments.items():
        for key, value in zip(MOMENTS, moments, strict=True):
            tensors[f"{name}|{key}"] = value.detach().contiguous()
    return tensors


def _restore_optimizer(run: Run, tensors: dict[str, torch.Tensor]) -> None:
    for name, moments in run.slot.moments.items():
        for key, value in zip(MOMENTS, moments, strict=True):
            value.copy_(tensors[f"{name}|{key}"])
