"""Bad input: exit code 2, one clear line per problem, nothing started, nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.cli import main
from orchestration.run import SOURCE, require_new
from tests.orchestration.sweeps import BASE
from tests.trainers.families import tiny_of
from trainers.object_store import ObjectStore
from trainers.paths import RunPaths, write_state, write_text

ROOT = Path(__file__).resolve().parents[2]
LONG = "word " * 60
PER_RANK = 4 * (2 * (192 + 192) + 2 * (192 + 64) + 3 * (192 + 512)) + (192 + 3072)
"""LoRA parameters of the shipped base for one unit of rank: 4 layers of q, o, k, v, gate, up and
down, and the head."""


def told(verb: str, config: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines that a verb writes to stderr on bad input; checks that it left nothing behind."""
    folder = Path.cwd()
    before = sorted(folder.rglob("*"))
    assert main([verb, str(config)]) == 2
    captured = capsys.readouterr()
    # check shows what it found in the data even where no sweep could use them.
    assert captured.out == "" or (verb == "check" and captured.out.startswith("data: "))
    assert sorted(folder.rglob("*")) == before
    assert captured.err.startswith("tenfold: ")
    return captured.err.removeprefix("tenfold: ").splitlines()


def write(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)


def rows(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


GOOD_ROW = {"prompt": "a", "completion": "b"}
DATA = {
    "missing file": ("absent.jsonl", None, ["absent.jsonl"]),
    "missing file with a path": ("./no/such", None, ["no/such"]),
    "unknown suffix": ("rows.txt", "a\n", ["rows.txt", "jsonl"]),
    "empty file": ("empty.jsonl", "", ["empty.jsonl", "is empty"]),
    "empty csv": ("empty.csv", "", ["empty.csv", "is empty"]),
    "blank lines alone": ("blank.jsonl", "\n\n", ["blank.jsonl", "must hold rows"]),
    "header alone": ("head.csv", "prompt,completion\n", ["head.csv", "must hold rows"]),
    "broken line": ("broken.jsonl", rows(GOOD_ROW, GOOD_ROW) + '{"prompt": \n', ["broken.jsonl:3"]),
    "line that is no object": ("five.jsonl", rows(GOOD_ROW, 5), ["five.jsonl:2"]),
    "neither known shape": (
        "odd.jsonl",
        rows({"foo": "a", "bar": 1}),
        ["odd.jsonl:1", "foo, bar", "columns: {prompt: question, completion: answer}"],
    ),
    "folder without data": ("folder/readme.md", "x", ["folder", "found none"]),
}


@pytest.mark.parametrize("verb", ["plan", "sweep"])
@pytest.mark.parametrize("case", DATA)
def test_bad_data_file_gives_one_line_with_its_place(write_sweep, capsys, verb, case):
    name, text, parts = DATA[case]
    if text is not None:
        write(name, text)
    data = "folder" if name.startswith("folder/") else name
    (line,) = told(verb, write_sweep(data=data), capsys)
    for part in parts:
        assert part in line


@pytest.mark.parametrize("verb", ["check", "plan", "sweep"])
@pytest.mark.parametrize("truncation", ["drop", "cut"])
def test_bad_data_truncated_to_nothing_names_max_length(write_sweep, capsys, verb, truncation):
    write("long.jsonl", rows(*({"prompt": LONG, "completion": f" {i}"} for i in range(30))))
    config = write_sweep(data="long.jsonl", seq_len=16, truncation=truncation)
    (line,) = told(verb, config, capsys)
    for part in ("long.jsonl", "30 of 30 rows", "(max_length) 16"):
        assert part in line


@pytest.mark.parametrize("verb", ["plan", "sweep"])
def test_bad_model_folder_without_config_says_so(write_sweep, capsys, verb):
    write("model/tokenizer.json", "{}")
    (line,) = told(verb, write_sweep(model="model"), capsys)
    assert line == "model model: the folder must hold a config.json, it has none"


@pytest.mark.parametrize("verb", ["plan", "sweep"])
@pytest.mark.parametrize("model", ["./nowhere", "no/such/config.json", "/no/such/model"])
def test_bad_model_path_that_is_not_there_is_named(write_sweep, capsys, verb, model):
    (line,) = told(verb, write_sweep(model=model), capsys)
    assert line == f"model {model}: no such file or folder"


@pytest.mark.parametrize(
    ("text", "part"),
    [("{", "must be JSON"), ("[]", "must hold a JSON object"), ("{}", "model_type")],
)
def test_bad_model_config_is_named_with_its_fault(write_sweep, capsys, text, part):
    write("model/config.json", text)
    (line,) = told("plan", write_sweep(model="model"), capsys)
    assert part in line


def test_bad_model_without_weights_can_be_planned_but_not_swept(write_sweep, base, capsys):
    for path in base.glob("*.json"):
        write(f"model/{path.name}", path.read_text())
    config = write_sweep(model="model")
    assert main(["plan", str(config)]) == 0
    capsys.readouterr()
    (line,) = told("sweep", config, capsys)
    assert "model model" in line
    assert "safetensors" in line


@pytest.mark.parametrize("length", [0, 5, 1_000, -1])
def test_bad_weights_that_are_not_whole_are_named_and_leave_nothing(
    write_sweep, base, capsys, length
):
    shutil.copytree(base, "model")
    weights = Path("model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:length])
    (line,) = told("sweep", write_sweep(model="model"), capsys)
    assert str(weights) in line
    assert "whole safetensors file" in line
    assert not Path("runs").exists()


def test_bad_weights_of_which_a_shard_is_missing_are_named(write_sweep, base, capsys):
    shutil.copytree(base, "model")
    shards = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    write("model/model.safetensors.index.json", json.dumps({"weight_map": shards}))
    (line,) = told("sweep", write_sweep(model="model"), capsys)
    assert "model/model-00002-of-00002.safetensors" in line


VALUES = {
    "unknown key": ({"learning_rte": 1}, ["'learning_rte'", "did you mean 'learning_rate'?"]),
    "rank 0": ({"lora_rank": 0}, ["lora_rank", "got 0"]),
    "rank 0 in a list": ({"lora_rank": [8, 0]}, ["lora_rank", "got 0"]),
    "negative LR": ({"learning_rate": -1e-4}, ["learning_rate", "got -0.0001"]),
    "batch 0": ({"global_batch_size": 0}, ["global_batch_size", "got 0"]),
    "unknown target": ({"target": "atn"}, ["'atn'", "did you mean 'attn'?"]),
    "fused name on split layers": ({"target": ["q_proj", "c_attn"]}, ["'c_attn'", "q_proj"]),
    "experts of a dense model": ({"target": "experts"}, ["'experts'", "attn, mlp, unembed"]),
    "one of several targets": ({"target": [["attn"], ["experts"]]}, ["'experts'"]),
    "seq_len above the context": ({"seq_len": 1025}, ["1024", "got 1025"]),
    "batch that workers cannot share": (
        {"workers_per_trial": 2, "global_batch_size": 15},
        ["workers_per_trial (2)", "got 15"],
    ),
    "grace period above the budget": (
        {"examples": 20, "grace_period": 21},
        ["grace_period", "20 examples", "got 21"],
    ),
    "missing template": ({"chat_template": "no.jinja"}, ["chat_template", "no.jinja"]),
    "missing eval file": ({"eval": "held.jsonl"}, ["held.jsonl"]),
    "missing retention file": ({"retention": "general.jsonl"}, ["retention: ", "general.jsonl"]),
    "neither true nor false": ({"packing": "sometimes"}, ["packing must be true or false"]),
    "unknown system role": ({"system_role": "merge"}, ["system_role", "'merge'"]),
    "weight of a file": ({"data": {"good.jsonl": 0}}, ["weights above 0", "'good.jsonl': 0"]),
    "unknown column": (
        {"columns": {"prompt": "prompt", "completion": "frage"}},
        ["good.jsonl:1", "frage"],
    ),
    "unknown size class": ({"size_class": "9B"}, ["size_class", "9B"]),
}


@pytest.mark.parametrize("verb", ["plan", "sweep"])
@pytest.mark.parametrize("case", VALUES)
def test_bad_value_gives_one_line_with_the_value(write_sweep, capsys, monkeypatch, verb, case):
    values, parts = VALUES[case]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    (line,) = told(verb, write_sweep(**values), capsys)
    for part in parts:
        assert part in line


@pytest.mark.parametrize("verb", ["plan", "sweep"])
def test_bad_values_together_give_a_line_each(write_sweep, capsys, verb):
    config = write_sweep(learning_rte=1, lora_rank=0, learning_rate=-1, global_batch_size=0)
    lines = told(verb, config, capsys)
    assert len(lines) == 4
    for key in ("learning_rte", "lora_rank", "learning_rate must", "global_batch_size"):
        assert sum(key in line for line in lines) == 1
    assert all("sweep.yaml: " in line for line in lines)


@pytest.mark.parametrize("verb", ["plan", "sweep"])
@pytest.mark.parametrize("search", [{}, {"search": "random", "num_candidates": 5}])
def test_bad_capacity_everywhere_gives_the_numbers_and_the_way_out(
    write_sweep, capsys, verb, search
):
    (line,) = told(verb, write_sweep(capacity=1e9, **search), capsys)
    # The table's ranks are extended to the largest useful one: k and v have 64 rows.
    for part in ("UNDERCAPACITY", f"{2 * 64 * PER_RANK:,} bits", f"{64 * PER_RANK:,} params"):
        assert part in line
    assert "capacity_policy: advisory" in line


MEASURED = {
    "no data": ({"data": None, "dataset_tokens": 1000}, ["dataset_tokens", "capacity: doctrine"]),
    "no weights": ({"model": "model"}, ["model model", "safetensors"]),
    "a bare config": ({"model": "model/config.json"}, ["model/config.json", "capacity: doctrine"]),
}


@pytest.mark.parametrize("case", MEASURED)
def test_bad_capacity_that_cannot_be_measured_says_what_it_needs(write_sweep, base, capsys, case):
    values, parts = MEASURED[case]
    for path in base.glob("*.json"):
        write(f"model/{path.name}", path.read_text())
    (line,) = told("plan", write_sweep(capacity="measured", **values), capsys)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"gpus_per_worker": 1, "workers_per_trial": 8}, ["needs 8 GPUs", "this machine has 0"]),
        ({"cpus_per_worker": 3}, ["needs 3 CPUs", "this machine has 2"]),
        ({"workers_per_trial": 4}, ["needs 4 CPUs", "this machine has 2"]),
    ],
)
def test_bad_demand_above_the_machine_gives_both_numbers(
    write_sweep, capsys, monkeypatch, values, parts
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    (line,) = told("sweep", write_sweep(global_batch_size=16, **values), capsys)
    for part in parts:
        assert part in line


def test_run_folder_of_a_driver_that_died_before_its_plan_may_begin_again(tmp_path):
    run = RunPaths(tmp_path / "run")
    write_text(run.config, "model: m")
    write_text(run.resolved, "{}")
    run.lock.touch()
    (run.root / ".plan.json.17.tmp").touch()
    require_new(run)
    write_text(run.plan, "{}")
    with pytest.raises(ValueError, match="exists already"):
        require_new(run)


def test_resume_of_a_run_whose_yaml_was_edited_shows_the_difference(write_sweep, tmp_path, capsys):
    run = RunPaths(tmp_path / "run")
    source = write_sweep(global_batch_size=4).read_text()
    write_text(run.config, source.replace("global_batch_size: 4", "global_batch_size: 8"))
    write_state(run.plan, {})
    write_state(run.resolved, {"config": {}, SOURCE: source})
    before = {path.name: path.read_bytes() for path in run.root.iterdir()}
    (line,) = told("resume", run.root, capsys)
    assert f"{run.config}: a run goes on with what it began with, which differs now" in line
    assert "-global_batch_size: 4; +global_batch_size: 8" in line
    assert {name: (run.root / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("storage", "part"),
    [
        ("s3://key:never@bucket/runs", "must hold no credentials"),
        ("memory://runs", "a URL with a bucket that every node reaches"),
        ("gs://bucket/runs", "install gcsfs on the driver and on every node"),
        ("s3://no-such-bucket/runs", "create the bucket, or set the store's credentials"),
    ],
)
def test_bad_storage_url_is_refused_before_anything_is_read(
    write_sweep, capsys, bucket, tmp_path, storage, part
):
    (line,) = told("sweep", write_sweep(storage=storage), capsys)
    assert part in line
    assert "never" not in line
    assert not (tmp_path / "cache").exists()


def test_bad_nf4_of_a_family_that_it_does_not_reach_is_refused(write_sweep, capsys, tmp_path):
    folder = tmp_path / "falcon"
    tiny_of("falcon").save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, folder / name)
    capsys.readouterr()  # what saving a model says
    (line,) = told("sweep", write_sweep(model=str(folder), capacity_policy="advisory"), capsys)
    assert "quantization: nf4 reaches no layer of a falcon model" in line
    assert "set quantization: none" in line


def test_bad_token_without_a_row_of_the_embedding_is_refused(write_sweep, capsys, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    new = {"content": "<|new|>", "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append({"id": 3072, "normalized": False, "special": True} | new)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (line,) = told("sweep", write_sweep(model=str(folder)), capsys)
    assert "must have a row of the embedding, which has 3,072" in line
    assert "the tokenizer has 1 beyond, first '<|new|>' (3072)" in line


def test_bad_run_at_a_url_that_is_there_or_is_not_a_sweep(write_sweep, capsys, bucket, tmp_path):
    store = ObjectStore(f"{bucket.url}/runs/mine")
    store.write("plan.json", b"kept")
    (line,) = told("sweep", write_sweep(storage=f"{bucket.url}/runs", name="mine"), capsys)
    assert f"{bucket.url}/runs/mine: the run folder exists already" in line
    assert store.read("plan.json") == b"kept"
    assert main(["resume", f"{bucket.url}/runs/none"]) == 2
    assert "must be the folder of a sweep" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mine", None])
def test_bad_run_folder_that_exists_is_left_as_it_was(write_sweep, capsys, name):
    folder = name or "tiny-llama-good"
    write(f"runs/{folder}/plan.json", "kept")
    (line,) = told("sweep", write_sweep(name=name), capsys)
    assert f"runs/{folder}" in line
    assert "exists already" in line
    assert Path(f"runs/{folder}/plan.json").read_text() == "kept"


@pytest.mark.parametrize("verb", ["check", "plan", "sweep"])
def test_bad_path_of_sweep_yaml_is_named(workplace, capsys, verb):
    assert told(verb, Path("absent.yaml"), capsys) == ["absent.yaml: no such file"]


def test_bad_run_folder_of_report_is_named(workplace, capsys):
    Path("runs/none").mkdir(parents=True)
    (line,) = told("report", Path("runs/none"), capsys)
    assert "runs/none: must be the folder of a sweep" in line


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"data": None, "dataset_tokens": 1000}, "a sweep needs data"),
        ({"data": None, "method": "rl", "examples": 100}, "a sweep needs data"),
    ],
)
def test_bad_sweep_of_what_can_only_be_planned_says_so(write_sweep, capsys, values, part):
    config = write_sweep(**values)
    assert main(["plan", str(config)]) == 0
    capsys.readouterr()
    (line,) = told("sweep", config, capsys)
    assert part in line


def in_a_process(verb: str, config: Path) -> subprocess.CompletedProcess[str]:
    """Runs a verb offline; whether ray was imported is the last line of stdout."""
    code = (
        "import sys\nfrom orchestration.cli import main\ncode = main(sys.argv[1:])\n"
        "print('ray' in sys.modules)\nsys.exit(code)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, verb, str(config)],
        env=environment | {"HF_HOME": str(config.parent / "hub")},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("verb", "key"), [("plan", "model"), ("sweep", "model"), ("plan", "data"), ("sweep", "data")]
)
def test_bad_hub_id_that_cannot_be_reached_gives_one_line_and_no_ray(write_sweep, verb, key):
    done = in_a_process(verb, write_sweep(**{key: "nobody/nothing"}))
    assert (done.returncode, done.stdout) == (2, "False\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("tenfold: ")
    assert "nobody/nothing" in line
    assert not Path("runs").exists()


def test_bad_value_of_a_sweep_is_told_before_ray_is_imported(write_sweep):
    done = in_a_process("sweep", write_sweep(seq_len=4096))
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr == (
        "tenfold: seq_len must be at most the model's context (1024 tokens), got 4096\n"
    )
