"""Field cases of placement (part D), each with its own input and value."""

from pathlib import Path

import pytest

from cluster.gpus import GB, parse_inventory
from cluster.holding import BaseHolding
from cluster.memory import load_peak_bytes
from cluster.packing import FORWARD_TOKENS, worker_needs
from cluster.placement import split_global_batch
from cluster.strategy import Asked, DoesNotFitError, Workload, choose
from search_spaces.architecture import ModelShape

LLAMA_70B = Path(__file__).resolve().parents[3] / "shared" / "models" / "Llama-3.1-70B.json"
ALL = ("attn", "mlp", "unembed")


@pytest.fixture(scope="module")
def llama() -> ModelShape:
    if not LLAMA_70B.is_file():
        pytest.skip("needs ../shared/models/Llama-3.1-70B.json")
    return ModelShape.from_config(LLAMA_70B)


def verdict(shape: ModelShape, inventory: str, lora_rank: int):
    needs = worker_needs(shape, target=ALL, compute_bytes=2, on_gpu=True, packing=False)
    work = Workload(
        lora_rank=lora_rank,
        row_tokens=1024,
        global_batch_sizes=(16, 32),
        num_trials=8,
        quantized=True,
    )
    wanted = FORWARD_TOKENS["gpu"]
    return choose(needs, work, parse_inventory(inventory), Asked(), wanted_tokens=wanted)


def test_d03_loading_70b_in_parts_never_holds_a_copy_of_it(llama):
    # 35 GB in four bits, of which an eighth is 4.4; the embedding and head are 2.1 each in bf16.
    whole = BaseHolding(quantized=True, compute_bytes=2)
    parts = BaseHolding(quantized=True, compute_bytes=2, num_workers=8, sharded=True)
    assert load_peak_bytes(llama, whole) > 38 * GB
    assert load_peak_bytes(llama, parts) < 12 * GB


def test_d03_70b_on_eight_gpus_of_24_gb_is_sharded_or_refused_with_the_bytes(llama):
    fit = verdict(llama, "8x24GB", lora_rank=16)
    assert fit.way.strategy == "zero3"
    assert fit.needed_bytes <= 24 * GB
    # The doctrine's rank: 1.7 billion parameters of 16 bytes are more than the GPU.
    assert 16 * llama.lora_params(128, ALL) > 24 * GB
    with pytest.raises(DoesNotFitError, match="ZeRO-3 over 8 workers") as error:
        verdict(llama, "8x24GB", lora_rank=128)
    assert "what would fit: lora_rank" in str(error.value)


@pytest.mark.parametrize(
    ("world_size", "micro", "accumulation"), [(8, 2, 2), (16, 2, 1), (1, 2, 16), (32, 1, 1)]
)
def test_d04_micro_times_accumulation_times_world_is_the_global_batch(
    world_size, micro, accumulation
):
    split = split_global_batch(32, world_size, 2)
    assert (split.micro_batch_size, split.grad_accum_steps) == (micro, accumulation)
    assert micro * accumulation * world_size == 32


@pytest.mark.parametrize(("batch", "world_size"), [(32, 6), (16, 32)])
def test_d04_workers_that_cannot_share_the_batch_are_refused(batch, world_size):
    with pytest.raises(ValueError, match="multiple of workers_per_trial") as error:
        split_global_batch(batch, world_size, 2)
    assert str(world_size) in str(error.value)
    assert f"got {batch}" in str(error.value)
