"""The gate of every save: planted faults and the sentence that each gets, and who ends by them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.trainers.links import FakeLink, allow, enter
from tests.trainers.packs import Bench
from tests.trainers.tiny import Rows, random_rows, tiny_model
from tests.trainers.trials import CANDIDATE, numbers, trial
from trainers import checkpoint
from trainers.base_model import BaseSpec
from trainers.batches import RowSource
from trainers.checkpoint import load_checkpoint, save_checkpoint, save_weights
from trainers.comm import Comm
from trainers.full import unfreeze
from trainers.gate import GateError, Probe, check_saved
from trainers.integrity import seal_folder
from trainers.pack_server import PackServer
from trainers.paths import TrialPaths, previous_of, read_json, read_json_lines, read_state
from trainers.runs import RunSpec, new_run
from trainers.sft_trainer import Station, TrialSpec, train_trial

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYERS = 2 * 7 + 1  # two blocks of seven projections, and the head
PREFIX = "base_model.model."
UP_PROJ = "model.layers.1.mlp.up_proj"
RUN_SPEC = RunSpec(learning_rate=1e-3, global_batch_size=1, num_examples=1, eval_every=1)


def trained(name: str = "a", *beside: str) -> Bench:
    """An adapter after four steps: of every layer, rank 4."""
    bench = Bench(tiny_model())
    for one in (*beside, name):
        bench.enter(one)
    while bench.runs[name].steps < 4:
        bench.micro_steps(1)
    return bench


def save(bench: Bench, folder: Path, name: str = "a", probe_loss: float | None = None):
    save_checkpoint(
        bench.pack,
        bench.runs[name],
        folder,
        base_name="org/base",
        revision=None,
        probe_loss=probe_loss,
    )
    return bench.runs[name]


def without(tensors, *parts: str):
    return {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


def emptied(tensors):
    return {name: torch.empty(0) for name in tensors}


def with_one_number_more(tensors):
    first = next(iter(tensors))
    changed = tensors[first].clone()
    changed[0, 0] = 7.0
    return tensors | {first: changed}


def one_eighth(tensors):
    """What one of eight workers holds; the rest zero, as a sharded saver left it."""
    kept = sorted(tensors)[: len(tensors) // 8]
    return {name: t if name in kept else torch.zeros_like(t) for name, t in tensors.items()}


FIRST = f"{PREFIX}lm_head.lora_A.weight"
MUST = "must hold 30 tensors"
FAULTS = {
    "empty": (
        emptied,
        f"{MUST} with numbers, 30 are empty; first: {FIRST}, of shape [0] for [4, 64]",
    ),
    "nothing": (
        lambda t: {},
        f"{MUST} (2 for each of 15 layers), holds 0; missing first: {FIRST}; layer lm_head has no adapter",
    ),
    "some": (
        lambda t: without(t, "lora_B", "lm_head", "k_proj"),
        f"{MUST} (2 for each of 15 layers), holds 12; missing first: {FIRST}",
    ),
    "a layer": (
        lambda t: without(t, UP_PROJ),
        f"holds 28; missing first: {PREFIX}{UP_PROJ}.lora_A.weight; layer {UP_PROJ} has no adapter",
    ),
    "a stranger": (
        lambda t: t | {"x.lora_A.weight": torch.ones(1)},
        "holds 31; not among them: x.lora_A.weight",
    ),
    "transposed": (
        lambda t: {n: v.T.contiguous() for n, v in t.items()},
        "lm_head.lora_A.weight must be of shape [4, 64], is [64, 4]",
    ),
    "a number": (
        with_one_number_more,
        "must be what was trained, bit for bit; of 256 numbers 1 differ",
    ),
    "another type": (
        lambda t: {n: v.float() for n, v in t.items()},
        "must be what was trained, bit for bit",
    ),
    "one eighth": (one_eighth, "must be what was trained, bit for bit"),
    "a nan": (lambda t: {n: v / 0 for n, v in t.items()}, "holds a number that is not finite"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_gate_saved_adapter_that_is_not_the_trained_one_is_refused_with_its_numbers(
    fault, tmp_path
):
    spoil, message = FAULTS[fault]
    bench = trained()
    run = save(bench, tmp_path / "saved")
    check_saved(tmp_path / "saved", bench.pack, run)  # as it was saved, it passes
    tensors = load_file(tmp_path / "saved" / ADAPTER)
    assert len(tensors) == 2 * LAYERS
    save_file(spoil(tensors), tmp_path / "saved" / ADAPTER)
    with pytest.raises(GateError, match=re.escape(message)) as error:
        check_saved(tmp_path / "saved", bench.pack, run)
    assert str(error.value).startswith(ADAPTER)


@pytest.mark.parametrize("num_bytes", [0, 40, 4000])
def test_gate_file_that_was_cut_short_is_refused_with_its_size(num_bytes, tmp_path):
    bench = trained()
    run = save(bench, tmp_path / "saved")
    path = tmp_path / "saved" / ADAPTER
    path.write_bytes(path.read_bytes()[:num_bytes])
    message = rf"\({num_bytes:,} bytes\) is no readable safetensors file"
    with pytest.raises(GateError, match=message):
        check_saved(tmp_path / "saved", bench.pack, run)
    path.unlink()
    with pytest.raises(GateError, match=r"adapter_model\.safetensors must be there"):
        check_saved(tmp_path / "saved", bench.pack, run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, "r must be 4, is 8"),
        ({"lora_alpha": 8}, "lora_alpha must be 32, is 8"),
        ({"use_rslora": True}, "use_rslora must be False, is True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern must be {}"),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "target_modules must reach 15 layers, reaches 3; layer model.layers.0.mlp.down_proj has",
        ),
        (
            {"target_modules": ["embed_tokens"]},
            "must reach 15 layers, reaches 1; layer lm_head has",
        ),
        ({"peft_type": "no such thing"}, "PEFT cannot read it"),
    ],
)
def test_gate_config_that_peft_would_load_as_another_adapter_is_refused(changes, message, tmp_path):
    bench = trained()
    run = save(bench, tmp_path / "saved")
    path = tmp_path / "saved" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(GateError, match=re.escape(message)) as error:
        check_saved(tmp_path / "saved", bench.pack, run)
    assert str(error.value).startswith(CONFIG)


def test_gate_lora_b_all_zero_is_refused_after_training_and_right_before_it(tmp_path):
    bench = Bench(tiny_model())
    run = bench.enter("a")
    save(bench, tmp_path / "at the start")
    run.steps = 3
    with pytest.raises(GateError, match="every lora_B is zero after 3 steps"):
        save(bench, tmp_path / "after")
    assert [path.name for path in tmp_path.iterdir()] == ["at the start"]  # and nothing half done
    run.slot.parameters[f"{PREFIX}{UP_PROJ}.lora_B.weight"][5, 1] = 1e-9
    save(bench, tmp_path / "after")


def test_gate_numbers_beside_the_adapters_own_which_no_file_would_hold_are_refused(tmp_path):
    bench = trained("a", "d")  # d is of rank 16, so a's rows go on after its own four
    save(bench, tmp_path / "saved")
    (row,) = bench.runs["a"].slot.weights
    view = bench.pack.store.A_4SRI[UP_PROJ][0, bench.runs["a"].slot_index]
    assert view.untyped_storage().data_ptr() == row.untyped_storage().data_ptr()
    view[4, :3] = 1.0
    with pytest.raises(GateError, match="3 numbers beyond its rank and layers are not zero"):
        save(bench, tmp_path / "again")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (emptied, "must hold 21 tensors with numbers, 21 are empty"),
        (
            lambda t: without(t, "model.norm"),
            "must hold 21 tensors (the model's parameters), holds 20; missing first: model.norm.weight",
        ),
        (
            lambda t: {n: v * float("inf") for n, v in t.items()},
            "holds a number that is not finite",
        ),
        (lambda t: {n: v + 1 for n, v in t.items()}, "must be what was trained, bit for bit"),
    ],
)
def test_gate_full_model_is_compared_with_the_models_parameters(spoil, message, tmp_path):
    pack = unfreeze(tiny_model(torch.float32))
    run = new_run(pack, 0, RUN_SPEC)
    save_weights(pack, run, tmp_path, base_name="org/base", revision=None)
    tensors = load_file(tmp_path / "model.safetensors")
    assert len(tensors) == 21  # embedding, last norm, head; a block: seven projections, two norms
    save_file(spoil(tensors), tmp_path / "model.safetensors")
    with pytest.raises(GateError, match=re.escape(message)):
        check_saved(tmp_path, pack, run)


def test_gate_full_model_with_a_tied_head_holds_it_once(tmp_path):
    pack = unfreeze(tiny_model(torch.float32, tie_word_embeddings=True))
    save_weights(pack, new_run(pack, 0, RUN_SPEC), tmp_path, base_name="b", revision=None)
    tensors = load_file(tmp_path / "model.safetensors")
    assert len(tensors) == 20
    assert "lm_head.weight" not in tensors


# The probe


def nats_per_token(model, rows: Rows, indices) -> float:
    """The loss of rows by the model's own forward, one row at a time."""
    total, count = 0.0, 0
    for index in indices:
        ids = torch.from_numpy(rows.rows[index].input_ids)[None]
        mask = torch.from_numpy(rows.rows[index].loss_mask)[1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += float(F.cross_entropy(logits[mask], ids[0, 1:][mask], reduction="sum"))
        count += int(mask.sum())
    return total / count


@pytest.mark.parametrize("beside", [(), ("d", "c")], ids=["alone", "in a pack"])
def test_gate_saved_adapter_loaded_by_peft_loses_what_the_checkpoint_says(beside, tmp_path):
    bench = trained("a", *beside)
    probe = Probe(bench.trainer)
    recorded = probe.loss(bench.runs["a"])
    save(bench, tmp_path / "saved", probe_loss=recorded)
    held_out = random_rows(3, seed=1)  # the bench's
    by_length = sorted(range(3), key=lambda index: held_out.lengths[index])
    base = tiny_model()
    untouched = nats_per_token(base, held_out, by_length[:2])
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "saved"), autocast_adapter_dtype=False)
    loss = nats_per_token(loaded, held_out, by_length[:2])
    assert read_json(tmp_path / "saved" / "trainer_state.json")["probe_loss"] == recorded
    assert loss == pytest.approx(recorded, abs=1e-9)
    assert abs(untouched - recorded) > 1e-2


