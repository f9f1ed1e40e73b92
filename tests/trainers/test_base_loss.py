"""The base's loss on the data: estimator, sample and cache. Oracles: sums by hand, printed tables, a
simulation, and transformers' own loss."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainers.tiny import tiny_model
from tests.trainers.trials import BASE
from trainers import base_loss
from trainers.base_loss import (
    MIN_ROWS,
    BaseLoss,
    cached_base_loss,
    measure_base_loss,
    ratio_estimate,
    sample_size,
    student_t95,
)
from trainers.base_model import load_base
from trainers.base_spec import BaseSpec
from trainers.data import DataSpec, prepare_data
from trainers.data.sampling import content_order


@pytest.fixture
def model_folder(tmp_path) -> Path:
    """A random model of two layers with the vocabulary of the shipped tokenizer."""
    folder = tmp_path / "tiny"
    tiny_model(torch.float32, vocab_size=3072).save_pretrained(folder)
    return folder


@pytest.fixture
def base(model_folder) -> BaseSpec:
    return BaseSpec(model=str(model_folder), quantization="none", dtype="fp32")


@pytest.fixture
def spec(data_file) -> DataSpec:
    return DataSpec(data=str(data_file), model=BASE, seq_len=96, eval=0.2)


def nats_by_transformers(base: BaseSpec, spec: DataSpec) -> list[tuple[float, int, int]]:
    """(nats, loss-bearing tokens, bytes) of every training row, by the model's own loss."""
    model, rows = load_base(base), prepare_data(spec).train
    found = []
    for example in map(rows.example, range(len(rows))):
        labels = np.where(example.loss_mask, example.input_ids, -100)
        ids, labels = (torch.tensor(x.tolist())[None] for x in (example.input_ids, labels))
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss
        count = int(example.loss_mask.sum())
        found.append((loss.item() * count, count, example.num_loss_bytes))
    return found


# The estimator


def test_ratio_estimate_of_a_sample_is_the_hand_calculation():
    # 40 of 80 rows: half lose 2 nats on 1 token, half 4 on 3. Ratio 1.5, residuals +-0.5.
    found = ratio_estimate([2.0, 4.0] * 20, [1, 3] * 20, 80)
    error = math.sqrt((1 - 40 / 80) * 40 / 39 * 40 * 0.25) / 80
    assert found.value == 1.5
    assert found.high - 1.5 == pytest.approx(2.0227 * error, rel=1e-4)  # t table, 39 degrees
    assert 1.5 - found.low == pytest.approx(found.high - 1.5)


def test_ratio_estimate_of_all_rows_has_no_width():
    found = ratio_estimate([2.0, 5.0, 1.0], [1, 3, 4], 3)
    assert (found.low, found.value, found.high) == (1.0, 1.0, 1.0)


def test_ratio_estimate_interval_holds_the_truth_in_95_of_100_samples():
    generator = np.random.default_rng(0)
    tokens = generator.geometric(0.05, 500)
    nats = tokens * generator.gamma(4, 0.5, 500)
    truth, held = nats.sum() / tokens.sum(), 0
    for _ in range(1000):
        rows = generator.choice(500, 200, replace=False)
        found = ratio_estimate(nats[rows].tolist(), tokens[rows].tolist(), 500)
        held += found.low <= truth <= found.high
    assert 930 <= held <= 970


@pytest.mark.parametrize(
    ("dof", "printed"), [(20, 2.0860), (29, 2.0452), (99, 1.9842), (1000, 1.9623)]
)
def test_student_t95_equals_the_printed_table(dof, printed):
    assert student_t95(dof) == pytest.approx(printed, abs=6e-5)


