"""Held-out rows, the audit, the cache, counting."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from trainers.data import (
    Audit,
    DataError,
    DataSpec,
    cached_audit,
    count_tokens,
    load_tokenizer,
    prepare_data,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def rows(start, stop):
    return [{"prompt": f"question {i}? ", "completion": f"answer {i}"} for i in range(start, stop)]


def texts(prepared_set, model):
    tokenizer = load_tokenizer(model)
    examples = (prepared_set.example(i) for i in range(len(prepared_set)))
    return [tokenizer.decode(example.input_ids.tolist()) for example in examples]


def test_split_does_not_move_when_rows_are_added_or_shuffled(model, write_rows):
    few, many = rows(0, 200), rows(0, 300)[::-1]
    before = prepare_data(DataSpec(data=write_rows(few, "few.jsonl"), model=model, eval=0.1))
    after = prepare_data(DataSpec(data=write_rows(many, "many.jsonl"), model=model, eval=0.1))
    assert set(texts(before.eval, model)) <= set(texts(after.eval, model))
    assert set(texts(before.train, model)) <= set(texts(after.train, model))
    assert 10 <= len(before.eval) <= 30  # 200 rows at 0.1: within 2.4 standard deviations of 20


def test_split_is_the_same_for_another_tokenizer(model, make_model, train_tokenizer, write_rows):
    path = write_rows(rows(0, 100))
    other = make_model("other", tokenizer=train_tokenizer(["<s>", "</s>"], ["another corpus"] * 3))
    first = prepare_data(DataSpec(data=path, model=model, eval=0.2)).eval
    second = prepare_data(DataSpec(data=path, model=other, eval=0.2)).eval
    assert texts(first, model) == texts(second, other)


def test_split_keeps_duplicates_on_one_side_and_counts_them(model, write_rows):
    prepared = prepare_data(DataSpec(data=write_rows(rows(0, 50) * 2), model=model, eval=0.3))
    assert not set(texts(prepared.train, model)) & set(texts(prepared.eval, model))
    assert prepared.audit.num_duplicates == 50


def test_split_that_holds_none_out_says_which_fraction_would(model, write_rows):
    path = write_rows(rows(0, 3))
    with pytest.raises(DataError, match="holds none out") as error:
        prepare_data(DataSpec(data=path, model=model, eval=0.0001))
    fraction = float(str(error.value).split("set eval to ")[1].split(" ")[0])
    assert len(prepare_data(DataSpec(data=path, model=model, eval=fraction)).eval) == 1


def test_split_that_leaves_none_to_train_is_an_error(model, write_rows):
    with pytest.raises(DataError, match="leaves none to train"):
        prepare_data(DataSpec(data=write_rows(rows(0, 1)), model=model, eval=0.9999999))


def test_eval_file_overlap_is_counted(model, write_rows):
    train, held_out = write_rows(rows(0, 20)), write_rows(rows(15, 30), "eval.jsonl")
    audit = prepare_data(DataSpec(data=train, model=model, eval=held_out)).audit
    assert (audit.num_train_rows, audit.num_eval_rows, audit.num_overlap) == (20, 15, 5)


def test_audit_counts_are_those_of_the_masks_and_of_count_tokens(model, write_rows):
    path = write_rows(rows(0, 100))
    prepared = prepare_data(DataSpec(data=path, model=model, eval=0.2))
    audit, train, held_out = prepared.audit, prepared.train, prepared.eval
    assert audit.num_train_loss_tokens == train.num_loss_tokens == train.loss_token_counts.sum()
    assert audit.num_eval_loss_tokens == held_out.num_loss_tokens
    assert (
        audit.num_tokens
        == train.num_tokens + held_out.num_tokens
        == train.lengths.sum() + sum(held_out.lengths)
    )
    assert audit.num_loss_tokens == count_tokens(path, model)
    answers = sum(len(row["completion"].encode()) for row in rows(0, 100))
    assert train.num_loss_bytes + held_out.num_loss_bytes == answers
    assert Audit.from_dict(json.loads(json.dumps(audit.to_dict()))) == audit


def test_count_tokens_is_a_hand_count(model, write_rows):
    tokenizer = load_tokenizer(model)
    expected = sum(len(tokenizer.encoder.encode(row["completion"]).ids) + 1 for row in rows(0, 30))
    assert count_tokens(write_rows(rows(0, 30)), model) == expected


def test_count_tokens_takes_what_people_hold(model, backend, write_rows):
    transformers = pytest.importorskip("transformers")
    path = write_rows(rows(0, 30))
    expected = count_tokens(path, model)
    assert count_tokens(path, Path(model)) == expected
    assert count_tokens(path, backend) == expected
    assert count_tokens(path, transformers.AutoTokenizer.from_pretrained(model)) == expected


def test_cache_hit_gives_the_audit_and_a_changed_file_or_option_does_not(model, write_rows):
    spec = DataSpec(data=write_rows(rows(0, 60)), model=model)
    assert cached_audit(spec) is None
    prepared = prepare_data(spec)
    assert cached_audit(spec) == prepared.audit
    assert prepare_data(spec).train.content_hash == prepared.train.content_hash
    assert cached_audit(DataSpec(data=spec.data, model=model, seq_len=512)) is None
    write_rows(rows(1, 61))
    assert cached_audit(spec) is None
    assert prepare_data(spec).train.content_hash != prepared.train.content_hash


def test_cache_same_content_under_another_name_is_a_hit(model, write_rows):
    audit = prepare_data(DataSpec(data=write_rows(rows(0, 60)), model=model)).audit
    copy = write_rows(rows(0, 60), "copy.jsonl")
    found = cached_audit(DataSpec(data=copy, model=model))
    assert found == replace(audit, files=(copy,))


def test_cache_hit_names_the_places_of_the_file_that_is_asked_for(model, write_rows):
    lines = [*rows(0, 60), {"prompt": None, "completion": "x"}, rows(3, 4)[0]]
    spec = DataSpec(data=write_rows(lines), model=model, bad_rows="drop")
    assert prepare_data(spec).audit.bad_rows[0].startswith(f"{spec.data}:61: ")
    copy = write_rows(lines, "copy.jsonl")
    with pytest.raises(DataError, match=r"copy\.jsonl:61: prompt must be text"):
        cached_audit(DataSpec(data=copy, model=model))
    found = cached_audit(replace(spec, data=copy))
    assert found.duplicates == (f"{copy}:62 = {copy}:4",)


def test_cache_template_is_part_of_the_key(make_model, templates, write_rows):
    path = write_rows(rows(0, 60))
    first, second = make_model("a"), make_model("b", chat_template=templates["plain"])
    prepare_data(DataSpec(data=path, model=first))
    assert cached_audit(DataSpec(data=path, model=second)) is None


def test_cache_parallel_starts_on_an_empty_cache_all_succeed(model, write_rows, cache_folder):
    spec = DataSpec(data=write_rows(rows(0, 200)), model=model)
    with ThreadPoolExecutor(8) as threads:
        hashes = {p.train.content_hash for p in threads.map(prepare_data, [spec] * 8)}
    assert len(hashes) == 1
    assert len(list((cache_folder / "sets").iterdir())) == 1


def test_cache_that_cannot_be_written_names_its_variable(model, write_rows, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="set TENFOLD_CACHE to a folder"):
        count_tokens(write_rows(rows(0, 2)), model)


COUNT_SCRIPT = """
import sys, time
from trainers.data import DataSpec, cached_audit, count_tokens
path, model, known = sys.argv[1:]
began = time.perf_counter()
print(count_tokens(path, model))
audit = cached_audit(DataSpec(data=path, model=model))
assert (audit is not None) == (known == "known")
heavy = {"torch", "ray", "transformers", "datasets", "pyarrow"}
if known == "known":
    heavy |= {"numpy", "tokenizers"}