def test_probe_of_rows_without_a_counted_token_leaves_them_out():
    rows = random_rows(5, seed=3)
    shortest = min(range(5), key=lambda index: rows.lengths[index])
    rows.rows[shortest].loss_mask[:] = False
    rows = Rows(rows.rows)
    bench = Bench(tiny_model())
    bench.trainer.held_out = RowSource(rows, 0, torch.device("cpu"))
    probe = Probe(bench.trainer)
    assert shortest not in probe.rows
    assert len(probe.rows) == 2
    run = bench.enter("a")  # untrained: the base
    assert probe.loss(run) == pytest.approx(nats_per_token(tiny_model(), rows, probe.rows))


def test_probe_reloaded_on_another_base_is_refused_and_on_its_own_passes(tmp_path):
    first = trained()
    save(first, tmp_path / "saved", probe_loss=Probe(first.trainer).loss(first.runs["a"]))
    recorded = checkpoint.find_checkpoint(tmp_path / "saved").probe_loss
    for is_same in (True, False):
        model = tiny_model()
        if not is_same:
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
        second = Bench(model)
        run = second.enter("a")
        assert load_checkpoint(run, tmp_path / "saved")
        probe = Probe(second.trainer)
        if is_same:
            probe.check_reloaded(run, recorded, tmp_path / "saved")
        else:
            message = rf"saved: reloaded, it must lose {recorded:.6f} nats/token .* loses \d"
            with pytest.raises(GateError, match=message):
                probe.check_reloaded(run, recorded, tmp_path / "saved")
            probe.check_reloaded(run, None, tmp_path / "saved")  # saved before there was a probe


