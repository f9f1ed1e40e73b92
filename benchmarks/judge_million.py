"""CPU seconds for judging a million candidates of Llama-3.1-8B against 1e9 bits.

Run: PYTHONPATH=. python benchmarks/judge_million.py
"""

import itertools
import time

from search_spaces.architecture import ModelShape
from search_spaces.pruner import prune
from search_spaces.space import build_space, grid_candidates

LLAMA31_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
OVERRIDES = {
    "learning_rate": {"low": 1e-5, "high": 1e-3, "num": 50},
    "lora_rank": [2**n for n in range(10)],
    "target": [["attn"], ["mlp"], ["attn", "mlp"], ["attn", "mlp", "unembed"]],
    "global_batch_size": [16, 24, 32, 48, 64],
    "seed": list(range(100)),
}
NUM_CANDIDATES = 1_000_000


def main() -> None:
    shape = ModelShape.from_config(LLAMA31_8B)
    space = build_space(shape, overrides=OVERRIDES)
    start = time.process_time()
    candidates = list(itertools.islice(grid_candidates(space), NUM_CANDIDATES))
    made = time.process_time()
    result = prune(candidates, shape, 10**9)
    judged = time.process_time()
    print(f"{len(candidates):,} candidates made in {made - start:.2f} CPU s")
    print(
        f"judged in {judged - made:.2f} CPU s: {len(result.admitted):,} admitted, "
        f"{len(result.discarded):,} discarded"
    )


if __name__ == "__main__":
    main()
