"""A small trial on the shipped base, for the tests of whole trials and of the pack server."""

from dataclasses import replace
from pathlib import Path

from search_spaces.candidate import Candidate
from trainers.base_model import BaseSpec
from trainers.data import DataSpec
from trainers.sft_trainer import TrialSpec

ROOT = Path(__file__).resolve().parents[2]
BASE = str(ROOT / "trainers" / "assets" / "tiny-llama")
CANDIDATE = Candidate(
    learning_rate=3e-3,
    lora_rank=4,
    lora_alpha=32.0,
    global_batch_size=8,
    target=("attn", "mlp", "unembed"),
    lr_schedule="cosine",
    warmup=2.0,
    weight_decay=0.01,
    max_grad_norm=1.0,
    dropout=0.1,
    seed=3,
)


def trial(data_file: Path, folder: Path, **changes) -> TrialSpec:
    """Evaluations after 0, 16, 32 and 44 examples."""
    spec = TrialSpec(
        name=folder.name,
        folder=folder,
        base=BaseSpec(model=BASE, quantization="none", dtype="fp32"),
        data=DataSpec(data=str(data_file), model=BASE, seq_len=96, eval=0.2),
        candidate=CANDIDATE,
        num_examples=44,
        eval_every=16,
        micro_batch_size=4,
    )
    return replace(spec, **changes)


def numbers(rows) -> list[dict]:
    """A trial's rows without what no two executions share."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_bytes")} for row in rows]