# Loading


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        (ADAPTER, emptied, r"saved: must hold all 30 weights of the trial; .* 30 are empty.*remove the"),
        (ADAPTER, lambda t: without(t, "layers.0"), r"must hold all 30 weights .* holds 16"),
        # One row for all ranks would spread over them without an error.
        (ADAPTER, lambda t: {n: v[:1] for n, v in t.items()}, r"must be of shape \[4, 64\], is \[1, 64\]"),
        ("optimizer.safetensors", emptied, r"must hold all 60 moments of its optimizer; .* 60 are empty"),
        ("optimizer.safetensors", lambda t: without(t, "exp_avg_sq"), r"all 60 moments .* holds 30"),
    ],
)  # fmt: skip
def test_gate_checkpoint_that_is_not_whole_is_not_loaded_and_changes_nothing(
    file, spoil, message, tmp_path
):
    save(trained(), tmp_path / "saved")
    save_file(spoil(load_file(tmp_path / "saved" / file)), tmp_path / "saved" / file)
    seal_folder(tmp_path / "saved")  # it is what was written, and yet not such a trial's
    run = Bench(tiny_model()).enter("a")
    before = {name: weights.clone() for name, weights in run.slot.parameters.items()}
    with pytest.raises(GateError, match=message):
        load_checkpoint(run, tmp_path / "saved")
    assert all(torch.equal(run.slot.parameters[name], before[name]) for name in before)
    assert run.counters["examples"] == 0


