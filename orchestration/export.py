"""`tenfold export`: a trial's adapter as something to give away: a PEFT folder, or merged weights."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.bars import working
from orchestration.models import config_path, model_shape
from orchestration.own_folder import require_place
from orchestration.results import TrialRecord, best_trial, read_trials
from orchestration.run import tokenizer_files
from orchestration.run_folder import run_at
from orchestration.serving import (
    ADAPTER_CONFIG,
    SERVERS,
    portable_config,
    vllm_refusals,
    vllm_remarks,
)
from trainers.data import DataSpec
from trainers.data.tokenizer import tokenizer_folder
from trainers.integrity import check_folder, seal_folder
from trainers.mirror import fetch_folder, mirror_of, shown
from trainers.paths import (
    RunPaths,
    read_json,
    read_state,
    replace_folder,
    temporary_folder,
    write_json,
)

if TYPE_CHECKING:
    from trainers.merge import Merged

ADAPTER_FILE = "adapter_model.safetensors"


def export(
    place: str, *, trial: str | None, output: Path | None, merge: bool, server: str | None
) -> list[str]:
    """Writes a trial's adapter, or its merged weights, into a new folder.

    Args:
        place: folder or URL of a sweep or study.
        trial: default: the best one.
        output: default: export/adapter or export/merged in the run's folder.
        server: what it must run on ('vllm'), or None.

    Returns:
        What there is to say, a line each; the last names the folder.

    Raises:
        ValueError: no such trial, nothing to export, or something that the server would refuse. Nothing is
            left behind.
    """
    if server is not None and server not in SERVERS:
        raise ValueError(f"--for must be one of {', '.join(SERVERS)}, got {server!r}")
    run = run_at(place)
    record = _chosen(run, place, trial)
    config = read_state(run.trial(record.name).config)
    weights = _weights(run, record, config)
    target = output or default_output(run, merge=merge)
    _require_new(target)
    adapter = portable_config(weights, read_state(run.resolved)["config"])
    spoken = [] if merge or server is None else _checked_for_vllm(adapter, config)
    missing = [folder for folder in target.parents if not folder.exists()]
    temporary = temporary_folder(target)
    try:
        if merge:
            with working("loading the base, merging and comparing logits"):
                merged = _merge(config, weights, temporary)
            spoken = _merged_lines(merged)
        else:
            shutil.copy2(weights / ADAPTER_FILE, temporary / ADAPTER_FILE)
            write_json(temporary / ADAPTER_CONFIG, adapter)
        _add_tokenizer(config, temporary)
        seal_folder(temporary)
        replace_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary)
        for folder in missing:
            folder.rmdir()
        raise
    what = "merged weights" if merge else "adapter"
    return [*spoken, f"{what} of {record.name}: {shown(target)}"]


def _require_new(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target}: must be new, it exists; give another folder (-o)")
    require_place(target)


def _chosen(run: RunPaths, place: str, trial: str | None) -> TrialRecord:
    if not run.trials.is_dir() or not run.resolved.is_file():
        raise ValueError(f"{place}: must be the folder of a sweep or study (trials/), it is not")
    records = read_trials(run)
    if trial is None:
        if (best := best_trial(records)) is None:
            raise ValueError(f"{place}: no trial ended with a usable score; name one by --trial")
        return best
    for record in records:
        if record.name == trial:
            return record
    raise ValueError(
        f"{place}: has no trial {trial!r}; it has {', '.join(r.name for r in records[:3])}"
        f"{' ...' if len(records) > 3 else ''}"
    )


def _weights(run: RunPaths, record: TrialRecord, config: Mapping[str, Any]) -> Path:
    folder = run.trial(record.name).best
    fetch_folder(folder)
    if config["candidate"]["full_finetune"]:
        raise ValueError(f"{record.name}: is a full fine-tuning; its best/ is a model as it is")
    if not (folder / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{record.name}: must have weights in best/, it has none (a study keeps none; a trial that was "
            "stopped before its first evaluation neither)"
        )
    check_folder(folder)
    return folder


def default_output(run: RunPaths, *, merge: bool) -> Path:
    """Where an export goes that was given no folder.

    Raises:
        ValueError: the run is on an object store.
    """
    if mirror_of(run.root):
        raise ValueError(f"{shown(run.root)}: is a URL; name a folder for what is exported (-o)")
    return run.root / "export" / ("merged" if merge else "adapter")


def _checked_for_vllm(adapter: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    base = read_json(config_path(config["base"]["model"], config["base"]["revision"]))
    vocab_size = (base.get("text_config") or base)["vocab_size"]
    if refusals := list(vllm_refusals(adapter, vocab_size)):
        raise ValueError(
            "\n".join(f"vLLM: {line}; export merged weights (--merge)" for line in refusals)
        )
    return [f"vLLM: {line}" for line in vllm_remarks(adapter)]


def _merge(config: dict[str, Any], weights: Path, folder: Path) -> "Merged":
    # It says while it is imported that it lacks a kernel for CPUs, which is not this user's concern.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from trainers.merge import merge_adapter, published_dtype
    from trainers.sft_trainer import adapter_of
    from trainers.trial_spec import TrialSpec

    spec = TrialSpec.from_dict(config)
    base = replace(spec.base, dtype=published_dtype(spec.base))
    shape = model_shape(base.model, base.revision)
    return merge_adapter(base, adapter_of(spec.candidate, shape), weights, folder)


def _merged_lines(merged: "Merged") -> list[str]:
    lines = [
        f"{merged.num_layers} layers merged; logits differ from base and adapter by {merged.logits_error:.1e} of "
        f"the largest (at most {merged.tolerance:g})"
    ]
    if merged.nf4_error is not None:
        lines.append(
            f"merged into the NF4 weights that the adapter was trained on, dequantized: they are "
            f"{merged.nf4_error:.1%} off the published ones, their logits {merged.nf4_logits_error:.1%} of the "
            "largest"
        )
    if merged.untied:
        lines.append("the head was tied to the embedding: it has weights of its own now")
    return lines


def _add_tokenizer(config: Mapping[str, Any], folder: Path) -> None:
    data = DataSpec(**config["data"])
    local = replace(data, model=str(tokenizer_folder(data.model, data.revision)))
    for name, file in tokenizer_files(local).items():
        shutil.copy2(file, folder / name)
