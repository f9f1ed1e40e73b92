"""Fixtures of the training tests."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainers.tiny import Rows, random_rows, tiny_model
from tests.trainers.trials import CANDIDATE, numbers, trial
from trainers.base_model import BaseSpec
from trainers.sft_trainer import TrialSpec, train_trial

# The models here are so small that threads only wait for each other: minutes on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    """A random model of two layers with the vocabulary of the shipped tokenizer."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    tiny_model(torch.float32, vocab_size=3072).save_pretrained(folder)
    return folder


@pytest.fixture
def rows() -> Rows:
    return random_rows(40)


@pytest.fixture
def held_out() -> Rows:
    return random_rows(7, seed=1)


@pytest.fixture
def data_file(tmp_path, monkeypatch) -> Path:
    """60 rows of code to complete, with a fresh cache."""
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "prompt": f"def double_{i}(x):\n",
            "completion": f"    return {i} * x + {i % 7}\n" * (1 + i % 3),
        }
        for i in range(60)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def fp32(tiny_folder) -> BaseSpec:
    return BaseSpec(model=tiny_folder, quantization="none", dtype="fp32")


@pytest.fixture
def fp64(fp32) -> BaseSpec:
    """Neighbours change the rounding: trials in packs are compared in float64."""
    return replace(fp32, dtype="fp64")


@pytest.fixture
def make(data_file, tmp_path, fp32):
    """make(name, base=..., lora_rank=...): a trial with evaluations after 4, 8 and 12 examples, one
    step of two forwards each."""

    def made(name: str, *, folder: str = "served", **changes) -> TrialSpec:
        own = {"num_examples": 12, "eval_every": 4, "micro_batch_size": 2, "base": fp32}
        own |= {k: changes.pop(k) for k in list(changes) if k in TrialSpec.__dataclass_fields__}
        candidate = replace(CANDIDATE, **({"global_batch_size": 4} | changes))
        return trial(data_file, tmp_path / folder / name, candidate=candidate, **own)

    return made


@pytest.fixture
def alone(tmp_path):
    """alone(spec): its numbers after training by itself, in a folder of its own."""

    def rows(spec: TrialSpec) -> list[dict]:
        folder = tmp_path / "alone" / spec.name
        return numbers(train_trial(replace(spec, folder=folder), lambda row: True).rows)

    return rows