# Trials


class Saver:
    """safetensors' writer; what it writes of some trials' adapters, from some save on, is spoilt."""

    def __init__(self, spoil, trial_name: str, first_bad: int) -> None:
        self.spoil, self.trial_name, self.first_bad, self.count = spoil, trial_name, first_bad, 0

    def __call__(self, tensors, path: Path, metadata=None) -> None:
        if path.name == ADAPTER and self.trial_name in path.parts:
            self.count += 1
            if self.count > self.first_bad:
                tensors = self.spoil(tensors)
        save_file(tensors, path, metadata=metadata)


@pytest.fixture
def make(data_file, tmp_path, tiny_folder):
    """make(name): a trial with evaluations after 4, 8 and 12 examples."""

    def made(name: str, **changes) -> TrialSpec:
        base = BaseSpec(model=tiny_folder, quantization="none", dtype="fp64")
        candidate = replace(CANDIDATE, **({"global_batch_size": 4} | changes))
        own = {"num_examples": 12, "eval_every": 4, "base": base, "candidate": candidate}
        return trial(data_file, tmp_path / "trials" / name, **own)

    return made


def assert_failed(spec: TrialSpec, reason: str, examples: int) -> None:
    """What lies in a failed trial's folder."""
    paths = TrialPaths(spec.folder)
    status = read_state(paths.status)
    assert status["status"] == "failed"
    assert reason in status["reason"]
    assert status["examples"] == examples
    error = paths.error.read_text()
    assert "Traceback" in error
    assert status["reason"] in error


@pytest.mark.parametrize("first_bad", [0, 2])
def test_d01_save_of_empty_tensors_fails_the_trial_and_keeps_the_last_good_checkpoint(
    make, monkeypatch, first_bad
):
    spec = make("bad")
    monkeypatch.setattr(checkpoint, "save_file", Saver(emptied, "bad", first_bad))
    told = []
    result = train_trial(spec, lambda row: told.append(row["examples"]) is None)
    assert result.status == "failed"
    assert result.reason.startswith(f"{ADAPTER} must hold 30 tensors with numbers, 30 are empty")
    assert told == [0, 4][:first_bad]  # what was not saved was not judged
    assert_failed(spec, "30 are empty", 8 if first_bad else 0)
    folder = TrialPaths(spec.folder).checkpoint
    left = sorted(path.name for path in spec.folder.iterdir())
    if first_bad == 0:
        assert left == ["error.txt", "metrics.jsonl", "status.json"]
        return
    assert left == ["best", "checkpoint", "error.txt", "metrics.jsonl", "status.json"]
    assert read_json(folder / "trainer_state.json")["examples"] == 4
    assert len(load_file(folder / ADAPTER)) == 2 * LAYERS


