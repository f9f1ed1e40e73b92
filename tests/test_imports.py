"""What `tenfold` has imported when it answers: each case in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "trainers" / "assets" / "tiny-llama"
SHARED_70B = ROOT.parent / "shared" / "models" / "Llama-3.1-70B.json"
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
HEAVY = {"torch", "ray", "transformers", "datasets"}
VERB = "from orchestration.cli import main\nassert main({arguments!r}) == 0"


def loaded_after(code: str, folder: Path) -> set[str]:
    """Top-level modules in sys.modules after a piece of code that ended well."""
    report = folder / "modules.json"
    script = (
        f"{code}\nimport json, pathlib, sys\n"
        f"names = sorted({{name.split('.')[0] for name in sys.modules}})\n"
        f"pathlib.Path({str(report)!r}).write_text(json.dumps(names))"
    )
    environment = os.environ | {
        "TENFOLD_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(report.read_text()))


def write_config(folder: Path, **values: object) -> None:
    (folder / "sweep.yaml").write_text(yaml.safe_dump(values))


def test_imports_check_sees_what_was_imported(tmp_path):
    assert {"numpy", "json"} <= loaded_after("def f():\n    import numpy\nf()", tmp_path)


def test_imports_of_the_command_line_hold_nothing_heavy(tmp_path):
    loaded = loaded_after("import orchestration.cli", tmp_path)
    assert "orchestration" in loaded
    assert loaded & {*HEAVY, "pydantic", "rich", "numpy"} == set()


def test_imports_of_the_python_api_hold_nothing_heavy_until_it_is_used(tmp_path):
    loaded = loaded_after("import orchestration", tmp_path)
    assert loaded & {*HEAVY, "pydantic", "rich", "numpy", "pandas", "yaml"} == set()
    loaded = loaded_after("from orchestration import Sweep\nassert Sweep.plan", tmp_path)
    assert loaded & {*HEAVY, "numpy", "pandas"} == set()


def test_imports_after_status_and_the_verbs_of_trials_hold_nothing_heavy(tmp_path):
    rows = [{"prompt": f"{i} plus one?", "completion": f" It is {i + 1}."} for i in range(60)]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = "from tests.orchestration.written_runs import WrittenRun\nsweep = WrittenRun()\n"
    loaded_after(written, tmp_path)
    run, code = tmp_path / "runs" / "run", "from orchestration.cli import main\n"
    (first, second) = sorted(path.name for path in (run / "trials").iterdir())
    for verb in (["status"], ["trial", "stop"], ["trial", "clone"]):
        trial = {"stop": [first], "clone": [second, "--set", "seed=3"]}.get(verb[-1], [])
        code += f"assert main({[*verb, str(run), *trial]!r}) == 0\n"
    assert loaded_after(code, tmp_path) & HEAVY == set()
    assert len(list((run / "commands").iterdir())) == 2


def test_imports_after_help_hold_nothing_heavy(tmp_path):
    code = (
        "from orchestration.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "else:\n    raise AssertionError('help did not exit')"
    )
    assert loaded_after(code, tmp_path) & HEAVY == set()


def test_imports_after_plan_of_a_storage_at_a_url_hold_no_client_of_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    values = {"dataset_tokens": 2.0e9, "storage": "s3://bucket/runs"}
    write_config(tmp_path, model="config.json", **values)
    code = VERB.format(arguments=["plan", "sweep.yaml"])
    assert loaded_after(code, tmp_path) & {*HEAVY, "fsspec", "s3fs"} == set()


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_imports_after_plan_from_a_config_and_a_count_hold_nothing_heavy(tmp_path, flags):
    config = json.loads(SHARED_70B.read_text()) if SHARED_70B.exists() else LLAMA_70B
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_config(tmp_path, model="config.json", dataset_tokens=2.0e9)
    code = VERB.format(arguments=["plan", "sweep.yaml", *flags])
    assert loaded_after(code, tmp_path) & {*HEAVY, "numpy", "tokenizers"} == set()


def test_imports_after_plan_of_data_hold_nothing_heavy_and_once_counted_no_numpy(tmp_path):
    rows = [{"prompt": f"{i} plus one?", "completion": f" It is {i + 1}."} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_config(tmp_path, model=str(BASE), data="data.jsonl")
    code = VERB.format(arguments=["plan", "sweep.yaml"])
    counting = loaded_after(code, tmp_path)
    assert "tokenizers" in counting
    assert counting & HEAVY == set()
    assert loaded_after(code, tmp_path) & {*HEAVY, "numpy", "tokenizers"} == set()


def test_imports_after_plan_of_a_measured_capacity_once_measured_hold_no_torch(tmp_path):
    rows = [{"prompt": f"{i} plus one?", "completion": f" It is {i + 1}."} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_config(tmp_path, model=str(BASE), data="data.jsonl", capacity="measured")
    code = VERB.format(arguments=["plan", "sweep.yaml"])
    measuring = loaded_after(code, tmp_path)
    assert {"torch", "transformers"} <= measuring
    assert "ray" not in measuring
    assert loaded_after(code, tmp_path) & {*HEAVY, "numpy", "tokenizers", "safetensors"} == set()
