"""Measuring the size of a forward: nothing of it stays in the pack."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from search_spaces.architecture import ModelShape
from tests.trainers.packs import Bench
from tests.trainers.tiny import tiny_model
from trainers.measure import SIZES, measure_max_tokens
from trainers.speed import measured_once, read_speed


@pytest.mark.parametrize("lora_rank", [2, 32], ids=["less than the pack's", "more"])
def test_measure_max_tokens_leaves_a_training_pack_as_it_was(lora_rank):
    benches = [Bench(tiny_model(), max_tokens=60) for _ in range(2)]
    for bench in benches:
        for name in "ae":
            bench.enter(name)
        bench.until_accumulating("a", steps_done=2)
    measured, untouched = benches
    shape = ModelShape.from_config(measured.model.config.to_dict())
    found = measure_max_tokens(measured.pack, shape, lora_rank, row_tokens=64)
    sizes = SIZES["cpu"]
    assert found["max_tokens"] in sizes
    assert set(found["seconds_per_token"]) == {str(size) for size in sizes}
    assert all(seconds > 0 for seconds in found["seconds_per_token"].values())
    assert set(measured.pack.slots) == set(untouched.pack.slots)
    for index, slot in measured.pack.slots.items():
        for kind in ("parameters", "gradients"):
            theirs = getattr(untouched.pack.slots[index], kind)
            assert all(torch.equal(v, theirs[n]) for n, v in getattr(slot, kind).items())
    for bench in benches:
        bench.train()
    for name in "ae":
        assert measured.losses[name].train == pytest.approx(untouched.losses[name].train, abs=1e-9)


def test_measure_max_tokens_rows_longer_than_a_forward_are_measured_too():
    bench = Bench(tiny_model(max_position_embeddings=4096))
    shape = ModelShape.from_config(bench.model.config.to_dict())
    found = measure_max_tokens(bench.pack, shape, 4, row_tokens=3000)
    assert found["max_tokens"] in SIZES["cpu"]
    assert not bench.pack.slots


def test_measured_once_of_groups_that_start_together_is_the_same_for_all(tmp_path):
    path, begun, started = tmp_path / "speed" / "a.json", [], threading.Barrier(3)

    def measure() -> dict[str, int]:
        begun.append(time.monotonic())
        time.sleep(0.2)
        return {"max_tokens": 512 * len(begun)}

    def group(_: int) -> dict[str, int]:
        started.wait()
        return measured_once(path, measure)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(group, range(3))) == [{"max_tokens": 512}] * 3
    assert len(begun) == 1
    assert read_speed(path) == measured_once(path, measure) == {"max_tokens": 512}


def test_measured_once_that_fails_leaves_it_to_the_next(tmp_path):
    path = tmp_path / "a.json"

    def fail() -> dict[str, int]:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        measured_once(path, fail)
    assert read_speed(path) is None
    assert measured_once(path, lambda: {"max_tokens": 1}) == {"max_tokens": 1}