def test_d01_member_whose_save_is_empty_fails_and_its_neighbours_go_on(make, monkeypatch):
    good, bad, late = make("good"), make("bad", seed=4), make("late", seed=5)
    alone = {
        spec.name: numbers(
            train_trial(
                replace(spec, folder=spec.folder.with_name(f"{spec.name} alone")), lambda row: True
            ).rows
        )
        for spec in (good, late)
    }
    monkeypatch.setattr(checkpoint, "save_file", Saver(emptied, "bad", 2))
    slots = []

    def has_ended() -> bool:
        if (end := link.end(bad)) is not None:
            slots.append((set(server.station.pack.slots), set(server.members)))
        return end is not None

    link = FakeLink([enter(good, 0), enter(bad)], (has_ended, [enter(late), allow(good, 9)]))
    server = PackServer(link, Comm(), Station)
    server.serve()
    assert slots[0] == ({0}, {"good"})  # the place of the failed one is free
    assert len(link.rows(bad)) == 1
    end = link.end(bad)
    status = read_state(TrialPaths(bad.folder).status)
    assert (end["status"], end["reason"]) == ("failed", status["reason"])
    assert_failed(bad, "30 are empty", 8)
    for spec in (good, late):
        assert link.end(spec)["status"] == "finished"
        losses = [row["eval_loss"] for row in link.rows(spec)]
        expected = [row["eval_loss"] for row in alone[spec.name][1:]]
        assert losses == pytest.approx(expected, abs=1e-9)


def test_d01_member_whose_first_save_is_empty_leaves_no_slot(make, monkeypatch):
    bad, good = make("bad"), make("good")
    monkeypatch.setattr(checkpoint, "save_file", Saver(emptied, "bad", 0))
    link = FakeLink([enter(bad)], [enter(good)])
    server = PackServer(link, Comm(), Station)
    server.serve()
    assert link.rows(bad) == []
    assert link.end(bad)["status"] == "failed"
    assert link.end(good)["status"] == "finished"
    assert not server.station.pack.slots


def test_d01_empty_tensors_in_the_place_of_a_checkpoint_end_the_trial_that_goes_on(make):
    class Killed(Exception):
        pass

    def die(row) -> bool:
        if row["examples"] == 8:
            raise Killed
        return True

    spec = make("cut")
    with pytest.raises(Killed):
        train_trial(spec, die)
    folder = TrialPaths(spec.folder).checkpoint
    for whole in (folder, previous_of(folder)):
        save_file(emptied(load_file(whole / ADAPTER)), whole / ADAPTER)
        seal_folder(whole)
    result = train_trial(spec, lambda row: True)
    assert result.status == "failed"
    assert_failed(spec, "must hold all 30 weights of the trial", 0)
    assert [row["examples"] for row in result.rows] == [0, 4, 8]
    TrialPaths(spec.folder).status.unlink()
    good = make("good")
    link = FakeLink([enter(spec), enter(good)])
    PackServer(link, Comm(), Station).serve()
    assert link.end(spec)["status"] == "failed"
    assert link.end(good)["status"] == "finished"


def test_gate_trial_that_goes_on_with_another_base_of_the_same_shape_fails(
    make, tmp_path, tiny_folder
):
    spec = make("moved")

    class Killed(Exception):
        pass

    def die(row) -> bool:
        if row["examples"] == 4:
            raise Killed
        return True

    with pytest.raises(Killed):
        train_trial(spec, die)
    other = tiny_model(torch.float32, vocab_size=3072, initializer_range=0.19)
    other.save_pretrained(tmp_path / "other")
    base = replace(spec.base, model=str(tmp_path / "other"))
    result = train_trial(replace(spec, base=base), lambda row: True)
    assert result.status == "failed"
    assert_failed(spec, "reloaded, it must lose", 0)
    assert "the base or the checkpoint is another one" in result.reason


def _work(rank: int, folder: str, spec: TrialSpec) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    if rank == 0:  # who writes; the others only hear of it
        checkpoint.save_file = Saver(emptied, spec.name, 1)
    result = train_trial(spec, lambda row: True)
    (Path(folder) / f"{rank}.txt").write_text(f"{result.status}: {result.reason}")
    dist.destroy_process_group()


def test_gate_two_workers_take_the_same_decision_and_neither_waits(make, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = make("shared")
    mp.spawn(_work, args=(str(tmp_path), spec), nprocs=2)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith(f"failed: {ADAPTER} must hold 30 tensors with numbers, 30 are empty")
    assert_failed(spec, "30 are empty", 4)
    rows = read_json_lines(TrialPaths(spec.folder).metrics)
    assert [row["examples"] for row in rows] == [0, 4]
