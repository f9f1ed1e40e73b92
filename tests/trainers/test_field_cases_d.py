"""Field cases of distributed training (part D), each with its own input and value."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM

from tests.trainers.packs import adapter
from tests.trainers.tiny import Row, Rows, tiny_model
from trainers.adapters import Pack
from trainers.base_model import nf4_config
from trainers.batches import RowSource
from trainers.comm import Comm
from trainers.composer import ForwardLimits
from trainers.loop import Trainer
from trainers.paths import read_json, write_json
from trainers.runs import RunSpec, new_run
from trainers.sharding import zero3_config

CPU = torch.device("cpu")
EVAL_ANSWERS = (1, 2, 4, 50, 100)


def rows(*answers: int) -> Rows:
    """Rows of three prompt tokens and so many answer tokens."""
    generator = np.random.default_rng(0)
    made = []
    for count in answers:
        mask = np.arange(3 + count) >= 3
        made.append(Row(generator.integers(5, 256, 3 + count), mask))
    return Rows(made)


def trainer(micro_batch_size: int, comm: Comm | None = None) -> Trainer:
    pack = Pack(tiny_model())
    limits = ForwardLimits(max_tokens=1 << 20, micro_batch_size=micro_batch_size)
    held_out = RowSource(rows(*EVAL_ANSWERS), 0, CPU)
    return Trainer(pack, RowSource(rows(1, 50), 0, CPU), held_out, limits=limits, comm=comm)


def step(micro_batch_size: int, comm: Comm | None = None) -> list[float]:
    """The weights after one optimizer step on both rows, and its loss."""
    made = trainer(micro_batch_size, comm)
    slot = made.pack.enter(adapter(made.pack.model, "a"))
    spec = RunSpec(learning_rate=1e-2, global_batch_size=2, num_examples=4, eval_every=1)
    run = new_run(made.pack, slot, spec)
    while run.steps == 0:
        made.advance([run])
    nats, tokens = run.since_report[0]
    weights = torch.cat([view.reshape(-1) for view in run.slot.parameters.values()])
    return [nats / tokens, run.grad_norm, *weights[:: max(1, len(weights) // 500)].tolist()]


def evaluation(micro_batch_size: int, comm: Comm | None = None) -> float:
    return trainer(micro_batch_size, comm).eval_losses(None)[0]


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {"step": step(1, Comm()), "evaluation": evaluation(1, Comm())}
    write_json(Path(folder) / f"{rank}.json", found)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(_work, args=(str(folder),), nprocs=2)
    return [read_json(folder / f"{rank}.json") for rank in (0, 1)]


@pytest.mark.parametrize(
    ("storage", "dtypes"),
    [(torch.uint8, {torch.uint8, torch.bfloat16}), (torch.bfloat16, {torch.bfloat16})],
    ids=["default", "sharded"],
)
def test_d02_nf4_stored_in_the_compute_type_leaves_one_dtype(tmp_path, storage, dtypes):
    # What is sharded is flattened together and must be of one type; adapters are fp32, in their store.
    tiny_model(torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        device_map={"": CPU},
        quantization_config=nf4_config(torch.bfloat16, storage=storage),
    )
    assert {parameter.dtype for parameter in model.parameters()} == dtypes
    pack = Pack(model)
    pack.enter(adapter(model, "a"))
    assert pack.store.memory_4SP.dtype == torch.float32


def test_d05_zero3_config_gives_micro_batch_and_accumulation_alone():
    config = zero3_config(micro_batch_size=2, grad_accum_steps=4)
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert "train_batch_size" not in config


def test_d07_gradient_of_one_and_fifty_tokens_is_that_of_any_micro_batch():
    assert step(1) == pytest.approx(step(2), abs=1e-10)


@pytest.mark.slow
def test_d07_gradient_of_one_and_fifty_tokens_is_that_of_two_workers(two_workers):
    # In between: a mean for each worker would weigh the single token as much as the fifty.
    for found in two_workers:
        assert found["step"] == pytest.approx(step(2), abs=1e-10)


def test_d08_eval_loss_is_that_of_any_batch_size():
    losses = [evaluation(size) for size in (1, 2, 8)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-12)


@pytest.mark.slow
def test_d08_eval_loss_is_that_of_two_workers(two_workers):
    for found in two_workers:
        assert found["evaluation"] == pytest.approx(evaluation(8), abs=1e-12)
