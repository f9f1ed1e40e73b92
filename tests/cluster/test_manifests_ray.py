"""The YAML for `ray up`, against Ray's own schema and Ray's own reading of it."""

import json
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.manifests.need import ClusterNeed
from cluster.manifests.ray_launcher import LauncherOptions, launcher_manifest
from orchestration.cluster_verb import as_yaml
from tests.cluster.manifest_needs import NEEDS, Machine, make_need

SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
WORKERS = tuple(f"10.0.0.{number}" for number in range(2, 12))
OPTIONS = {
    "aws": LauncherOptions(
        provider="aws", region="us-west-2", machine_image="ami-1", instance_type="big"
    ),
    "gcp": LauncherOptions(
        provider="gcp", region="r", zone="r-a", project="p", machine_image="i", instance_type="big"
    ),
    "local": LauncherOptions(provider="local", head_ip="10.0.0.1", worker_ips=WORKERS),
}
every_need = pytest.mark.parametrize("need", NEEDS.values(), ids=NEEDS)
every_cloud = pytest.mark.parametrize("provider", ["aws", "gcp"])


def parsed(need: ClusterNeed, options: LauncherOptions) -> dict:
    """The manifest as Ray's launcher reads it from a file."""
    return yaml.safe_load(as_yaml([launcher_manifest(need, options)]))


@every_need
@pytest.mark.parametrize("provider", list(OPTIONS))
def test_launcher_manifest_follows_the_schema_of_ray_and_is_read_back_as_written(need, provider):
    manifest = parsed(need, OPTIONS[provider])
    assert manifest == launcher_manifest(need, OPTIONS[provider])
    jsonschema.validate(manifest, SCHEMA)
    validate_config(prepare_config(manifest))


@pytest.mark.parametrize(
    ("where", "key"), [((), "worker_nodes"), (("auth",), "user"), (("docker",), "shm")]
)
def test_launcher_schema_refuses_a_key_that_ray_does_not_know(where, key):
    manifest = parsed(make_need(), OPTIONS["aws"])
    inner = manifest
    for step in where:
        inner = inner[step]
    inner[key] = "x"
    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate(manifest, SCHEMA)


@every_need
@every_cloud
def test_launcher_cloud_numbers_equal_the_need_and_the_head_has_no_cpus_or_gpus(need, provider):
    manifest = parsed(need, OPTIONS[provider])
    types = manifest["available_node_types"]
    worker, head = types["tenfold.worker"], types[manifest["head_node_type"]]
    assert manifest["max_workers"] == worker["min_workers"] == worker["max_workers"]
    assert worker["max_workers"] == need.num_nodes
    gpus = {"GPU": need.gpus_per_node} if need.gpu_name else {}
    assert worker["resources"] == {"CPU": need.node_cpus} | gpus
    assert head["resources"] == {"CPU": 0}
    assert "--num-cpus=0 --num-gpus=0" in manifest["head_start_ray_commands"][1]
    started = manifest["worker_start_ray_commands"][1]
    assert f"--num-cpus={need.node_cpus} --num-gpus={need.gpus_per_node}" in started


@every_need
def test_launcher_local_machines_are_as_many_as_the_need(need):
    manifest = prepare_config(parsed(need, OPTIONS["local"]))
    node_type = manifest["available_node_types"]["local.cluster.node"]
    assert node_type["min_workers"] == node_type["max_workers"] == need.num_nodes
    assert manifest["provider"]["worker_ips"] == list(WORKERS[: need.num_nodes])


@every_cloud
def test_launcher_spot_is_asked_for_the_workers_alone(provider):
    def configs(spot: bool) -> tuple[str, str]:
        types = parsed(make_need(spot=spot), OPTIONS[provider])["available_node_types"]
        return tuple(str(types[f"tenfold.{name}"]["node_config"]) for name in ("head", "worker"))

    head, worker = configs(True)
    assert "spot" in worker.lower()
    assert "spot" not in (head + "".join(configs(False))).lower()


