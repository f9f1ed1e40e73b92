"""The command line: what its verbs print, and its exit codes (bad input has a file of its own)."""

import io
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console

from orchestration import run as run_module
from orchestration.cli import EXIT_CODES, build_parser, main
from orchestration.demo import demo_config, free_name
from orchestration.results import TrialRecord
from orchestration.results_table import show_results
from tests.orchestration.sweeps import candidate_dict
from tests.search_spaces.test_arch_counts import DOCTRINE_ALL_LINEAR, DOCTRINE_MOE
from trainers.paths import RunPaths

MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"


def printed(show) -> str:
    """What a function writes to a wide console that is no terminal."""
    stream = io.StringIO()
    show(Console(file=stream, width=250, highlight=False))
    return stream.getvalue()


def record(name: str, status: str, reason: str, losses: list[float]) -> TrialRecord:
    rows = tuple(
        {"examples": 16 * i, "steps": i, "eval_loss": loss, "eval_bits_per_byte": loss / 2}
        for i, loss in enumerate(losses)
    )
    candidate = candidate_dict(lora_rank=8, target=["attn"])
    return TrialRecord(name=name, candidate=candidate, status=status, reason=reason, rows=rows)


def test_plan_json_is_one_json_value_on_stdout(write_sweep, capsys):
    config = write_sweep(lora_rank=[4, 8], learning_rate=1e-3, global_batch_size=16)
    assert main(["plan", str(config), "--json"]) == 0
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert [item["candidate"]["lora_rank"] for item in plan["candidates"]] == [4, 8]
    assert captured.err == ""


def test_plan_lists_candidates_discarded_and_settings(write_sweep, base, capsys):
    config = write_sweep(
        data=None,
        dataset_tokens=15_000,
        lora_rank=[1, 2],
        learning_rate=[1e-3, 2e-3],
        global_batch_size=16,
        target="attn",
    )
    assert main(["plan", str(config)]) == 0
    out = capsys.readouterr().out
    for part in ("15,000 bits to hold", "2 admitted", "2 discarded before any trial"):
        assert part in out
    assert "2 x UNDERCAPACITY: rank 1 on attn holds 10,240 bits" in out


def test_plan_of_a_random_search_names_the_ranks_it_never_draws(write_sweep, capsys):
    config = write_sweep(
        data=None,
        dataset_tokens=15_000,
        search="random",
        num_candidates=2,
        lora_rank=[1, 2],
        target="attn",
    )
    assert main(["plan", str(config)]) == 0
    out = capsys.readouterr().out
    assert "cut before any draw: lora_rank 1 on attn: the data needs 2" in out


@pytest.mark.parametrize("name", ["a[b]c", "a[/b]c"])
def test_plan_and_check_of_a_path_with_brackets_print_it_whole(write_sweep, capsys, name):
    path = Path(name) / "rows.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(Path(write_sweep().parent / "good.jsonl").read_bytes())
    config = write_sweep(data=str(path))
    for verb in ("plan", "check"):
        assert main([verb, str(config)]) == 0
        assert f"data: {path}" in capsys.readouterr().out


def test_show_results_reason_with_brackets_is_text(tmp_path):
    run = RunPaths(tmp_path / "runs[/x]" / "mine")
    bad = record("r8", "failed", "KeyError: [/bad] of [batch, seq]", [])
    good = record("r4", "finished", "", [3.0, 2.0, 2.5])
    out = printed(lambda console: show_results([good, bad], good, run, 5, console))
    assert "KeyError: [/bad] of [batch, seq]" in out
    assert f"report: {run.report}" in out
    assert f"best adapter: {run.best}" in out
    for part in ("2 trials, 5 candidates discarded", "2.0000", "1.0000", "untouched base: 3.0000"):
        assert part in out


def test_show_results_without_a_best_says_so(tmp_path):
    bad = record("r8", "diverged", "train_loss nan at step 3", [3.0])
    out = printed(lambda console: show_results([bad], None, RunPaths(tmp_path), 0, console))
    assert "no trial ended with a usable score" in out
    assert "train_loss nan at step 3" in out


