"""Sums over workers: the flat way of small adapters and the in-place way of large ones agree."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainers import comm
from trainers.paths import read_json, write_json


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = []
    for limit in (1 << 20, 0):
        comm.FLAT_BYTES = limit
        generator = torch.Generator().manual_seed(rank)
        gradients = [torch.randn(3, 5, generator=generator), torch.randn(7, generator=generator)]
        nats = torch.tensor(rank + 0.25, dtype=torch.float64)
        total = comm.Comm().sum_gradients(gradients, nats)
        found.append([float(total), *torch.cat([g.reshape(-1) for g in gradients]).tolist()])
    write_json(Path(folder) / f"{rank}.json", found)
    dist.destroy_process_group()


@pytest.mark.slow
def test_sum_gradients_flat_and_in_place_are_the_same_on_both_workers(tmp_path):
    mp.spawn(_work, args=(str(tmp_path),), nprocs=2)
    first, second = (read_json(tmp_path / f"{rank}.json") for rank in (0, 1))
    assert first == second
    assert first[0] == first[1]
    parts = [
        [torch.randn(3, 5, generator=g), torch.randn(7, generator=g)]
        for g in (torch.Generator().manual_seed(rank) for rank in (0, 1))
    ]
    expected = torch.cat([(a + b).reshape(-1) for a, b in zip(*parts, strict=True)])
    assert first[0][0] == 1.5
    assert first[0][1:] == pytest.approx(expected.tolist(), abs=1e-6)
