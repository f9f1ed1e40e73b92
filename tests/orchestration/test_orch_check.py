"""`tenfold check`: the audit of data, with and without a sweep around them."""

import json
import re
from pathlib import Path

import pytest

from orchestration.check import CheckOptions, checked
from orchestration.cli import main
from trainers.data.tokenizer import SHIPPED_MODEL

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "chat"
STORY = "The fox who lived by the river asked each neighbour for a different kind of winter soup. "
WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
]


def pair(number: int) -> dict[str, str]:
    """A row that is like no other: its words in an order of its own."""
    turned = WORDS[number % 14 :] + WORDS[: number % 14]
    mixed = turned[:: 1 + number // 14] + [str(number)] * 3
    return {"prompt": f"Row {number}: {' '.join(mixed)}? ", "completion": " ".join(mixed[::-1])}


@pytest.fixture
def messy(tmp_path, monkeypatch) -> Path:
    """40 rows (1 to 40), and behind them every defect once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    near = STORY * 3
    rows = [
        *(pair(number) for number in range(40)),
        pair(7),  # line 41: row 8 once more
        {"prompt": near, "completion": "It was a long evening."},
        {"prompt": near, "completion": "It was a long evening!"},  # line 43
        {"prompt": "nothing follows", "completion": ""},
        {"prompt": "word " * 2000, "completion": "too long"},
        {"prompt": None, "completion": "no prompt"},  # line 46
    ]
    path = Path("messy.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_check_of_a_file_counts_every_defect_and_names_its_place(messy):
    found = checked(messy, CheckOptions())
    data = found["data"]
    assert data["num_rows"] == 45
    assert data["shapes"] == {"completion": 45}
    assert data["num_train_rows"] + data["num_eval_rows"] == 44
    assert data["num_too_long"] == data["num_dropped"] == 1
    assert data["num_empty"] == 1
    assert (data["num_duplicates"], data["duplicates"]) == (1, ["messy.jsonl:41 = messy.jsonl:8"])
    near = data["near_duplicates"]
    assert near["num_train"] + near["num_eval"] == 1
    assert near["train"] + near["eval"] == ["messy.jsonl:43 ~ messy.jsonl:42"]
    assert data["num_bad_rows"] == 1
    assert data["bad_rows"] == ["messy.jsonl:46: prompt must be text, is null"]
    assert found["refusals"] == ["1 rows cannot be used; mend them, or set bad_rows: drop"]
    assert sum(rows for _, rows in data["length_histogram"]) == 45


def test_check_prints_the_table_and_ends_with_2_where_rows_are_bad(messy, capsys):
    assert main(["check", str(messy)]) == 2
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[:2] == ["data: messy.jsonl", f"tokenizer: {SHIPPED_MODEL}"]
    shown = dict(re.findall(r"^  (\S.{20}\S?) +(.*)$", captured.out, flags=re.MULTILINE))
    table = {name.strip(): text for name, text in shown.items()}
    assert table["rows"] == "45: completion 45"
    assert table["over 1,024 tokens"] == "1: 1 left out"
    assert table["duplicates"] == "1: line 41 = line 8"
    assert table["empty completions"] == "1"
    assert table["lost end tokens"] == table["held out and trained"] == "0"
    assert "  messy.jsonl:46: prompt must be text, is null" in lines
    assert captured.err == "tenfold: 1 rows cannot be used; mend them, or set bad_rows: drop\n"


def test_check_of_a_sweep_that_drops_bad_rows_is_content(messy, capsys):
    Path("sweep.yaml").write_text(
        f"model: {SHIPPED_MODEL}\ndata: messy.jsonl\nbad_rows: drop\nlora_rank: 16\n"
    )
    assert main(["check", "sweep.yaml"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "1 bad rows, first:" in captured.out
    assert re.search(r"dataset: [\d,]+ loss-bearing tokens = [\d,]+ bits to hold", captured.out)


def test_check_json_is_one_json_value(messy, capsys):
    Path("sweep.yaml").write_text(
        f"model: {SHIPPED_MODEL}\ndata: messy.jsonl\nbad_rows: drop\nlora_rank: 16\n"
    )
    assert main(["check", "sweep.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    keys = {"name", "model", "data", "dataset_tokens", "dataset_bits", "capacity", "pitfalls"}
    assert keys <= set(found)
    assert found["dataset_bits"] == found["data"]["num_new_loss_tokens"]


def test_check_finds_held_out_rows_that_are_trained(messy):
    rows = [pair(3), pair(100), {"prompt": STORY * 3, "completion": "It was a long evening?"}]
    Path("eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("sweep.yaml").write_text(
        f"model: {SHIPPED_MODEL}\ndata: messy.jsonl\neval: eval.jsonl\nbad_rows: drop\n"
        "lora_rank: 16\n"
    )
    data = checked(Path("sweep.yaml"), CheckOptions())["data"]
    assert (data["num_overlap"], data["overlaps"]) == (1, ["eval.jsonl:1 = messy.jsonl:4"])
    assert data["near_duplicates"]["eval"] == ["eval.jsonl:3 ~ messy.jsonl:42"]


def test_check_show_marks_exactly_what_is_trained(messy, capsys):
    main(["check", str(messy), "--show", "2"])
    out = capsys.readouterr().out
    for number in (0, 1):
        row = pair(number)
        assert f"<s>{row['prompt']}⟦{row['completion']}</s>⟧\n" in out + "\n"
    assert "--- messy.jsonl:1: " in out
    assert "--- messy.jsonl:3: " not in out


def test_check_base_loss_is_shown_in_bits_per_byte(messy, capsys):
    Path("few.jsonl").write_text("".join(json.dumps(pair(number)) + "\n" for number in range(40)))
    assert main(["check", "few.jsonl", "--base-loss"]) == 0
    assert re.search(r"  base +the base loses \d\.\d+ .*bits/byte", capsys.readouterr().out)


def test_check_model_beside_a_sweep_is_refused(messy, capsys):
    Path("sweep.yaml").write_text(f"model: {SHIPPED_MODEL}\ndata: messy.jsonl\n")
    assert main(["check", "sweep.yaml", "--model", str(SHIPPED_MODEL)]) == 2
    assert "--model is for a data file alone" in capsys.readouterr().err


def test_check_of_nothing_says_what_it_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check", "absent.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("tenfold: data must be a file, a folder or a hub id")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the real training files in {SHARED}")
def test_check_of_glaive_explains_tools(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path))
    assert main(["check", str(SHARED / "glaive_toolcall_en_demo.json")]) == 0
    out = capsys.readouterr().out
    assert "rows offer tools, 211 calls" in out
    assert "the chat template has no place for tools" in out
    assert 'a call is trained as: <tool_call>⏎{"name": "search_recipes", "arguments": ' in out
    assert "a tool's result is shown, not trained, as: {" in out