def test_launcher_listens_on_loopback_and_every_ray_process_wants_the_token():
    manifest = parsed(make_need(), OPTIONS["aws"])
    head, worker = manifest["head_start_ray_commands"][1], manifest["worker_start_ray_commands"][1]
    assert "--dashboard-host=127.0.0.1" in head
    assert all("export RAY_AUTH_MODE=token; ray start" in line for line in (head, worker))
    assert manifest["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_launcher_without_an_image_installs_what_it_is_told():
    need = make_need(image=None, requirements=("tenfold @ git+https://x/y", "ray==2.60.0"))
    manifest = parsed(need, OPTIONS["gcp"])
    assert "docker" not in manifest
    assert manifest["setup_commands"][1] == (
        "python3 -m pip install 'tenfold @ git+https://x/y' ray==2.60.0"
    )
    assert "pip" not in str(parsed(make_need(), OPTIONS["gcp"])["setup_commands"])


def test_launcher_mounts_the_shared_folder_on_the_machine_and_into_the_container():
    options = LauncherOptions(**vars(OPTIONS["aws"]) | {"nfs": "fs-1:/a b"})
    manifest = parsed(make_need(work_folder="/mnt/x y"), options)
    assert manifest["initialization_commands"][1].endswith("mount -t nfs 'fs-1:/a b' '/mnt/x y'")
    assert "-v '/mnt/x y':'/mnt/x y'" in manifest["docker"]["run_options"]


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        ({"region": None}, {}, "--provider aws needs --region"),
        ({"machine_image": None}, {}, "--provider aws needs --machine-image"),
        ({"project": "p"}, {}, "--provider aws takes no --project"),
        ({}, {"image": None}, "--provider aws needs --image .* or --pip"),
        ({"instance_type": None}, {"gpu_name": "X-1GB"}, "no aws machine is known here for X-1GB"),
        ({"provider": "local"}, {}, "--provider local needs --head-ip, --worker-ips"),
    ],
)
def test_launcher_of_an_incomplete_cluster_is_refused(options, values, message):
    with pytest.raises(ValueError, match=message):
        launcher_manifest(make_need(**values), LauncherOptions(**vars(OPTIONS["aws"]) | options))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_groups": 81}, "--worker-ips must name 11 machines, got 10"),
        ({"spot": True}, "--provider local takes no --spot"),
    ],
)
def test_launcher_of_too_few_local_machines_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        launcher_manifest(make_need(**values), OPTIONS["local"])


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def set_up(machine: Machine, name: str, storage: str, options: LauncherOptions) -> str:
    """Runs the manifest's own setup of the head; returns what `ray exec` would run."""
    work = machine.root / "it's work"
    work.mkdir()
    need = make_need(
        name=name, work_folder=str(work), storage=storage, config_text="data: it's $HOME\n"
    )
    commands = parsed(need, options)["head_setup_commands"]
    written = [line for line in commands if "pip install" not in line]
    assert machine.run("\n".join(["set -eu", *written])) == (0, "")
    config = machine.home / ".tenfold" / name / "sweep.yaml"
    assert config.read_text() == "data: it's $HOME\n"
    machine.nodes_file.write_text("2")  # the head and one worker
    return (machine.home / ".tenfold" / name / "run.sh").read_text()


def test_launcher_script_starts_the_run_or_goes_on_with_it(machine):
    work = machine.root / "it's work"
    script = set_up(machine, "My_Run.v1", "runs", OPTIONS["aws"])
    config = machine.home / ".tenfold" / "My_Run.v1" / "sweep.yaml"
    assert machine.run(script, TENFOLD_STATUS="1") == (1, "")
    assert machine.calls() == [
        f"tenfold sweep {config} --name My_Run.v1 --address auto --resume",
        f"cwd {work}",
    ]


def test_launcher_script_passes_the_secrets_of_a_file_on(machine):
    secrets = machine.home / ".tenfold" / "secrets.env"
    options = LauncherOptions(**vars(OPTIONS["aws"]) | {"secrets_file": "/here/secrets.env"})
    script = set_up(machine, "run", "runs", options)
    secrets.write_text("RAY_AUTH_TOKEN=from-the-file\n")
    (machine.root / "bin" / "tenfold").write_bytes((machine.root / "bin" / "ray").read_bytes())
    assert machine.run(script)[0] == 0
    assert (machine.root / "tokens").read_text() == "from-the-file\n"
    manifest = parsed(make_need(), options)
    assert manifest["file_mounts"]["~/.tenfold/secrets.env"] == "/here/secrets.env"
    assert all(
        ". ~/.tenfold/secrets.env; set +a; ray start" in manifest[f"{kind}_start_ray_commands"][1]
        for kind in ("head", "worker")
    )
