"""A joined cluster of two real raylets: the head with the driver, and a node that lives in a mount namespace,
without Tenfold and without the driver's storage. And a demand that no cluster can serve."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.inventory import Inventory
from orchestration.local_ray import token_file
from orchestration.preflight import checked_inventory
from tests.conftest import s3_environment
from tests.orchestration.nodes import CPU, needs_on, on_node, start_node
from tests.orchestration.sweeps import BASE, FUNCTIONS, ROOT, ended, start, statuses, told
from trainers.object_store import ObjectStore

INVENTORY = Inventory(num_cpus=1, num_gpus=0, where="the Ray cluster")
START_S = 60
FREED_S = 30
"""Ray takes a moment to remove what a job that ended had reserved."""


@dataclass(frozen=True)
class TwoNodes:
    """A head without CPUs, with the driver, and a node that hosts all workers in a mount namespace: without
    Tenfold's packages, and with a folder of its own where the driver has `private`."""

    address: str
    head: str
    other: str
    shared: Path
    private: Path


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory, s3_port: int) -> Iterator[TwoNodes]:
    if subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("needs a mount namespace (root, or a container with SYS_ADMIN)")
    import ray
    from ray.cluster_utils import Cluster

    from orchestration import sweep

    # No worker can import this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    before, folder = dict(os.environ), tmp_path_factory.mktemp("nodes")
    shared, private = folder / "shared", folder / "private"
    shared.mkdir()
    private.mkdir()
    os.environ |= {"TENFOLD_CACHE": str(shared / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= s3_environment(s3_port)  # a node has the store's credentials of its own
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    node, where = start_node(cluster.address, private, folder / "node.log"), Path.cwd()
    os.chdir(folder)  # Ray puts the driver's working directory on every worker's path
    try:
        sweep.start_ray(cluster.address)
        deadline = time.monotonic() + START_S
        while sum(node["Alive"] for node in ray.nodes()) < 2:
            assert time.monotonic() < deadline, (folder / "node.log").read_text()
            time.sleep(0.2)
        is_head = {n["NodeID"]: "node:__internal_head__" in n["Resources"] for n in ray.nodes()}
        head, other = sorted(is_head, key=lambda node: not is_head[node])
        yield TwoNodes(cluster.address, head, other, shared, private)
    finally:
        sweep.stop_ray()
        node.terminate()
        node.wait(START_S)
        cluster.shutdown()
        os.chdir(where)
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def model(two_nodes: TwoNodes) -> Iterator[Path]:
    """A model's folder that the driver alone sees."""
    folder = two_nodes.private / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def nothing_is_held_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did, the cluster's CPU is free for the next: no placement group outlived its job."""
    yield
    if "two_nodes" not in request.fixturenames:
        return
    import ray

    deadline = time.monotonic() + FREED_S
    while held := [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]:
        assert time.monotonic() < deadline, held
        time.sleep(0.2)


def names_in(folder: str) -> list[str]:
    return os.listdir(folder)


@pytest.mark.ray
@pytest.mark.slow
def test_preflight_two_nodes_with_a_shared_folder_pass_and_nothing_is_left(two_nodes):
    storage = two_nodes.shared / "new" / "runs"
    assert checked_inventory(needs_on(storage), INVENTORY, local=False) == INVENTORY
    assert not storage.exists()


@pytest.mark.ray
@pytest.mark.slow
def test_preflight_storage_of_one_node_alone_is_refused_and_nothing_is_left(two_nodes):
    needs = needs_on(two_nodes.private)
    with pytest.raises(ValueError, match="must be a folder that all nodes share") as refused:
        checked_inventory(needs, INVENTORY, local=False)
    (line,) = str(refused.value).splitlines()
    assert two_nodes.other[:8] in line
    assert list(two_nodes.private.iterdir()) == []
    assert on_node(two_nodes.other, names_in, str(two_nodes.private)) == []


@pytest.mark.ray
@pytest.mark.slow
def test_preflight_storage_at_a_url_is_written_by_every_node_and_nothing_is_left(two_nodes, bucket):
    needs = replace(needs_on(two_nodes.shared), storage=f"{bucket.url}/new/runs")
    assert checked_inventory(needs, INVENTORY, local=False) == INVENTORY
    assert ObjectStore(bucket.url).listing() == {}


@pytest.mark.ray
@pytest.mark.slow
def test_preflight_storage_at_a_url_that_a_node_sees_otherwise_is_refused(two_nodes):
    # A folder that is another one on the node, and a disk that holds no copy of a trial.
    storage = f"file://{two_nodes.private}/runs"
    needs = replace(needs_on(two_nodes.shared), storage=storage, work_bytes=10**18)
    with pytest.raises(ValueError, match="must be readable and writable there") as refused:
        checked_inventory(needs, INVENTORY, local=False)
    lines = str(refused.value).splitlines()
    assert len([line for line in lines if "copies of a worker's trials need" in line]) == 2
    (line,) = (line for line in lines if "must be readable and writable" in line)
    assert two_nodes.other[:8] in line
    assert "what the driver wrote there is not seen here" in line


@pytest.mark.ray
@pytest.mark.slow
def test_preflight_all_problems_of_all_nodes_come_in_one_answer(two_nodes, model):
    needs = needs_on(two_nodes.private, model, storage_bytes=10**18)
    with pytest.raises(ValueError, match="checkpoints need") as refused:
        checked_inventory(needs, INVENTORY, local=False)
    disk, *lines = str(refused.value).splitlines()
    assert disk.startswith("storage ")
    assert [line.split(":")[1].split()[0] for line in lines] == ["model", "storage"]
    assert all(two_nodes.other[:8] in line for line in lines)


@pytest.mark.ray
@pytest.mark.slow
def test_preflight_node_that_does_not_answer_in_time_is_named(two_nodes):
    with pytest.raises(ValueError, match="must answer within 0 s, did not") as refused:
        checked_inventory(needs_on(two_nodes.shared), INVENTORY, local=False, wait_s=0)
    assert len(str(refused.value).splitlines()) == 2
    assert [path.name for path in two_nodes.shared.glob(".tenfold-preflight-*")] == []


def tenfold_there() -> tuple[int, str, str]:
    """Whether the node has Tenfold of its own, where this process has it from, and a digest of an asset."""
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    alone = subprocess.run(
        [sys.executable, "-c", "import trainers"], cwd="/", env=bare, check=False
    )
    import trainers

    (folder,) = trainers.__path__
    weights = Path(folder, "assets", "tiny-llama", "model.safetensors").read_bytes()
    return alone.returncode, folder, hashlib.sha256(weights).hexdigest()


def tenfold_one_task_further(node: str) -> tuple[int, str, str]:
    """The same asked by a task with variables of its own, as Ray Train's controller starts its workers."""
    return on_node(node, tenfold_there, runtime_env={"env_vars": {"OTHER": "1"}})


@pytest.mark.ray
@pytest.mark.slow
def test_runtime_env_node_without_tenfold_runs_the_drivers_assets_included(two_nodes):
    mine = hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()
    own = {"env_vars": {"ONE": "1"}}
    for code, folder, weights in (
        on_node(two_nodes.other, tenfold_there, runtime_env=own),
        on_node(two_nodes.head, tenfold_one_task_further, two_nodes.other, runtime_env=own),
    ):
        assert code == 1, "the node must not have Tenfold of its own for this test"
        assert "py_modules_files" in folder
        assert weights == mine


@pytest.mark.ray
@pytest.mark.slow
def test_runtime_env_of_a_submitted_job_is_kept_beside_ours(two_nodes, tmp_path):
    module = tmp_path / "jobs_own"
    module.mkdir()
    (module / "__init__.py").write_text("VALUE = 7\n")
    job = {
        "py_modules": [str(module)],
        "env_vars": {"TOKENIZERS_PARALLELISM": "true", "JOB": "1"},
    }
    driver = (
        "import os, ray\n"
        "from orchestration import sweep\n"
        f"sweep.start_ray({two_nodes.address!r})\n"
        "def look():\n"
        "    import jobs_own, search_spaces\n"
        "    keys = ('TOKENIZERS_PARALLELISM', 'JOB', 'TENFOLD_CACHE')\n"
        "    return [jobs_own.VALUE, search_spaces.__file__, *map(os.environ.get, keys)]\n"
        "value, place, *variables = ray.get(ray.remote(look).options(num_cpus=0).remote())\n"
        "assert value == 7 and 'py_modules_files' in place, place\n"
        "print(variables)\n"
        "sweep.stop_ray()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", driver],
        env=os.environ
        | {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": job})}
        | {"PYTHONPATH": str(ROOT), "TENFOLD_CACHE": "/shared/cache"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['true', '1', '/shared/cache']"


def write_sweep(folder: Path, **values: object) -> None:
    config = {"model": str(BASE), "data": str(FUNCTIONS), "name": "run"} | values
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config))


SECONDS_OF_A_REFUSAL = 60
"""A process, its imports and a connection on a machine with one busy core; Ray would wait for ever."""


def refused_in_a_line(folder: Path, *flags: str) -> str:
    began = time.monotonic()
    done = ended(start(folder, "sweep", "sweep.yaml", *flags))
    assert time.monotonic() - began < SECONDS_OF_A_REFUSAL
    assert done.returncode == 2, told(done)
    assert not (folder / "runs" / "run").exists()
    (line,) = done.stderr.splitlines()
    return line


def test_sweep_of_eight_gpus_on_a_machine_with_none_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_sweep(tmp_path, workers_per_trial=8, gpus_per_worker=1)
    line = refused_in_a_line(tmp_path)
    assert "a trial needs 8 GPUs (workers_per_trial 8 x 1 per worker), this machine has 0" in line


@pytest.mark.ray
@pytest.mark.slow
def test_sweep_of_eight_gpus_on_a_joined_cluster_with_none_is_refused_at_once(two_nodes, tmp_path):
    write_sweep(tmp_path, workers_per_trial=8, gpus_per_worker=1)
    line = refused_in_a_line(tmp_path, "--address", two_nodes.address)
    assert "a trial needs 8 GPUs (workers_per_trial 8 x 1 per worker), the Ray cluster has" in line


@pytest.mark.ray
@pytest.mark.slow
def test_sweep_whose_storage_is_not_shared_is_refused_and_leaves_no_run(two_nodes, tmp_path):
    write_sweep(tmp_path, storage=str(two_nodes.private), num_candidates=1)
    done = ended(start(tmp_path, "sweep", "sweep.yaml", "--address", two_nodes.address))
    assert done.returncode == 2, told(done)
    assert f"storage {two_nodes.private} must be a folder that all nodes share" in done.stderr
    assert list(two_nodes.private.iterdir()) == []


@pytest.mark.ray
@pytest.mark.slow
def test_sweep_on_a_node_without_tenfold_trains_and_shares_its_data_on_the_storage(
    two_nodes, tmp_path
):
    storage = two_nodes.shared / "runs"
    write_sweep(tmp_path, storage=str(storage), num_candidates=1, examples=32, seq_len=128)
    env = {key: value for key, value in os.environ.items() if key != "TENFOLD_CACHE"}
    # Needed where an earlier test of this process had a Ray with a token.
    token = {"RAY_AUTH_TOKEN_PATH": str(token_file())}
    verb = ["sweep", "sweep.yaml", "--address", two_nodes.address]
    done = subprocess.run(
        [sys.executable, "-m", "orchestration.cli", *verb],
        cwd=tmp_path,
        env=env | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")} | token,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, told(done)
    assert [end["status"] for end in statuses(storage / "run").values()] == ["finished"]
    assert (storage / "run" / "best" / "adapter_model.safetensors").is_file()
    assert len(list((storage / ".cache" / "sets").iterdir())) == 1
    assert not (tmp_path / "home" / ".cache" / "tenfold").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["packed", "solo"])
def test_sweep_on_an_object_store_needs_no_folder_that_nodes_share(
    two_nodes, bucket, tmp_path, engine
):
    storage, own = f"{bucket.url}/runs", two_nodes.private / engine
    write_sweep(
        tmp_path, storage=storage, num_candidates=1, examples=32, seq_len=128, engine=engine
    )
    verb = ["sweep", "sweep.yaml", "--address", two_nodes.address]
    done = subprocess.run(
        [sys.executable, "-m", "orchestration.cli", *verb],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TENFOLD_CACHE": str(own)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, told(done)
    names = ObjectStore(f"{storage}/run").listing()
    assert "best/adapter_model.safetensors" in names
    (status,) = (n for n in names if n.endswith("status.json"))
    content = ObjectStore(f"{storage}/run").read(status)
    assert content is not None
    assert json.loads(content)["status"] == "finished"
    assert not (two_nodes.shared / engine).exists()
    # The node took the tokenized data from the store: it has them, and made none of its own.
    made = on_node(two_nodes.other, names_in, str(own / "sets"))
    assert made == names_in(str(own / "sets"))
    assert len(ObjectStore(f"{storage}/.cache").read_all([f"sets/{made[0]}/manifest.json"])) == 1
    assert on_node(two_nodes.other, names_in, str(own / "work")) == []


def serve_nothing(config: dict[str, Any]) -> None:
    """A group's worker that is told to stop and does."""
    from orchestration.broker_link import link_of

    link = link_of(config)
    assert link.begin()
    link.hello({"max_tokens": 1})
    while not any(command["kind"] == "stop" for command in link.commands(idle=True)):
        pass


@pytest.mark.ray
@pytest.mark.slow
def test_pool_broker_of_a_joined_cluster_lives_on_the_head(two_nodes):
    import ray

    from orchestration.pool import Pool

    def node_of(_: object) -> str:
        return ray.get_runtime_context().get_node_id()

    with Pool(CPU, 1, {}, {}, str(two_nodes.shared / "pool"), serve=serve_nothing) as pool:
        pool.first_group()
        assert ray.get(pool.broker.__ray_call__.remote(node_of)) == two_nodes.head
