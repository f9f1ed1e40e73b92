"""Field cases of sweeps (part C) that a trial decides by itself, each with its own input and value. The others are
in tests/orchestration."""

import hashlib
import json
import math
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from tests.trainers.packs import adapter
from tests.trainers.tiny import tiny_model
from tests.trainers.trials import BASE, CANDIDATE, trial
from trainers.adapters import Pack
from trainers.data import DataSpec, prepare_data
from trainers.loop import Trainer
from trainers.paths import read_json, write_json
from trainers.sft_trainer import TrialSpec, train_trial

WEIGHTS = "adapter_model.safetensors"
SCRIPTED = CANDIDATE.__class__.from_dict(CANDIDATE.to_dict() | {"global_batch_size": 10})
HANG_S = 60
"""How long two workers may need for three rows; apart from each other they would wait for ever."""


def scripted(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Lets the base lose 9 and evaluation after evaluation these."""
    made = iter((9.0, *losses))
    others = {"eval_bits_per_byte": 1.0, "retention_loss": None}
    monkeypatch.setattr(
        Trainer, "_scores_of", lambda trainer, run: {"eval_loss": next(made)} | others
    )


def test_c04_every_report_of_a_trial_that_trains_between_evaluations_has_the_metric(
    data_file, tmp_path
):
    # Field case C04: train step 10, eval every 20.
    spec = trial(data_file, tmp_path / "t", candidate=SCRIPTED, num_examples=40, eval_every=20)
    reports: list[dict] = []
    result = train_trial(spec, lambda row: reports.append(row) is None)
    assert [(row["examples"], row["steps"]) for row in reports] == [(0, 0), (20, 2), (40, 4)]
    assert all(math.isfinite(row["eval_loss"]) for row in reports)
    assert result.status == "finished"


def test_c05_losses_3_1_2_give_the_adapter_of_step_2(data_file, tmp_path, monkeypatch):
    # Field case C05.
    scripted(monkeypatch, 3.0, 1.0, 2.0)
    spec = trial(data_file, tmp_path / "t", candidate=SCRIPTED, num_examples=30, eval_every=10)
    at_step: dict[int, dict[str, torch.Tensor]] = {}

    def keep(row: dict) -> bool:
        at_step[row["steps"]] = load_file(spec.folder / "checkpoint" / WEIGHTS)
        return True

    result = train_trial(spec, keep)
    assert result.best is not None
    assert (result.best["eval_loss"], result.best["steps"]) == (1.0, 2)
    best = load_file(spec.folder / "best" / WEIGHTS)
    same = {step for step, found in at_step.items() if all(best[k].equal(found[k]) for k in best)}
    assert same == {2}


def test_c06_trial_that_is_stopped_at_its_first_report_has_the_adapter_that_scored(
    data_file, tmp_path
):
    # Field case C06: report at step 1, stop.
    spec = trial(data_file, tmp_path / "t", candidate=SCRIPTED, num_examples=40, eval_every=10)
    seen: list[bool] = []

    def stop(row: dict) -> bool:
        if row["steps"] == 0:
            return True
        seen.append((spec.folder / "best" / WEIGHTS).is_file())
        return False

    result = train_trial(spec, stop)
    assert (result.status, seen) == ("stopped", [True])
    assert result.best is not None
    assert result.best["steps"] == 1
    saved = load_file(spec.folder / "best" / WEIGHTS)
    assert any(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name)


def _uneven(rank: int, spec: TrialSpec, meeting: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    reports: list[int] = []
    train_trial(spec, lambda row: reports.append(row["examples"]) is None)
    write_json(Path(folder) / f"{rank}.json", {"reports": reports})
    dist.destroy_process_group()


@pytest.mark.slow
def test_c11_three_rows_on_two_workers_are_reported_equally_by_both(data_file, tmp_path):
    # Field case C11: 2 workers, 3 rows (uneven).
    lines = data_file.read_text().splitlines(keepends=True)
    data_file.write_text("".join(lines[:3]))
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("".join(lines[3:6]))  # three: uneven again
    spec = trial(data_file, tmp_path / "t", num_examples=9, eval_every=3)
    spec = replace(
        spec,
        data=replace(spec.data, eval=str(held_out)),
        candidate=replace(CANDIDATE, global_batch_size=3),
        micro_batch_size=1,
    )
    meeting = f"file://{tmp_path}/meeting"
    workers = mp.spawn(_uneven, args=(spec, meeting, str(tmp_path)), nprocs=2, join=False)
    assert workers is not None
    until = time.monotonic() + HANG_S
    while not workers.join(timeout=1):
        assert time.monotonic() < until, "the workers wait for each other"
    found = [read_json(tmp_path / f"{rank}.json") for rank in (0, 1)]
    assert found == [{"reports": [0, 3, 6, 9]}] * 2


def adapter_hash(seed: int) -> str:
    """SHA-256 of all lora_A of a new adapter."""
    pack = Pack(model := tiny_model(torch.float32))
    slot = pack.slots[pack.enter(adapter(model, "a", seed=seed))]
    parts = [t.detach().numpy().tobytes() for n, t in sorted(slot.parameters.items()) if "_A" in n]
    assert parts
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_c17_seed_7_twice_gives_one_adapter_and_seed_8_another(data_file, tmp_path):
    # Field case C17: one TINY trial run twice with seed 7.
    first = adapter_hash(7)
    torch.rand(5)  # the process's own generator has gone on
    assert adapter_hash(7) == first
    assert adapter_hash(8) != first
    candidate = replace(SCRIPTED, seed=7)
    hashes = set()
    for name in ("one", "two"):
        torch.rand(5)
        spec = trial(
            data_file, tmp_path / name, candidate=candidate, num_examples=20, eval_every=20
        )
        train_trial(spec, lambda row: True)
        hashes.add((spec.folder / "best" / WEIGHTS).read_bytes())
    assert len(hashes) == 1


def _hash(rank: int, folder: str) -> None:
    torch.manual_seed(rank)  # ranks whose generators differ
    write_json(Path(folder) / f"{rank}.json", {"hash": adapter_hash(7)})


@pytest.mark.slow
def test_c17_seed_7_gives_one_adapter_on_both_ranks(tmp_path):
    # Field case C17.
    mp.spawn(_hash, args=(str(tmp_path),), nprocs=2)
    assert [read_json(tmp_path / f"{rank}.json")["hash"] for rank in (0, 1)] == [
        adapter_hash(7)
    ] * 2


def _prepare(spec: DataSpec, start: "multiprocessing.synchronize.Barrier", path: Path) -> None:
    start.wait()
    prepared = prepare_data(spec)
    num_rows = len(prepared.train) + len(prepared.eval)
    write_json(path, {"rows": num_rows, "ids": prepared.train.input_ids.tolist()})


@pytest.mark.parametrize("repeat", range(3))
def test_c18_eight_starts_on_an_empty_cache_make_one_set_and_read_the_same(
    data_file, tmp_path, repeat
):
    # Field case C18: empty cache folder, 8 trials, 3 repeats.
    cache = tmp_path / "cache"
    assert not cache.exists()
    spec = DataSpec(data=str(data_file), model=BASE, seq_len=96, eval=0.2)
    context = multiprocessing.get_context("fork")  # all at once: nothing is imported in between
    barrier = context.Barrier(8)
    paths = [tmp_path / f"{number}.json" for number in range(8)]
    starts = [context.Process(target=_prepare, args=(spec, barrier, path)) for path in paths]
    for one in starts:
        one.start()
    for one in starts:
        one.join()
    assert [one.exitcode for one in starts] == [0] * 8
    found = [json.loads(path.read_text()) for path in paths]
    assert found == [found[0]] * 8
    assert found[0]["rows"] == 60
    (whole,) = (cache / "sets").iterdir()
    assert sorted(path.name for path in whole.iterdir()) == [
        "audit.json",
        "checksums.json",
        "eval",
        "train",
    ]
