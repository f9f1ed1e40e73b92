"""What a preflight finds, on facts made by hand, and what a plan needs. test_orch_joined.py asks real nodes."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from cluster.inventory import Inventory, TrialDemand
from orchestration.config import make_config
from orchestration.node_facts import (
    END_BYTES,
    NodeFacts,
    Question,
    fingerprint,
    node_facts,
)
from orchestration.packs import plan_packs
from orchestration.plan_json import plan_to_dict
from orchestration.planning import Plan, make_plan
from orchestration.preflight import (
    Needs,
    checked_inventory,
    hosts,
    needs_of,
    problems,
    storage_problems,
    with_smallest_gpu,
)
from orchestration.run_folder import run_in
from orchestration.show import show_plan
from orchestration.trials import TrialMaker
from tests.orchestration.sweeps import BASE, FUNCTIONS
from trainers.paths import RunPaths

CPU = TrialDemand(num_workers=1, cpus_per_worker=1, gpus_per_worker=0)
GPU = TrialDemand(num_workers=8, cpus_per_worker=1, gpus_per_worker=1)
NEEDS = Needs(
    model="/models/base",
    revision=None,
    inputs=("/data/train.jsonl",),
    storage="/shared/runs",
    demand=CPU,
    storage_bytes=1000,
)
VERSIONS = {
    "ray": "2.60.0",
    "torch": "2.13.0+cpu",
    "transformers": "5.20.1",
    "peft": "0.21.0",
    "bitsandbytes": "0.50.2",
    "tokenizers": "0.22.3",
    "deepspeed": "0.19.0",
    "safetensors": "0.7.1",
    "numpy": "2.4.1",
}
FACTS = NodeFacts(
    host="head",
    python="3.11.7",
    versions=VERSIONS,
    imports={"trainers": "/driver/trainers"},
    inputs={"/models/base": "m", "/data/train.jsonl": "d"},
    storage_error="",
    storage_free_bytes=1000,
    work_free_bytes=500,
    base_bytes=0,
    base_error="",
    cache_free_bytes=0,
    gpu_bytes=None,
)
INVENTORY = Inventory(num_cpus=1, num_gpus=0, where="the Ray cluster")


def found(node: NodeFacts, needs: Needs = NEEDS, *, storage_seen: bool = True) -> list[str]:
    return problems(needs, FACTS, node, storage_seen=storage_seen)


def with_versions(**versions: str) -> NodeFacts:
    return replace(FACTS, versions=VERSIONS | versions)


def test_preflight_node_like_the_driver_has_no_problem():
    assert found(FACTS) == []


@pytest.mark.parametrize(
    "node",
    [
        with_versions(torch="2.13.0+cu128"),  # another build of one release
        with_versions(safetensors="0.7.9", numpy="2.4.0"),  # one format
        with_versions(deepspeed=""),  # nobody shards
        replace(FACTS, python="3.11.9", host="other", gpu_bytes=1),
    ],
    ids=["build", "patch", "deepspeed", "python-patch"],
)
def test_preflight_difference_that_decides_no_number_is_no_problem(node):
    assert found(node) == []


@pytest.mark.parametrize(
    ("package", "version", "wanted"),
    [
        ("torch", "2.13.1+cpu", "2.13.0"),
        ("transformers", "5.20.0", "5.20.1"),
        ("peft", "0.22.0", "0.21.0"),
        ("bitsandbytes", "", "0.50.2"),
        ("tokenizers", "0.22.2", "0.22.3"),
        ("ray", "2.60.1", "2.60.0"),
        ("safetensors", "0.6.0", "0.7"),
        ("numpy", "1.26.4", "2.4"),
    ],
)
def test_preflight_other_version_is_named_with_the_one_to_install(package, version, wanted):
    (line,) = found(with_versions(**{package: version}))
    assert f"{package} must be {wanted} as on the driver, is {version or 'not installed'}" in line
    assert f"install {package}=={wanted} there" in line


def test_preflight_deepspeed_counts_where_the_base_is_sharded():
    (line,) = found(with_versions(deepspeed="0.18.0"), replace(NEEDS, sharded=True))
    assert "deepspeed must be 0.19.0 as on the driver, is 0.18.0" in line


def test_preflight_other_python_and_other_tenfold_are_named():
    other = {"trainers": "/home/me/trainers"}
    python, code = found(replace(FACTS, python="3.12.1", imports=other))
    assert "Python must be 3.11 as on the driver, is 3.12.1" in python
    assert "trainers must be the driver's, which was sent there, is /home/me/trainers" in code
    sent = {"trainers": "/tmp/ray/session_1/runtime_resources/py_modules_files/_ray_pkg_1/trainers"}
    assert found(replace(FACTS, imports=sent)) == []


@pytest.mark.parametrize(
    ("path", "there", "expected"),
    [
        ("/models/base", "", "model /models/base must be readable there, nothing is"),
        ("/models/base", "x", "model /models/base must be the driver's, it holds something else"),
        ("/data/train.jsonl", "", "data /data/train.jsonl must be readable there, nothing is"),
        ("/data/train.jsonl", "unreadable: Permission denied", "is unreadable: Permission denied"),
    ],
)
def test_preflight_path_that_is_not_the_drivers_is_named(path, there, expected):
    (line,) = found(replace(FACTS, inputs={**FACTS.inputs, path: there}))
    assert expected in line
    assert ("or give a hub id" in line) == (path == "/models/base" and "permissions" not in line)


@pytest.mark.parametrize(
    ("error", "seen"), [("no such folder", False), ("not the driver's folder", False), ("", False)]
)
def test_preflight_storage_that_is_not_shared_asks_for_a_shared_folder(error, seen):
    (line,) = found(replace(FACTS, storage_error=error), storage_seen=seen)
    assert "storage /shared/runs must be a folder that all nodes share" in line
    assert (error or "what it writes is not seen here") in line


def test_preflight_storage_at_a_url_asks_for_client_and_credentials():
    needs = replace(NEEDS, storage="s3://bucket/runs")
    (line,) = found(replace(FACTS, storage_error="needs a client"), needs, storage_seen=False)
    assert "storage s3://bucket/runs must be readable and writable there: needs a client" in line
    assert "credentials" in line


@pytest.mark.parametrize(("needed", "count"), [(0, 0), (500, 0), (501, 1)])
def test_preflight_copies_of_a_run_at_a_url_must_fit_a_nodes_disk(needed, count):
    needs = replace(NEEDS, storage="s3://bucket/runs", work_bytes=needed)
    lines = found(FACTS, needs)
    assert len(lines) == count
    assert all("need 501 bytes on its own disk, 500 are free" in line for line in lines)


def test_preflight_base_that_a_node_cannot_fetch_or_hold_is_named():
    gated = replace(FACTS, base_bytes=None, base_error="model a/b: 401 Unauthorized")
    (line,) = found(gated)
    assert line.startswith("model a/b: 401 Unauthorized; give the cluster a network or HF_TOKEN")
    assert found(replace(FACTS, base_bytes=100, cache_free_bytes=100)) == []
    (line,) = found(replace(FACTS, base_bytes=101, cache_free_bytes=100))
    assert "needs 101 bytes in the hub's cache, 100 are free" in line


def test_preflight_all_problems_of_a_node_are_told_at_once():
    node = replace(
        with_versions(torch="2.12.0", peft=""), storage_error="no such folder", inputs={}
    )
    node = replace(node, inputs=dict.fromkeys(FACTS.inputs, ""))
    assert len(found(node, storage_seen=False)) == 5


@pytest.mark.parametrize(("free", "count"), [(1000, 0), (1001, 0), (999, 1), (None, 0)])
def test_preflight_checkpoints_must_fit_the_storage(free, count):
    assert len(storage_problems(NEEDS, free)) == count


def test_preflight_asks_living_nodes_that_can_host_a_worker_and_the_head():
    head = {"Alive": True, "Resources": {"node:__internal_head__": 1.0}}
    gpu = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}
    cpu = {"Alive": True, "Resources": {"CPU": 8.0}}
    dead = {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 1.0}}
    assert hosts([head, gpu, cpu, dead], GPU) == [head, gpu]
    assert hosts([head, gpu, cpu, dead], CPU) == [head, gpu, cpu]


def test_preflight_inventory_has_the_smallest_gpu_of_all_nodes():
    inventory = Inventory(num_cpus=1, num_gpus=2, where="the Ray cluster", gpu_bytes=80)
    nodes = [replace(FACTS, gpu_bytes=80), replace(FACTS, gpu_bytes=24), FACTS]
    assert with_smallest_gpu(inventory, nodes).gpu_bytes == 24
    assert with_smallest_gpu(inventory, [FACTS]).gpu_bytes == 80
    unknown = replace(inventory, gpu_bytes=None)
    assert with_smallest_gpu(unknown, [FACTS]) == unknown


@pytest.mark.parametrize("at", [0, END_BYTES - 1, -1, -END_BYTES])
def test_node_facts_fingerprint_sees_a_byte_at_either_end_of_a_file(tmp_path, at):
    file, body = tmp_path / "data.jsonl", bytearray(3 * END_BYTES)
    file.write_bytes(body)
    before = fingerprint(file)
    body[at] = 1
    file.write_bytes(body)
    assert fingerprint(file) != before


def test_node_facts_fingerprint_of_folders_sees_names_and_sizes(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert fingerprint(folder) == fingerprint(tmp_path / "gone") == ""
    (folder / "config.json").write_text("{}")
    before = fingerprint(folder, (".json",))
    (folder / "README.md").write_text("for people")
    assert fingerprint(folder, (".json",)) == before
    (folder / "more.json").write_text("{}")
    assert fingerprint(folder, (".json",)) not in ("", before)


def test_node_facts_of_this_machine_name_what_is_installed(tmp_path):
    question = Question(
        packages=("ray", "no-such-package"),
        model=str(BASE),
        revision=None,
        inputs=(str(FUNCTIONS), str(tmp_path / "gone")),
        storage=str(tmp_path),
    )
    facts = node_facts(question, None)
    import ray

    assert facts.versions == {"ray": ray.__version__, "no-such-package": ""}
    assert facts.inputs[str(tmp_path / "gone")] == ""
    assert facts.inputs[str(BASE)]
    assert facts.inputs[str(FUNCTIONS)]
    assert facts.python == ".".join(map(str, sys.version_info[:3]))


@pytest.fixture
def planned(workplace: Path, write_rows, qa_rows) -> Callable[..., Plan]:
    """The plan of two candidates of the shipped base, of ranks 2 and 4 on its attention."""
    write_rows("train.jsonl", qa_rows(60))
    values = {"model": str(BASE), "data": "train.jsonl", "lora_rank": [2, 4]}
    values |= {"learning_rate": 1e-3, "global_batch_size": 16, "target": ["attn"]}
    values |= {"capacity_policy": "advisory"}
    return lambda **more: make_plan(make_config(values | more, "test"))


def attention_params(lora_rank: int) -> int:
    """Of an adapter on every attention projection, from the shapes of the weights on disk."""
    with safe_open(BASE / "model.safetensors", framework="np") as weights:
        shapes = [weights.get_slice(key).get_shape() for key in weights.keys() if "_attn." in key]  # noqa: SIM118
    assert len(shapes) % 4 == 0
    return sum(lora_rank * sum(shape) for shape in shapes)


def test_needs_of_a_plan_count_checkpoints_of_all_trials_and_local_inputs(planned, tmp_path):
    plan, run = planned(), RunPaths(tmp_path / "runs" / "run")
    needs = needs_of(plan, run, INVENTORY)
    weights = 4 * (attention_params(2) + attention_params(4))
    # Weights, two moments, the best weights; both run: the checkpoint before and the one that is written.
    assert needs.storage_bytes == weights * (3 + 1 + 3 + 3)
    assert needs.storage == str(tmp_path / "runs")
    assert needs.inputs == (str(Path("train.jsonl").resolve()),)
    assert needs.model == str(BASE)
    assert not needs.sharded
    run.trials.mkdir(parents=True)
    (run.trials / "written").write_bytes(bytes(100))
    assert needs_of(plan, run, INVENTORY).storage_bytes == weights * 10 - 100


def test_plan_says_how_many_bytes_its_checkpoints_take(planned, capsys):
    plan = plan_to_dict(planned())
    both, largest = attention_params(2) + attention_params(4), attention_params(4)
    assert plan["checkpoints"] == {
        "ended_bytes": 4 * 4 * both,
        "running_trial_bytes": 4 * 6 * largest,
    }
    show_plan(plan)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoints")]
    assert len(said) == 1
    assert f"{16 * both:,} bytes" in said[0]
    assert f"{24 * largest:,} more" in said[0]


def test_needs_of_a_study_count_what_runs_at_once(planned, tmp_path):
    plan, run = planned(engine="solo"), RunPaths(tmp_path / "run")
    needs = needs_of(plan, run, INVENTORY, keep_weights=False, full_ft_params=1000)
    assert needs.storage_bytes == 4 * 10 * (attention_params(4) + 1000)


def test_needs_of_a_run_at_a_url_count_the_copies_of_a_worker(planned, tmp_path):
    storage = f"file://{tmp_path}/store"
    plan, run = planned(storage=storage), run_in(storage, "run")
    needs = needs_of(plan, run, INVENTORY)
    assert needs.storage == storage
    # Both adapters of the pack: last, before and next checkpoint, and best weights.
    assert needs.work_bytes == 4 * 10 * (attention_params(2) + attention_params(4))
    assert needs_of(plan, RunPaths(tmp_path / "run"), INVENTORY).work_bytes == 0
    trial = TrialMaker(plan, CPU, plan_packs(plan, INVENTORY), run).make(plan.pruned.admitted[0])
    assert trial["folder"] == f"{storage}/run/trials/{trial['name']}"


def test_trial_of_a_hub_model_names_the_hub_for_its_tokenizer(planned, tmp_path):
    plan, run = planned(), RunPaths(tmp_path / "run")
    packs, candidate = plan_packs(plan, INVENTORY), plan.pruned.admitted[0]
    local = TrialMaker(plan, CPU, packs, run).make(candidate)
    assert local["data"]["model"] == str(BASE)
    hub = plan.config.model_copy(update={"model": "owner/model", "revision": "c0ffee"})
    trial = TrialMaker(replace(plan, config=hub), CPU, packs, run).make(candidate)
    assert (trial["data"]["model"], trial["data"]["revision"]) == ("owner/model", "c0ffee")
    assert (trial["base"]["model"], trial["base"]["revision"]) == ("owner/model", "c0ffee")


def test_preflight_of_a_local_cluster_looks_at_the_disk_and_starts_nothing(tmp_path):
    inventory = Inventory(num_cpus=1, num_gpus=0, where="this machine")
    needs = replace(NEEDS, storage=str(tmp_path / "runs"), storage_bytes=1)
    assert checked_inventory(needs, inventory, local=True) is inventory
    with pytest.raises(ValueError, match="checkpoints need 1,000,000,000,000,000,000 bytes"):
        checked_inventory(replace(needs, storage_bytes=10**18), inventory, local=True)
    assert list(tmp_path.iterdir()) == []
