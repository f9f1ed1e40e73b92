"""Measured capacity in a plan: bits by the base's loss, the doctrine's beside, and no second measurement."""

import json
import math
import shutil
from fractions import Fraction

import pytest

from orchestration.config import make_config
from orchestration.measured import base_loss, capacity_sentence, measured_of
from orchestration.plan_json import plan_to_dict
from orchestration.planning import make_plan
from trainers.base_loss import BaseLoss, Estimate, measure_base_loss
from trainers.base_spec import BaseSpec
from trainers.data.spec import DataSpec


@pytest.fixture
def planned(workplace, base, write_rows, qa_rows):
    """The plan of the shipped base for a config; data is 40 rows, held out are 10 others."""
    rows = qa_rows(50)
    write_rows("train.jsonl", rows[:40])
    write_rows("held.jsonl", rows[40:])

    def plan(known=None, **values):
        if "dataset_tokens" not in values:
            values = {"data": "train.jsonl", "eval": "held.jsonl"} | values
        return make_plan(make_config({"model": str(base)} | values, "test"), known)

    return plan


def some_loss(bits_per_token: float) -> BaseLoss:
    """A measurement that nobody made."""
    nats = bits_per_token * math.log(2)
    return BaseLoss(
        nats_per_token=Estimate(value=nats, low=nats / 2, high=nats * 2),
        bits_per_token=Estimate(
            value=bits_per_token, low=bits_per_token / 2, high=bits_per_token * 2
        ),
        bits_per_byte=None,
        num_rows=30,
        num_loss_tokens=300,
        num_train_rows=40,
        num_train_loss_tokens=400,
        quantization="nf4",
        dtype="bf16",
        device="GPU Y",
    )


def test_make_plan_measured_bits_are_the_loss_of_the_base_on_the_training_rows(planned, base):
    plan = planned(capacity="measured")
    spec = DataSpec(data="train.jsonl", eval="held.jsonl", model=str(base))
    loss = measure_base_loss(spec, BaseSpec(model=str(base), quantization="nf4", dtype="auto"))
    bits = loss.bits_per_token
    assert bits.low == bits.value == bits.high  # 40 rows: all were measured
    assert bits.value > 2  # a base of 2M parameters does not know these rows
    tokens = plan.audit.num_train_loss_tokens
    assert plan.dataset_bits == math.ceil(Fraction(bits.value) * tokens)
    found = plan_to_dict(plan)["capacity"]
    assert found["measured"] == loss.to_dict()
    assert (found["source"], found["bits_per_token"]) == ("measured", bits.value)
    assert found["doctrine_bits"] == tokens == planned().dataset_bits


def test_make_plan_measured_bits_discard_what_the_doctrines_bits_admit(planned):
    # 15,000 tokens of the doctrine's 1 bit fit into rank 2 of attn (20,480 bits).
    values = {"lora_rank": [2, 8], "learning_rate": 1e-3, "global_batch_size": 16, "target": "attn"}
    tokens = planned(**values).audit.num_train_loss_tokens
    loss = some_loss(30_000 / tokens)
    admitted = {
        source: [c.lora_rank for c in planned(known, capacity=source, **values).pruned.admitted]
        for source, known in (("doctrine", None), ("measured", loss))
    }
    assert admitted == {"doctrine": [2, 8], "measured": [8]}


def test_make_plan_measured_once_is_not_measured_again(planned, capsys):
    first = planned(capacity="measured")
    assert "measuring the loss of the base" in capsys.readouterr().err
    again = planned(capacity="measured")
    assert capsys.readouterr().err == ""
    assert plan_to_dict(again) == plan_to_dict(first)


def test_make_plan_with_what_a_plan_json_holds_measures_nothing(planned, tmp_path, capsys):
    first = planned(capacity="measured")
    on_disk = json.loads(json.dumps(plan_to_dict(first), allow_nan=False))
    shutil.rmtree(tmp_path / "cache" / "base_loss")
    capsys.readouterr()
    again = planned(measured_of(on_disk), capacity="measured")
    assert capsys.readouterr().err == ""
    assert again.dataset_bits == first.dataset_bits
    assert measured_of(plan_to_dict(planned())) is None


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"capacity": "doctrine"}, ["1 bit per loss-bearing token", "LoRA Without Regret"]),
        ({"capacity": 0.5}, ["0.5 bits per loss-bearing token, as given", "gives 1,000 bits"]),
    ],
)
def test_capacity_sentence_names_the_source(planned, values, parts):
    sentence = capacity_sentence(plan_to_dict(planned(dataset_tokens=1000, **values)))
    for part in parts:
        assert part in sentence


def test_capacity_sentence_of_a_measurement_has_its_interval_and_the_doctrines_bits(planned):
    plan = planned(some_loss(2.0), capacity="measured")
    sentence = capacity_sentence(plan_to_dict(plan))
    for part in (
        "2.000 (95%: 1.000 to 4.000) bits per loss-bearing token",
        "30 of 40 training rows (300 tokens, nf4, bf16, GPU Y)",
        f"1 bit/token gives {plan.audit.num_train_loss_tokens:,} bits",
    ):
        assert part in sentence


def test_base_loss_of_a_config_whose_capacity_is_the_doctrines_is_measured_too(planned):
    plan = planned()
    found = base_loss(plan.config, plan.data_spec)
    assert found.bits_per_byte is not None
    assert found.quantization == "nf4"
    assert found == base_loss(plan.config, plan.data_spec)
