"""Forwards without room: halved with the global batch kept; what does not fit at all fails alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.trainers.links import FakeLink, enter
from tests.trainers.packs import Bench, alone
from tests.trainers.tiny import tiny_model
from tests.trainers.trials import trial
from trainers.base_model import BaseSpec
from trainers.comm import Comm
from trainers.out_of_memory import is_out_of_memory
from trainers.pack_server import PackServer
from trainers.paths import TrialPaths, read_json, read_state, write_json
from trainers.sft_trainer import Station

BYTES = 1 << 50
"""More than any machine has: what the allocator says of it is its own."""


def allocate() -> None:
    torch.empty(BYTES, dtype=torch.uint8)


class Device:
    """A device on which forwards up to so many tokens have room, of some slots."""

    def __init__(self, bench: Bench, tokens: int, slots: Callable[[tuple], bool] = bool) -> None:
        self.head, self.tokens, self.slots = bench.trainer.head, tokens, slots
        self.sizes: list[int] = []
        self.num_failures = 0
        for name in ("train_nats", "eval_nats"):
            setattr(self.head, name, self._limited(getattr(self.head, name), name))

    def _limited(self, compute, name: str):
        def limited(batch, slots, *rest):
            size = batch.ids_BT.numel()
            inside = slots if name == "train_nats" else (slots,)
            if size > self.tokens and self.slots(inside):
                if name == "train_nats":  # in the middle of it: gradients are half there
                    compute(batch, slots, *rest)
                self.num_failures += 1
                allocate()
            self.sizes.append(size)
            return compute(batch, slots, *rest)

        return limited


def bench_of(*names: str) -> Bench:
    bench = Bench(tiny_model())
    for name in names:
        bench.enter(name)
    return bench


def test_allocator_s_errors_are_known_and_no_other_is():
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        allocate()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_forward_without_room_is_halved_and_every_loss_is_as_with_room():
    expected = {name: alone(tiny_model(), name) for name in "abce"}
    bench = bench_of("a", "b", "c", "e")
    device = Device(bench, tokens=48)
    bench.train()
    assert 0 < device.num_failures < 12  # it is remembered
    assert max(device.sizes) <= 48
    for name, losses in expected.items():
        assert bench.losses[name].train == pytest.approx(losses.train, abs=1e-9)
        assert bench.losses[name].held_out == pytest.approx(losses.held_out, abs=1e-9)
        assert bench.runs[name].status == "finished"
    assert bench.runs["a"].steps == 20  # of 6 examples each: the global batch is kept


def test_single_row_without_room_fails_its_trial_with_its_bytes_and_no_neighbour():
    expected = {name: alone(tiny_model(), name) for name in "ae"}
    bench = bench_of("a", "c", "e")
    Device(bench, tokens=4, slots=lambda slots: bench_slot in slots)
    bench_slot = bench.runs["c"].slot_index
    bench.train()
    failed = bench.runs["c"]
    assert failed.status == "failed"
    assert failed.reason.startswith("out of memory in a forward of a single row (")
    assert f"tried to allocate {BYTES} bytes" in failed.reason
    assert "this worker's peak: " in failed.reason
    assert failed.steps == 0
    assert not any(bool(grads.any()) for grads in failed.slot.grad_rows)
    for name, losses in expected.items():
        assert bench.runs[name].status == "finished"
        assert bench.losses[name].train == pytest.approx(losses.train, abs=1e-9)


def test_evaluation_without_room_is_halved_and_where_a_row_does_not_fit_the_trial_fails():
    bench = bench_of("e")
    whole = bench.trainer.eval_losses(None)
    device = Device(bench, tokens=30, slots=lambda slots: None in slots)
    assert bench.trainer.eval_losses(None) == pytest.approx(whole, abs=1e-12)
    assert device.num_failures > 0
    device.tokens = 2
    bench.trainer.evaluate(bench.runs["e"], lambda run, row: pytest.fail("it has no score"))
    assert bench.runs["e"].status == "failed"
    assert "out of memory in a forward of a single row" in bench.runs["e"].reason


def test_error_that_is_not_the_allocator_s_is_raised():
    bench = bench_of("a")

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("size mismatch")

    bench.trainer.head.train_nats = broken
    with pytest.raises(RuntimeError, match="size mismatch"):
        bench.micro_step()


def test_adapter_without_room_fails_alone_and_its_neighbours_go_on(
    data_file, tmp_path, tiny_folder, monkeypatch
):
    base = BaseSpec(model=tiny_folder, quantization="none", dtype="fp64")
    first, late = (trial(data_file, tmp_path / name, base=base) for name in ("first", "late"))
    server = PackServer(FakeLink([enter(first)]), Comm(), Station)

    def grows() -> bool:
        store = server.station.pack.store
        monkeypatch.setattr(store, "_lay_out", lambda: allocate())
        return True

    server.link = link = FakeLink([enter(first)], (grows, [enter(late)]))
    server.serve()
    assert link.end(late)["status"] == "failed"
    assert link.end(late)["reason"].startswith(
        "out of memory for an adapter of rank 4 beside 1 others"
    )
    assert read_state(TrialPaths(late.folder).status)["status"] == "failed"
    assert link.end(first)["status"] == "finished"
    monkeypatch.undo()
    lone = trial(data_file, tmp_path / "alone", base=base)
    alone_link = FakeLink([enter(lone)])
    PackServer(alone_link, Comm(), Station).serve()
    losses = [
        [row["eval_loss"] for row in one.rows(spec)]
        for one, spec in ((link, first), (alone_link, lone))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    bench = Bench(tiny_model(), comm=Comm())
    for name in ("a", "b", "e"):
        bench.enter(name)
    device = Device(bench, tokens=40) if rank == 1 else None
    bench.train()
    found = {name: losses.train for name, losses in bench.losses.items()}
    failures = device.num_failures if device else 0
    limit = bench.trainer.limits.max_tokens
    found = {"losses": found, "failures": failures, "limit": limit}
    write_json(Path(folder) / f"{rank}.json", found)
    dist.destroy_process_group()


def test_room_missing_on_one_worker_halves_the_forwards_of_both(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    expected = {name: alone(tiny_model(), name).train for name in "abe"}
    mp.spawn(_work, args=(str(tmp_path),), nprocs=2)
    first, second = (read_json(tmp_path / f"{rank}.json") for rank in (0, 1))
    assert second["failures"] > 0
    assert first["limit"] == second["limit"] <= 40
    for found in (first, second):
        for name, losses in expected.items():
            assert found["losses"][name] == pytest.approx(losses, abs=1e-9)
