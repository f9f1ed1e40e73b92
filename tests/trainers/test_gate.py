"""The gate of every save: planted faults and the sentence that each gets, and who ends by them."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.trainers.packs import Bench
from tests.trainers.tiny import Rows, random_rows, tiny_model
from trainers import checkpoint
from trainers.batches import RowSource
from trainers.checkpoint import load_checkpoint, save_checkpoint, save_weights
from trainers.full import unfreeze
from trainers.gate import GateError, Probe, check_saved
from trainers.integrity import seal_folder
from trainers.paths import read_json
from trainers.runs import RunSpec, new_run

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
