"""A loss or a gradient that is not finite ends its trial at that step: on every worker alike, whichever worker's
rows it came from, and nobody else's."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.trainers.packs import RUN, Bench
from tests.trainers.tiny import Rows, random_rows, tiny_model
from trainers import comm as comm_module
from trainers.batches import RowSource, Share
from trainers.comm import Comm
from trainers.paths import read_json, write_json

NAN_TOKEN = 7
"""Its embedding is NaN: whoever has a row with it has a loss that is not finite."""
BAD_STEP = 3
SIZE = 6


def rows_with_nan_at(index: int) -> Rows:
    """Rows without NAN_TOKEN but for one."""
    rows = random_rows(40)
    for at, row in enumerate(rows.rows):
        row.input_ids[row.input_ids == NAN_TOKEN] = NAN_TOKEN + 1
        if at == index:
            row.input_ids[0] = NAN_TOKEN
    return rows


def model_with_nan() -> torch.nn.Module:
    model = tiny_model()
    model.model.embed_tokens.weight.data[NAN_TOKEN] = math.nan
    return model


def diverged(comm: Comm) -> dict:
    """How a run ends of which a row of step BAD_STEP gives NaN, and whether this worker had that row."""
    clean = RowSource(random_rows(40), 0, torch.device("cpu"))
    batch = clean.order(RUN.seed, (BAD_STEP - 1) * SIZE, BAD_STEP * SIZE, None)
    bad = int(batch[0])
    bench = Bench(model_with_nan(), rows_with_nan_at(bad), comm=comm)
    run = bench.enter("a", replace(RUN, global_batch_size=SIZE, num_examples=120))
    bench.train()
    own = Share.of(batch, clean.lengths, comm.world_rank, comm.world_size)
    found = {"status": run.status, "reason": run.reason, "steps": run.steps}
    return found | {"had_it": bad in own.rows}


def _work(rank: int, folder: str, flat_bytes: int) -> None:
    torch.set_num_threads(1)
    comm_module.FLAT_BYTES = flat_bytes
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    write_json(Path(folder) / f"{rank}.json", diverged(Comm()))
    dist.destroy_process_group()


def test_nan_in_one_row_ends_the_run_at_the_step_of_that_row():
    found = diverged(Comm())
    assert (found["status"], found["steps"]) == ("diverged", BAD_STEP - 1)
    assert found["reason"] == f"train_loss nan at step {BAD_STEP}"


@pytest.mark.slow
@pytest.mark.parametrize("flat_bytes", [1 << 20, 0], ids=["one-collective", "in-place"])
def test_nan_in_a_row_of_one_worker_ends_the_run_at_that_step_on_both(tmp_path, flat_bytes):
    mp.spawn(_work, args=(str(tmp_path), flat_bytes), nprocs=2)
    found = [read_json(tmp_path / f"{rank}.json") for rank in (0, 1)]
    assert sorted(one.pop("had_it") for one in found) == [False, True]
    expected = {"status": "diverged", "steps": BAD_STEP - 1}
    assert found == [expected | {"reason": f"train_loss nan at step {BAD_STEP}"}] * 2


def poison(bench: Bench, name: str, value: float) -> None:
    """One element of the gradient that a run has summed so far."""
    next(iter(bench.runs[name].slot.gradients.values())).view(-1)[0] = value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_gradient_that_is_not_finite_ends_the_run_though_its_loss_is(value, max_grad_norm):
    bench = Bench(tiny_model(), max_tokens=60)
    spec = replace(RUN, max_grad_norm=max_grad_norm)
    bench.enter("a", spec)
    bench.enter("e", replace(spec, num_examples=60))
    bench.until_accumulating("a", steps_done=2)
    poison(bench, "a", value)
    weights = {n: t.clone() for n, t in bench.runs["a"].slot.parameters.items()}
    bench.train()
    ended, neighbour = bench.runs["a"], bench.runs["e"]
    assert (ended.status, ended.steps) == ("diverged", 2)
    assert ended.reason.startswith("grad_norm ")
    assert ended.reason.endswith(" at step 3")
    assert all(weights[n].equal(t) for n, t in ended.slot.parameters.items())  # no step was made
    assert neighbour.status == "finished"