loaded = heavy & set(sys.modules)
assert not loaded, loaded
"""


def test_count_tokens_loads_no_torch_and_a_known_count_not_even_numpy(model, write_rows):
    path = write_rows(rows(0, 60))

    def run(known):
        command = [sys.executable, "-c", COUNT_SCRIPT, path, model, known]
        result = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return int(result.stdout)

    first = run("new")
    prepare_data(DataSpec(data=path, model=model))
    assert run("known") == first


def test_count_tokens_shipped_tokenizer_is_said_once(write_rows, capsys):
    from trainers.data.tokenizer import SHIPPED_MODEL

    if not (SHIPPED_MODEL / "tokenizer.json").exists():
        pytest.skip("the shipped base is not made yet")
    path = write_rows(rows(0, 3))
    assert count_tokens(path) == count_tokens(path, str(SHIPPED_MODEL))
    count_tokens(path)
    assert capsys.readouterr().err.count("shipped tokenizer (tiny-llama)") <= 1


@pytest.mark.parametrize(
    ("name", "num_rows", "shape"),
    [
        ("gsm8k/test.jsonl", 1319, "completion (answer -> completion, question -> prompt)"),
        ("chat/alpaca_en_demo.json", 999, "alpaca"),
        ("chat/glaive_toolcall_en_demo.json", 300, "sharegpt (conversations -> messages)"),
        ("chat/identity.json", 91, "alpaca"),
    ],
)
def test_real_file_runs_through_and_its_counts_agree(name, num_rows, shape, shared_data, model):
    path = str(shared_data / name)
    prepared = prepare_data(DataSpec(data=path, model=model, seq_len=100_000))
    assert prepared.audit.num_rows == num_rows
    assert prepared.audit.shapes == {shape: num_rows}
    assert prepared.audit.num_loss_tokens == count_tokens(path, model)
    assert prepared.train.loss_token_counts.min() > 0
    assert not any(prepared.train.loss_mask[prepared.train.offsets[:-1]])


def test_count_tokens_known_count_answers_in_milliseconds(model, write_rows, tmp_path):
    path = write_rows(rows(0, 20_000))
    import os

    old = time.time() - 60  # a file written just now is hashed again, to be sure
    os.utime(path, (old, old))
    count = count_tokens(path, model)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        assert count_tokens(path, model) == count
        took.append(time.perf_counter() - began)
    assert sorted(took)[2] < 0.1
