"""The loss on general text beside eval_loss. Oracles: transformers' own loss on the same windows, PEFT,
and the same trial alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.trainers.links import FakeLink, enter, serve
from tests.trainers.packs import CPU, RUN, Bench
from tests.trainers.tiny import Row, Rows, random_rows, tiny_model
from tests.trainers.trials import BASE, CANDIDATE, numbers, trial
from trainers.base_model import BaseSpec, load_base
from trainers.batches import RowSource
from trainers.data import DataError, prepare_data, prepare_whole, retention
from trainers.data.cache import cache_root
from trainers.data.retention import retention_set
from trainers.paths import TrialPaths, read_json_lines
from trainers.sft_trainer import TrialSpec, train_trial

SEQ_LEN = 96


@pytest.fixture
def text_file(tmp_path) -> Path:
    """Six texts, of which two are longer than seq_len and are split into windows."""
    texts = [f"The word number {i} follows the word number {i - 1}. " * (1 + i * 4) for i in (0, 1)]
    texts += [f"Bread number {i} needs flour, water and salt. " * (i - 1) for i in (2, 3, 8, 9)]
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def make(data_file, text_file, tmp_path):
    """A small trial with a retention set."""

    def made(name: str = "t", **changes) -> TrialSpec:
        spec = trial(data_file, tmp_path / name, **changes)
        return replace(spec, data=replace(spec.data, retention=str(text_file)))

    return made


def loss_by_transformers(model, spec: TrialSpec) -> float:
    """Loss of a model on all windows of the retention set, each by the model's own cross entropy."""
    rows, _ = prepare_whole(spec.data, str(spec.data.retention))
    assert len(rows) > 6
    nats = tokens = 0.0
    for example in map(rows.example, range(len(rows))):
        assert example.loss_mask[1:].all()  # every token of a text
        assert len(example.input_ids) <= SEQ_LEN
        ids = torch.tensor(example.input_ids.tolist())[None]
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        nats, tokens = nats + loss * (ids.shape[1] - 1), tokens + ids.shape[1] - 1
    return nats / tokens