@pytest.mark.parametrize(
    ("num_rows", "num_tokens", "most", "expected"),
    [
        (1000, 100_000, 10_000, 100),
        (1000, 100_001, 10_000, 100),
        (1000, 99_999, 10_000, 101),  # rows of a little under 100 tokens
        (1000, 100_000, 2_900, MIN_ROWS),
        (1000, 100_000, 100_000, 1000),
        (1000, 100_000, 10**9, 1000),
        (MIN_ROWS - 1, 10**6, 10, MIN_ROWS - 1),
        (1, 1, 1, 1),
    ],
)
def test_sample_size_comes_to_the_tokens_that_were_asked_for(num_rows, num_tokens, most, expected):
    assert sample_size(num_rows, num_tokens, most) == expected


# The sample


def rows_of(spec: DataSpec, lines: list[dict], path: Path):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return prepare_data(replace(spec, data=str(path))).train


def test_content_order_does_not_depend_on_where_rows_stand(spec, data_file, tmp_path):
    lines = [json.loads(line) for line in data_file.read_text().splitlines()]
    first = rows_of(spec, lines, tmp_path / "a.jsonl")
    second = rows_of(spec, lines[::-1], tmp_path / "b.jsonl")
    orders = [
        [rows.example(int(row)).input_ids.tolist() for row in content_order(rows)]
        for rows in (first, second)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != [first.example(row).input_ids.tolist() for row in range(len(first))]


def test_content_order_spreads_equal_rows(spec, data_file, tmp_path):
    lines = [json.loads(line) for line in data_file.read_text().splitlines()]
    same = {"prompt": "again", "completion": " and again"}
    rows = rows_of(replace(spec, eval=0.06), [same] * 60 + lines, tmp_path / "a.jsonl")
    order = content_order(rows)
    assert sorted(order.tolist()) == list(range(len(rows)))
    lengths = rows.lengths[order]
    copies = np.flatnonzero(lengths == rows.lengths[0])
    assert len(copies) == 60
    assert 15 <= int((copies < len(rows) // 2).sum()) <= 45  # not all at one place


# The measurement


def test_measure_base_loss_of_everything_is_the_loss_of_transformers(spec, base):
    found = measure_base_loss(spec, base)
    rows = nats_by_transformers(base, spec)
    nats, tokens, num_bytes = (sum(column) for column in zip(*rows, strict=True))
    expected = {
        "nats_per_token": nats / tokens,
        "bits_per_token": nats / tokens / math.log(2),
        "bits_per_byte": nats / math.log(2) / num_bytes,
    }
    for name, value in expected.items():
        estimate = getattr(found, name)
        assert estimate.low == estimate.value == estimate.high
        assert estimate.value == pytest.approx(value, rel=1e-6)
    assert (found.num_rows, found.num_train_rows) == (len(rows), len(rows))
    assert (found.num_loss_tokens, found.num_train_loss_tokens) == (tokens, tokens)
    assert (found.quantization, found.dtype) == ("none", "fp32")


def test_measure_base_loss_of_a_sample_is_its_rows_and_holds_the_whole(spec, base):
    found = measure_base_loss(spec, base, max_loss_tokens=1)
    rows = nats_by_transformers(base, spec)
    assert (found.num_rows, found.num_train_rows) == (MIN_ROWS, len(rows))
    assert len(rows) > MIN_ROWS + 10
    chosen = content_order(prepare_data(spec).train)[:MIN_ROWS]
    nats, tokens = (sum(rows[row][at] for row in chosen) for at in (0, 1))
    assert found.nats_per_token.value == pytest.approx(nats / tokens, rel=1e-6)
    assert found.num_loss_tokens == tokens
    whole = sum(row[0] for row in rows) / sum(row[1] for row in rows)
    assert found.nats_per_token.low < whole < found.nats_per_token.high


def test_measure_base_loss_nf4_is_measured_as_the_sweep_holds_the_base(spec):
    plain, nf4 = (
        measure_base_loss(spec, BaseSpec(model=BASE, quantization=q, dtype="fp32"))
        for q in ("none", "nf4")
    )
    gap = abs(nf4.nats_per_token.value - plain.nats_per_token.value)
    assert 1e-4 < gap < 0.1
    expected = nats_by_transformers(BaseSpec(model=BASE, dtype="fp32"), spec)
    value = sum(row[0] for row in expected) / sum(row[1] for row in expected)
    assert nf4.nats_per_token.value == pytest.approx(value, rel=1e-5)


def test_measure_base_loss_of_packed_data_is_that_of_its_rows(spec, base):
    assert measure_base_loss(replace(spec, packing=True), base) == measure_base_loss(spec, base)


# The cache


def test_cached_base_loss_is_there_once_it_was_measured(spec, base, capsys):
    assert cached_base_loss(spec, base) is None  # not even the data is known
    prepare_data(spec)
    assert cached_base_loss(spec, base) is None
    found = measure_base_loss(spec, base)
    (line,) = capsys.readouterr().err.splitlines()
    for part in (base.model, f"{found.num_rows} of {found.num_train_rows} training rows"):
        assert part in line
    assert cached_base_loss(spec, base) == measure_base_loss(spec, base) == found
    assert capsys.readouterr().err == ""  # said again only if measured again
    assert BaseLoss.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_cached_base_loss_goes_by_content(spec, base, tmp_path):
    found = measure_base_loss(spec, base)
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(Path(str(spec.data)).read_bytes())
    assert cached_base_loss(replace(spec, data=str(copy)), base) == found
    assert cached_base_loss(spec, base, max_loss_tokens=1) is None
    for other in (replace(base, quantization="nf4"), replace(base, dtype="bf16")):
        assert cached_base_loss(spec, other) is None
    fewer = replace(spec, eval=0.4)
    prepare_data(fewer)
    assert cached_base_loss(fewer, base) is None
    tiny_model(torch.float32, vocab_size=3072, num_hidden_layers=1).save_pretrained(base.model)
    assert cached_base_loss(spec, base) is None


# What cannot be measured


def test_measure_base_loss_not_finite_is_one_line(spec, base):
    model = tiny_model(torch.float32, vocab_size=3072)
    (seen, *_) = prepare_data(spec).train.example(0).input_ids[10:]
    model.model.embed_tokens.weight[int(seen)] = float("nan")
    model.save_pretrained(base.model)
    with pytest.raises(ValueError, match="must be finite, got nan") as error:
        measure_base_loss(spec, base)
    assert base.model in str(error.value)
    assert "\n" not in str(error.value)
    assert cached_base_loss(spec, base) is None


def test_measure_base_loss_that_does_not_fit_is_one_line(spec, base, monkeypatch):
    def too_large(base):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr("trainers.row_nats.load_base", too_large)
    with pytest.raises(ValueError, match=r"must fit .*\(CUDA out of memory.\)$"):
        measure_base_loss(spec, base)


def test_measure_base_loss_without_weights_names_the_folder(spec, base):
    (Path(base.model) / "model.safetensors").unlink()
    prepare_data(spec)
    with pytest.raises(ValueError, match=r"must hold \*.safetensors weights, it has none"):
        cached_base_loss(spec, base)


def test_measure_base_loss_of_empty_completions_has_no_bits_per_byte(spec, base, tmp_path):
    lines = [{"prompt": f"say nothing {i}", "completion": ""} for i in range(60)]
    path = tmp_path / "empty.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = measure_base_loss(replace(spec, data=str(path)), base)
    assert found.bits_per_byte is None
    assert found.num_loss_tokens == found.num_rows  # an end token each
    assert BaseLoss.from_dict(found.to_dict()) == found


def test_base_loss_sample_is_large_enough_for_a_few_percent():
    # Rows of 100 tokens whose losses differ by half: 1.96 x 0.5 / sqrt(32768 / 100) of the loss.
    assert 1.96 * 0.5 / math.sqrt(base_loss.SAMPLE_LOSS_TOKENS / 100) < 0.06
