"""Small real models and rows for the training tests."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TINY_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    # Ten times the usual scale: a random model whose losses move when it is trained.
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray | None = None


class Rows:
    """Tokenized rows as the loop reads them, without a tokenizer or a file."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.lengths = np.array([len(row.input_ids) for row in rows])
        self.loss_token_counts = np.array([int(row.loss_mask.sum()) for row in rows])
        self.num_loss_bytes = int(self.loss_token_counts.sum()) * 3

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> Row:
        return self.rows[index]


def random_rows(num_rows: int, seed: int = 0, longest: int = 24) -> Rows:
    """Rows of 4..longest tokens whose last third or so is loss-bearing."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        length = int(generator.integers(4, longest + 1))
        mask = np.arange(length) >= int(generator.integers(1, length - 1))
        rows.append(Row(generator.integers(5, 256, length), mask))
    return Rows(rows)


def tiny_model(dtype: torch.dtype = torch.float64, **changes: object) -> LlamaForCausalLM:
    """A frozen random Llama; the same weights for the same arguments."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(TINY_LLAMA | changes))).to(dtype)
    model.requires_grad_(False)
    return model.eval()