def test_retention_loss_is_the_cross_entropy_of_base_and_adapter(make):
    spec = make()
    rows = train_trial(spec, lambda row: True).rows
    assert [row["examples"] for row in rows] == [0, 16, 32, 44]
    base = load_base(spec.base)
    assert rows[0]["retention_loss"] == pytest.approx(loss_by_transformers(base, spec), abs=1e-6)
    adapted = PeftModel.from_pretrained(base, str(TrialPaths(spec.folder).checkpoint))
    expected = loss_by_transformers(adapted, spec)
    assert rows[-1]["retention_loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(rows[-1]["retention_loss"] - rows[0]["retention_loss"]) > 0.01
    assert list(rows) == read_json_lines(TrialPaths(spec.folder).metrics)


def test_retention_changes_nothing_else_and_is_absent_where_it_was_not_asked_for(
    make, data_file, tmp_path
):
    plain = train_trial(trial(data_file, tmp_path / "plain"), lambda row: True).rows
    assert all("retention_loss" not in row for row in plain)
    found = numbers(train_trial(make(), lambda row: True).rows)
    for row in found:
        del row["retention_loss"]
    assert found == numbers(plain)


def test_retention_resumed_trial_ends_in_identical_numbers(make):
    class Killed(Exception):
        pass

    def die(row):
        if row["examples"] == 16:
            raise Killed

    whole = train_trial(make("whole"), lambda row: True)
    with pytest.raises(Killed):
        train_trial(make("cut"), lambda row: die(row) is None)
    resumed = train_trial(make("cut"), lambda row: True)
    assert numbers(resumed.rows) == numbers(whole.rows)


def test_retention_of_three_in_a_pack_equals_each_alone(make):
    base = BaseSpec(model=BASE, quantization="none", dtype="fp64")
    candidates = [replace(CANDIDATE, lora_rank=rank, seed=rank) for rank in (1, 4, 8)]
    specs = [
        make(f"packed/{c.lora_rank}", base=base, candidate=c, num_examples=16, eval_every=8)
        for c in candidates
    ]
    link = FakeLink([enter(spec) for spec in specs])
    serve(link)
    for spec in specs:
        alone = train_trial(replace(spec, folder=spec.folder / "alone"), lambda row: True).rows
        found = read_json_lines(TrialPaths(spec.folder).metrics)
        assert [row["examples"] for row in found] == [0, 8, 16]
        for row, other in zip(found, alone, strict=True):
            assert row["retention_loss"] == pytest.approx(other["retention_loss"], abs=1e-9)
        assert link.rows(spec)[-1] == found[-1]


def test_retention_that_is_not_finite_is_none_and_does_not_end_the_trial():
    model = tiny_model()
    model.model.embed_tokens.weight[4] = float("nan")  # random_rows have ids from 5 on
    bench = Bench(model)
    row = random_rows(1).rows[0]
    broken = Row(row.input_ids.copy(), row.loss_mask)
    broken.input_ids[0] = 4
    bench.trainer.retention = RowSource(Rows([broken]), 0, CPU)
    run, seen = bench.enter("a", replace(RUN, num_examples=12, eval_every=6)), []
    bench.trainer.run([run], lambda run, evaluation: seen.append(evaluation) is None)
    assert run.status == "finished"
    assert [(e.examples, e.retention_loss) for e in seen] == [(0, None), (6, None), (12, None)]


def test_retention_another_set_does_not_tokenize_the_data_again(make, text_file, tmp_path):
    spec = make().data
    prepare_data(replace(spec, retention=None))
    assert len(list((cache_root() / "sets").iterdir())) == 1
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "Something else entirely."}) + "\n")
    for path in (text_file, other):
        changed = replace(spec, retention=str(path))
        prepare_data(changed)
        retention_set(changed)
    assert len(list((cache_root() / "sets").iterdir())) == 3  # the data, and two retention sets


def test_retention_set_of_another_shape_than_the_data_is_read_by_its_own(make, tmp_path):
    spec = make().data
    chat = tmp_path / "general.csv"
    chat.write_text("question,answer\nHow many?,Three of them.\n")
    mapped = replace(spec, columns={"prompt": "prompt", "completion": "completion"})
    found = retention_set(replace(mapped, retention=str(chat)))
    assert found is not None
    assert (
        0 < found.rows.num_loss_tokens < found.rows.num_tokens - 1
    )  # the answer, not the question


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (10**6, 8)])
def test_retention_set_holds_one_row_at_least_and_all_at_most(make, monkeypatch, most, expected):
    monkeypatch.setattr(retention, "RETENTION_LOSS_TOKENS", most)
    found = retention_set(make().data)
    assert found is not None
    assert (len(found.rows), found.num_all_rows) == (expected, 8)


def test_retention_set_holds_at_most_the_stated_tokens_wherever_they_stand(
    make, text_file, monkeypatch
):
    most = 250
    monkeypatch.setattr(retention, "RETENTION_LOSS_TOKENS", most)
    spec = make().data
    found = retention_set(spec)
    assert found is not None
    whole, _ = prepare_whole(spec, str(text_file))
    assert (found.num_all_rows, found.num_all_loss_tokens) == (len(whole), whole.num_loss_tokens)
    assert 1 < len(found.rows) < len(whole)
    assert most / 2 < found.rows.num_loss_tokens <= most
    text_file.write_text("\n".join(reversed(text_file.read_text().splitlines())) + "\n")
    again = retention_set(spec)
    assert again is not None
    assert again.rows.input_ids.tolist() == found.rows.input_ids.tolist()


def test_retention_set_that_is_not_there_says_which_key(make):
    with pytest.raises(DataError, match=r"^retention: .*no/such.jsonl"):
        retention_set(replace(make().data, retention="no/such.jsonl"))
