"""Fixtures of the training tests."""

import json
from pathlib import Path

import pytest
import torch

from tests.trainers.tiny import Rows, random_rows, tiny_model

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