def test_main_interrupted_gives_130(write_sweep, capsys, monkeypatch):
    def interrupt(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "run_sweep", interrupt)
    assert main(["sweep", str(write_sweep())]) == 130
    assert capsys.readouterr().err == "tenfold: interrupted\n"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["plan"], ["plan", "a.yaml", "--fast"]])
def test_main_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: tenfold" in capsys.readouterr().err


def test_main_help_of_the_command_and_of_every_verb_says_the_exit_codes(capsys):
    (verbs,) = (action for action in build_parser()._actions if isinstance(action.choices, dict))
    assert {"check", "plan", "sweep", "report", "demo", "schema", "init"} <= verbs.choices.keys()
    for words in ([], *([verb] for verb in verbs.choices)):
        with pytest.raises(SystemExit) as end:
            main([*words, "--help"])
        assert end.value.code == 0
        out = " ".join(capsys.readouterr().out.split())
        assert f"usage: {' '.join(['tenfold', *words])}" in out
        assert EXIT_CODES in out


def test_main_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"tenfold {version('tenfold')}\n"


def test_demo_config_is_the_shipped_base_on_the_shipped_rows(workplace, base):
    config, source = demo_config(None)
    assert (config.model, config.name) == (str(base), "demo")
    assert config.data == str(base.parent / "demo" / "functions.jsonl")
    assert config.retention == str(base.parent / "demo" / "reference.jsonl")
    assert source == (base.parent / "demo" / "sweep.yaml").read_text()
    assert config.quantization == "nf4"


def test_free_name_counts_up_from_the_folders_that_are_there(tmp_path):
    assert free_name(tmp_path, "demo") == "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-3").mkdir()
    assert free_name(tmp_path, "demo") == "demo-2"
    (tmp_path / "demo-2").mkdir()
    assert free_name(tmp_path, "demo") == "demo-4"


def test_sweep_at_an_address_where_nobody_listens_is_one_line_and_leaves_nothing(
    write_sweep, capsys
):
    config = write_sweep(lora_rank=4, learning_rate=1e-3, global_batch_size=16)
    assert main(["sweep", str(config), "--address", "127.0.0.1:1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "address 127.0.0.1:1: no Ray cluster answers" in line
    assert not Path("runs").exists()


def test_plan_whose_reader_has_seen_enough_ends_without_a_word(write_sweep):
    command = f"{sys.executable} -m orchestration.cli plan {write_sweep()} | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "per_rank"), [*DOCTRINE_ALL_LINEAR.items(), *DOCTRINE_MOE.items()]
)
def test_plan_of_a_published_model_prints_the_doctrines_count(write_sweep, capsys, model, per_rank):
    config = MODELS / f"{model}.json"
    if not config.is_file():
        pytest.skip(f"needs ../shared/models/{model}.json")
    path = write_sweep(
        model=str(config),
        data=None,
        dataset_tokens=1000,
        lora_rank=64,
        target=["attn", "experts" if model in DOCTRINE_MOE else "mlp"],
        learning_rate=1e-4,
        global_batch_size=16,
    )
    assert main(["plan", str(path), "--json"]) == 0
    (candidate,) = json.loads(capsys.readouterr().out)["candidates"]
    assert candidate["adapter_params"] == 64 * per_rank
    assert main(["plan", str(path)]) == 0
    assert f"{64 * per_rank:,}" in capsys.readouterr().out


def test_plan_says_that_it_read_the_layers_from_the_model(write_sweep, tmp_path, capsys):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    moe = {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2}
    (tmp_path / "olmoe.json").write_text(json.dumps(sizes | moe))
    values = {"data": None, "dataset_tokens": 1000, "lora_rank": 4, "num_candidates": 1}
    path = write_sweep(model=str(tmp_path / "olmoe.json"), **values)
    assert main(["plan", str(path)]) == 0
    out = capsys.readouterr().out
    assert "model type olmoe has no reader here: its layers were read from the model" in out
    assert "adapts attn+experts+unembed: 8 attn + 1 unembed + 16 experts matrices" in out
    known = write_sweep(**values)
    assert main(["plan", str(known)]) == 0
    assert "has no reader" not in capsys.readouterr().out
